"""What the blocking and the asyncio objects share: all that needs no call.

Knows nothing of drivers; :mod:`faceteer._client` and :mod:`faceteer._async_client` add the calls, one line each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

import numpy as np
from PIL import Image

from faceteer._editing import EditPlan
from faceteer._edits import FeatureEdit, FeatureKey, Unit, chained, without
from faceteer._fired import FiredFeatures
from faceteer._html import FILE_BYTES, save_page
from faceteer._opening import Context, OpenedPhoto
from faceteer._photo_views import edit_view, photo_view
from faceteer._pictures import decode_picture
from faceteer._values import DrawingOptions, Execution, Notice, Revisions, Settings

if TYPE_CHECKING:
    import numpy.typing as npt

D = TypeVar("D")


class Bound(Generic[D]):
    """Something that makes its calls through a client's driver."""

    def __init__(self, driver: D, context: Context) -> None:
        self._driver = driver
        self._context = context


class PhotoBase(Bound[D]):
    """An opened picture: its features, embedding and reconstruction quality."""

    def __init__(self, driver: D, context: Context, opened: OpenedPhoto) -> None:
        super().__init__(driver, context)
        self._opened = opened

    @property
    def name(self) -> str:
        """The file's name, or "picture"."""
        return self._opened.name

    @property
    def features(self) -> FiredFeatures:
        """The features that fire, strongest first."""
        return self._opened.features

    @property
    def embedding_id(self) -> str:
        """Names the embedding in later calls, while the server's cache keeps it."""
        return self._opened.embedding_id

    @property
    def embeds(self) -> npt.NDArray[np.float32]:
        """The CLIP embedding x, float32 [d], neither normalised nor centred; read-only."""
        return self._opened.embeds

    @property
    def l0(self) -> int:
        """How many features fire in all."""
        return self._opened.features.l0

    @property
    def explained_variance(self) -> float:
        """1 - ||x - x_hat||^2 / ||x - mean||^2."""
        return self._opened.explained_variance

    @property
    def cosine(self) -> float:
        """cos(x, x_hat)."""
        return self._opened.cosine

    @property
    def norm(self) -> float:
        """||x||."""
        return self._opened.norm

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """Whether the picture is unlike those the models know, and the usual cause."""
        return self._opened.warnings

    @property
    def revisions(self) -> Revisions:
        """The models that read it."""
        return self._opened.revisions

    @property
    def encoder_execution(self) -> Execution:
        """How the encoder's part came about, and how long it took."""
        return self._opened.encoder_execution

    @property
    def sae_execution(self) -> Execution:
        """How the SAE's part came about, and how long it took."""
        return self._opened.sae_execution

    @property
    def data(self) -> bytes | None:
        """The whole file as it was sent; None when opened from an embedding or a prompt."""
        return self._opened.data

    @property
    def prompt(self) -> str:
        """The text that it was imagined for; empty when it was not made by :meth:`Client.embed_prompt`."""
        return self._opened.prompt

    @property
    def image(self) -> Image.Image | None:
        """The picture itself; None when opened from an embedding or a prompt."""
        return None if self._opened.data is None else decode_picture(self._opened.data)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.l0} features, {', '.join(map(str, self.features.top(3)))}>"

    def _repr_html_(self) -> str:
        return photo_view(self._opened)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture and its features as a page of its own, and returns the path."""
        return save_page(path, self.name, photo_view(self._opened, most=50, budget=FILE_BYTES))


class EditBase(Bound[D]):
    """A photo and edits of its features. Every method that adds one returns a new edit; none changes this one.

    Edits commute: each refers to the activations of the unedited photo. A feature is named by label or index.
    """

    def __init__(self, driver: D, context: Context, plan: EditPlan) -> None:
        super().__init__(driver, context)
        self._plan = plan

    @property
    def edits(self) -> tuple[FeatureEdit, ...]:
        """The edits so far."""
        return self._plan.edits

    @property
    def settings(self) -> Settings:
        """How it will be drawn, unless render says otherwise."""
        return self._plan.settings

    @property
    def coverage(self) -> float | None:
        """For an edit made by transfer: the share of the difference that it carries. None otherwise."""
        return self._plan.coverage

    def set(self, feature: FeatureKey, value: float, *, unit: Unit = "scaled") -> Self:
        """The activation becomes ``value``; "scaled": 1.0 is the feature's 99th percentile where it fires."""
        return self._plus(FeatureEdit(feature, "set", value, unit))

    def add(self, feature: FeatureKey, value: float, *, unit: Unit = "scaled") -> Self:
        """The activation rises by ``value`` (or falls, when negative)."""
        return self._plus(FeatureEdit(feature, "add", value, unit))

    def scale(self, feature: FeatureKey, factor: float) -> Self:
        """The activation is multiplied by ``factor``."""
        return self._plus(FeatureEdit(feature, "scale", factor))

    def ablate(self, feature: FeatureKey) -> Self:
        """The activation becomes 0."""
        return self._plus(FeatureEdit(feature, "ablate"))

    def switch(self, feature: FeatureKey, value: float = 1.0, *, unit: Unit = "scaled") -> Self:
        """The activation becomes ``value``, and the feature's rivals (those that hardly ever fire with it) become 0."""
        return self._plus(FeatureEdit(feature, "switch", value, unit))

    def extend(self, edits: Iterable[FeatureEdit]) -> Self:
        """All of these edits too."""
        return self._plus(*edits)

    def without(self, feature: FeatureKey) -> Self:
        """The same without the edit of this feature."""
        return self._changed(edits=without(self._plan.edits, feature))

    def using(
        self,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **options: Unpack[DrawingOptions],
    ) -> Self:
        """The same, drawn with these settings unless render says otherwise."""
        given = Settings.of(seed=seed, seeds=seeds, **options)
        return self._changed(settings=self._plan.settings.overlaid(given))

    def __str__(self) -> str:
        return "; ".join(map(str, self.edits)) or "no edits"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._plan.photo.name}: {self}>"

    def _repr_html_(self) -> str:
        return edit_view(self._plan)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the edit as a page of its own, with what was drawn and reported of it so far, and returns the path."""
        return save_page(path, self._plan.photo.name, edit_view(self._plan, budget=FILE_BYTES))

    def _plus(self, *edits: FeatureEdit) -> Self:
        return self._changed(edits=chained(self._plan.edits, edits))

    def _changed(self, **changes: Any) -> Self:
        return type(self)(self._driver, self._context, self._plan.changed(**changes))

    def _single(self, settings: Settings) -> Settings:
        """Settings for one picture: without a seed, the first that the edit's own settings name."""
        if settings.seeds or not self._plan.settings.seeds:
            return settings
        return settings.overlaid(Settings(seeds=self._plan.settings.seeds[:1]))

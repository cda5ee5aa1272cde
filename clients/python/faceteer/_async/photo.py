"""An opened picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from faceteer._async.connection import AsyncConnection
from faceteer._async.editing import AsyncEdit
from faceteer._files import write_atomically
from faceteer._models.edits import FeatureEdit
from faceteer._models.fired import FiredFeatures
from faceteer._models.photo import OpenedPhoto
from faceteer._models.pictures import decode_picture
from faceteer._models.plan import EditPlan
from faceteer._models.recipe import Recipe
from faceteer._models.values import Execution, Notice, Revisions
from faceteer._views.photos import photo_view

if TYPE_CHECKING:
    import numpy.typing as npt


class AsyncPhoto:
    """An opened picture: its features, embedding and reconstruction quality. Made by :meth:`Client.open`."""

    def __init__(self, connection: AsyncConnection, opened: OpenedPhoto) -> None:
        self._connection = connection
        self._opened = opened

    def edit(self, edits: Recipe | Iterable[FeatureEdit] | None = None) -> AsyncEdit:
        """An edit of this photo: without any edits yet, or those of a recipe, a difference, or a list.

        Raises:
            RevisionMismatchError: the recipe was made with other models.
        """
        return AsyncEdit(self._connection, EditPlan.of(self._opened, edits))

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
        """Whether the picture is unlike those that the bundle was made from, and what to do. Look here first: of such a
        picture the features mean little."""
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
        """The prompt; empty for a photo that was not made by :meth:`Client.embed_prompt`."""
        return self._opened.prompt

    @property
    def image(self) -> Image.Image | None:
        """The picture itself; None when opened from an embedding or a prompt."""
        return None if self._opened.data is None else decode_picture(self._opened.data)

    def __repr__(self) -> str:
        doubt = " ⚠ see .warnings" if self.warnings else ""
        strongest = ", ".join(map(str, self.features.top(3)))
        return f"<{type(self).__name__} {self.name}: {self.l0} features, {strongest}{doubt}>"

    def _repr_html_(self) -> str:
        return photo_view(self._opened)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture and its features as a page of its own, and returns the path."""
        return write_atomically(path, photo_view(self._opened, page=True).encode())

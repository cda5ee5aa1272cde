"""What is to be done to a photo: edits, and how to draw. Immutable, except for the remembered outcome."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from faceteer._errors import invalid
from faceteer._models.difference import TransferPart
from faceteer._models.edits import FeatureEdit, chained
from faceteer._models.photo import OpenedPhoto
from faceteer._models.recipe import Recipe
from faceteer._models.report import EditReport
from faceteer._models.values import Revisions, Settings, check_strength
from faceteer._models.wire import number
from faceteer.v1 import studio_pb2


@dataclass
class Outcome:
    """What the server has said about an edit so far, kept so that it is asked once."""

    report: EditReport | None = None
    drawn_with: Settings | None = None
    #: (seed, small picture) of the last drawing, for a notebook; full-size pictures are their owner's to keep.
    pictures: tuple[tuple[int, Image.Image], ...] = ()


@dataclass(frozen=True)
class EditPlan:
    """A photo, edits, and how to draw. Never changes, except for ``outcome``, the remembered result.

    Attributes:
        expected: the models that the photo was opened with, or a recipe made for; the server refuses to run on others,
            where the same index is another feature.
        coverage: the share of a difference that the edits carry, for those made by transfer; None otherwise.
        parts: of that difference, taken or not; empty otherwise.
        recipe_photo: SHA-256 of the picture that a recipe was made from, where it keeps a layout; empty otherwise.
    """

    photo: OpenedPhoto
    edits: tuple[FeatureEdit, ...] = ()
    settings: Settings = field(default_factory=Settings)
    expected: Revisions = field(default_factory=Revisions)
    coverage: float | None = None
    parts: tuple[TransferPart, ...] = ()
    recipe_photo: str = ""
    outcome: Outcome = field(default_factory=Outcome, compare=False)

    def changed(self, **changes: Any) -> EditPlan:
        """A new plan with these changes and no outcome yet."""
        return replace(self, outcome=Outcome(), **changes)

    @classmethod
    def of(cls, photo: OpenedPhoto, edits: Any) -> EditPlan:
        """A plan from nothing (None), a recipe, or any iterable of FeatureEdit."""
        opened_with = Revisions(encoder=photo.revisions.encoder, sae=photo.revisions.sae)
        if edits is None:
            return cls(photo, expected=opened_with)
        if isinstance(edits, Recipe):
            edits.check(photo.revisions)
            made_for = replace(opened_with, **{part: name for part, name in vars(edits.revisions).items() if name})
            return cls(photo, edits.edits, edits.settings, made_for, recipe_photo=edits.photo)
        try:
            given = tuple(edits)
        except TypeError:
            given = (edits,)
        for edit in given:
            if not isinstance(edit, FeatureEdit):
                raise invalid("edits", f"{edit!r} is neither a Recipe nor FeatureEdits")
        return cls(photo, chained((), given), expected=opened_with)

    def recipe(self, report: EditReport, settings: Settings) -> Recipe:
        """The edit as data: labels as the server resolved them, drawn with ``settings``."""
        digest = self.photo.digest if settings.keep_layout in ("inversion", "image_to_image") else ""
        return Recipe(report.edits, replace(report.revisions, library=""), settings, digest)

    def layout(self, settings: Settings) -> studio_pb2.KeepLayout | None:
        """What the server is asked to keep of the photo's layout; None for a drawing from pure noise.

        Raises:
            InvalidArgumentError: the photo has no bytes, or strength goes with no method that takes one.
        """
        check_strength(settings)
        if settings.keep_layout in (None, "none"):
            return None
        if self.photo.data is None:
            made_of = f" (the recipe's had SHA-256 {self.recipe_photo})" if self.recipe_photo else ""
            raise invalid(
                "keep_layout",
                f"{self.photo.name} was opened without a picture, and only a picture has a layout; open the picture "
                f"itself with client.open(path){made_of}, or draw without keep_layout (keep_layout='none')",
            )
        method = number(studio_pb2.LayoutMethod, settings.keep_layout)
        return studio_pb2.KeepLayout(method=method, image=self.photo.data, strength=settings.strength)

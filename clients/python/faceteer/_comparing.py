"""Two pictures: what differs between them, and carrying it over.

Knows nothing of how calls are made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faceteer._editing import EditPlan, Outcome
from faceteer._edits import FeatureEdit
from faceteer._effects import Operation
from faceteer._errors import InvalidArgumentError, UnknownFeatureError
from faceteer._html import save_page
from faceteer._library import get_features
from faceteer._methods import DIFF_FEATURES, TRANSFER_FEATURES
from faceteer._opening import Context, OpenedPhoto, call_with_photos
from faceteer._photo_views import difference_view
from faceteer._report import EditReport
from faceteer._tables import text_table
from faceteer.v1 import sae_pb2, studio_pb2


@dataclass(frozen=True)
class FeatureDifference:
    """One feature that differs; activations RAW. ``source`` and ``target`` are 0 where it does not fire."""

    index: int
    label: str
    source: float
    target: float
    change: float

    @property
    def name(self) -> str:
        """Its label, or "#412"."""
        return self.label or f"#{self.index}"


@dataclass(frozen=True)
class Difference:
    """What leads from one picture to another. Iterating gives its edits, so ``photo.edit(difference)`` applies it.

    Attributes:
        features: those that carry the difference, largest contribution first.
        edits: the same as "add" edits in raw units.
        coverage: the share of the difference they carry; less than asked when max_edits was reached.
        differing_features: features that differ at all.
        unexplained: the share of ||target - source||^2 that no feature expresses.
    """

    features: tuple[FeatureDifference, ...]
    edits: tuple[FeatureEdit, ...]
    coverage: float
    differing_features: int
    unexplained: float

    def __iter__(self) -> Iterator[FeatureEdit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{text_table(_HEADER, self.rows(), left=2)}"

    def _repr_html_(self) -> str:
        return difference_view(self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the difference as a page of its own, and returns the path."""
        return save_page(path, "Difference", difference_view(self))

    def summary(self) -> str:
        """One sentence."""
        return (
            f"{len(self.features)} of {self.differing_features} differing features carry {self.coverage:.0%} of the "
            f"difference; {self.unexplained:.0%} of it no feature expresses."
        )

    def rows(self, n: int | None = None) -> list[list[str]]:
        """The table's cells: feature, label, source, target, change (RAW)."""
        return [
            [f"#{d.index}", d.label, f"{d.source:.3f}", f"{d.target:.3f}", f"{d.change:+.3f}"]
            for d in self.features[:n]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "features": [dict(vars(feature)) for feature in self.features],
            "coverage": self.coverage,
            "differing_features": self.differing_features,
            "unexplained": self.unexplained,
        }


_HEADER = ("feature", "label", "source", "target", "change")


def diff(
    context: Context,
    source: OpenedPhoto,
    target: OpenedPhoto,
    *,
    coverage: float,
    max_edits: int | None,
    timeout: float | None,
) -> Operation[Difference]:
    """The smallest set of edits that carries ``coverage`` of the way from source to target, with their labels."""
    _check(coverage, max_edits)
    attempts = context.attempts(timeout, context.timeouts.open)

    def request() -> sae_pb2.DiffFeaturesRequest:
        return sae_pb2.DiffFeaturesRequest(
            source=source.embeds_input(), target=target.embeds_input(), coverage=coverage, max_edits=max_edits or 0
        )

    answer = yield from call_with_photos(context, DIFF_FEATURES, request, [source, target], attempts)
    indices = [edit.feature.index for edit in answer.edits]
    labels = yield from _labels(context, indices, source, target, attempts.remaining)
    edits = tuple(FeatureEdit.from_proto(edit, labels.get(edit.feature.index, "")) for edit in answer.edits)
    features = tuple(
        FeatureDifference(
            index,
            edit.label,
            source=_activation(source, index),
            target=_activation(target, index),
            change=edit.value,
        )
        for index, edit in zip(indices, edits, strict=True)
    )
    return Difference(features, edits, answer.coverage, answer.differing_features, answer.unexplained)


def transfer(
    context: Context,
    target: OpenedPhoto,
    source: OpenedPhoto,
    reference: OpenedPhoto | None,
    *,
    coverage: float,
    max_edits: int | None,
    timeout: float | None,
) -> Operation[EditPlan]:
    """The difference between two pictures as edits of ``target``, with its report."""
    _check(coverage, max_edits)
    attempts = context.attempts(timeout, context.timeouts.open)
    photos = [target, source] if reference is None else [target, source, reference]

    def request() -> studio_pb2.TransferFeaturesRequest:
        return studio_pb2.TransferFeaturesRequest(
            target=target.image_input(),
            source=source.image_input(),
            reference=None if reference is None else reference.image_input(),
            coverage=coverage,
            max_edits=max_edits or 0,
        )

    answer = yield from call_with_photos(context, TRANSFER_FEATURES, request, photos, attempts)
    report = EditReport.from_proto(answer.report, answer.edits, answer.revisions, answer.embedding, None)
    plan = EditPlan.of(target, report.edits)
    return replace(plan, coverage=answer.coverage, outcome=Outcome(report))


def _labels(
    context: Context, indices: list[int], source: OpenedPhoto, target: OpenedPhoto, timeout: float | None
) -> Operation[dict[int, str]]:
    """Labels from the photos' own features, and from the library for those that neither keeps."""
    known = {feature.index: feature.label for photo in (source, target) for feature in photo.features}
    if missing := [index for index in indices if index not in known]:
        known |= yield from _looked_up(context, missing, timeout)
    return known


def _looked_up(context: Context, indices: list[int], timeout: float | None) -> Operation[dict[int, str]]:
    """The library's labels. It knows nothing of features that the operator gates, and refuses a batch with one of them:
    halves are asked for until only those are left, and they stay without a label."""
    try:
        found = yield from get_features(context, indices, timeout=timeout or None)
    except UnknownFeatureError:
        if len(indices) == 1:
            return {}
        half = len(indices) // 2
        first = yield from _looked_up(context, indices[:half], timeout)
        return first | (yield from _looked_up(context, indices[half:], timeout))
    return {feature.index: feature.label for feature in found}


def _activation(photo: OpenedPhoto, index: int) -> float:
    feature = photo.features.find(index)
    return feature.activation if feature is not None else 0.0


def _check(coverage: float, max_edits: int | None) -> None:
    if not 0 < coverage <= 1:
        raise _invalid("coverage", f"{coverage!r} is not a share above 0 and up to 1")
    if max_edits is not None and max_edits < 1:
        raise _invalid("max_edits", f"{max_edits!r} is not positive; leave it out for the server's limit")


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)

"""What differs between two pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from faceteer._models.edits import FeatureEdit
from faceteer._models.shown import Named, Shown
from faceteer._models.tables import text_table
from faceteer.v1 import studio_pb2


@dataclass(frozen=True)
class FeatureDifference(Named):
    """One feature that differs; activations RAW. ``source`` and ``target`` are 0 where it does not fire."""

    index: int
    label: str
    source: float
    target: float
    change: float


@dataclass(frozen=True)
class TransferPart(Named):
    """One part of what a transfer could carry.

    Attributes:
        index: the feature.
        label: empty when it has none.
        share: of the difference; the shares of all features that differ add up to 1.
        taken: whether the edit carries it.
    """

    index: int
    label: str
    share: float
    taken: bool

    @classmethod
    def from_proto(cls, message: studio_pb2.TransferPart) -> TransferPart:
        """From the wire."""
        return cls(message.feature_index, message.label, message.share, message.taken)


@dataclass(frozen=True)
class Difference(Shown):
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

"""The features that fire on an opened picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from faceteer._models.edits import FeatureKey
from faceteer._models.shown import Named, Shown
from faceteer._models.tables import text_table
from faceteer._models.wire import copied
from faceteer.v1 import studio_pb2


@dataclass(frozen=True)
class FiredFeature(Named):
    """One feature that fires on a picture.

    Attributes:
        index: in [0, d_sae).
        label: empty when it has none.
        activation: in the SAE's own units (RAW), > 0.
        scaled: in units of the feature's own 99th percentile where it fires; 0 without statistics.
        firing_share: the share of the corpus on which it fires, 0 to 1.
        label_rank: which of the features with its label it is; the first is the one that the label means.
        label_count: how many features have its label.
    """

    index: int
    label: str
    activation: float
    scaled: float
    firing_share: float
    label_rank: int = 0
    label_count: int = 0

    @classmethod
    def from_proto(cls, message: studio_pb2.NamedFeature) -> FiredFeature:
        """From the wire."""
        return copied(cls, message)

    def __str__(self) -> str:
        return f"{self.name} {self.scaled or self.activation:.2f}"


class FiredFeatures(Shown, Sequence[FiredFeature]):
    """A picture's features, strongest first (by ``scaled`` where there are statistics).

    Positions index it as any sequence (``features[0]`` is the strongest); :meth:`find` looks a feature up by its own
    index or label. ``l0`` counts all that fire, also those beyond the ones kept.
    """

    def __init__(self, features: Iterable[FiredFeature], l0: int) -> None:
        self._features = tuple(features)
        self._by_index = {feature.index: feature for feature in self._features}
        self.l0 = l0

    @property
    def complete(self) -> bool:
        """Whether all features that fire are here; ``open(max_features=...)`` says how many are kept."""
        return len(self._features) >= self.l0

    def top(self, n: int) -> FiredFeatures:
        """The ``n`` strongest; fewer when fewer fire."""
        return self[: max(0, n)]

    def find(self, feature: FeatureKey) -> FiredFeature | None:
        """The feature of this index or label, or None when it does not fire (or is not among those kept)."""
        if not isinstance(feature, str):
            return self._by_index.get(feature)
        wanted = feature.casefold()
        return next((one for one in self._features if one.label.casefold() == wanted), None)

    def activation(self, feature: FeatureKey) -> float:
        """Its activation, RAW; 0 when it does not fire (or is not among those kept)."""
        found = self.find(feature)
        return 0.0 if found is None else found.activation

    @overload
    def __getitem__(self, position: int) -> FiredFeature: ...
    @overload
    def __getitem__(self, position: slice) -> FiredFeatures: ...
    def __getitem__(self, position: int | slice) -> FiredFeature | FiredFeatures:
        if isinstance(position, slice):
            return FiredFeatures(self._features[position], self.l0)
        return self._features[position]

    def __len__(self) -> int:
        return len(self._features)

    def __eq__(self, other: object) -> bool:
        return self._features == other._features if isinstance(other, FiredFeatures) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._features)

    def __repr__(self) -> str:
        return f"<{self.l0} features: {', '.join(map(str, self.top(4)))}{' …' if self.l0 > 4 else ''}>"

    def __str__(self) -> str:
        return text_table(_HEADER, self._rows(20), left=2) + self._rest(20)

    def _rows(self, n: int) -> list[list[str]]:
        return [[f"#{f.index}", f.told_apart, f"{f.activation:.3f}", f"{f.scaled:.2f}"] for f in self.top(n)]

    def _rest(self, n: int) -> str:
        return f"\n… and {self.l0 - n} more" if self.l0 > n else ""

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [dict(vars(feature)) for feature in self._features]


_HEADER = ("index", "label", "activation", "scaled")

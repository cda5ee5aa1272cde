"""How a name led to a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from faceteer._models.wire import word
from faceteer.v1 import edits_pb2

#: The name is the label; one of the feature's other words; means the same as one of these; lies near in meaning; or is
#: part of one of them (in searches only).
MatchKind = Literal["label", "other_word", "synonym", "meaning", "part"]


@dataclass(frozen=True)
class FeatureMatch:
    """How a name led to a feature, and whether another might have been meant.

    Attributes:
        kind: how.
        text: the label or other word that the name met.
        strength: how well, 0 to 1; 1 is the label itself.
        sharing: features that share the feature's label, itself included.
        note: a sentence where the choice is not plain; else empty.
    """

    kind: MatchKind
    text: str
    strength: float
    sharing: int
    note: str

    @classmethod
    def from_proto(cls, message: edits_pb2.FeatureMatch) -> FeatureMatch | None:
        """From the wire; None where the feature was named by index."""
        if message.kind == edits_pb2.MATCH_KIND_UNSPECIFIED:
            return None
        kind: Any = word(edits_pb2.MatchKind, message.kind)
        return cls(kind, message.text, message.strength, message.sharing, message.note)

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.strength:.2f}"

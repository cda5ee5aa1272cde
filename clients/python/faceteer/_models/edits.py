"""One edit of one feature, and chains of them that never change in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from faceteer._errors import invalid
from faceteer._models.values import UINT32_MAX, float32, shortest
from faceteer._models.wire import number, word
from faceteer.v1 import edits_pb2

#: A feature by index or label.
FeatureKey: TypeAlias = int | str
#: What an edit does to its feature's activation.
EditOperation = Literal["set", "add", "scale", "ablate", "switch"]
#: "scaled": 1.0 is the feature's 99th percentile activation where it fires. "raw": the SAE's own units.
Unit = Literal["scaled", "raw"]
OPERATIONS: tuple[str, ...] = get_args(EditOperation)
UNITS: tuple[str, ...] = get_args(Unit)


@dataclass(frozen=True)
class FeatureEdit:
    """One edit, checked.

    Attributes:
        feature: the feature's index or label.
        operation: "set" to ``value``; "add" ``value``; "scale" by ``value``; "ablate" (set to 0); "switch" (set, and
            ablate the feature's rivals).
        value: finite; 0 for "ablate".
        unit: the unit of ``value``; ignored for "scale" and "ablate".
        label: the feature's label when ``feature`` is an index; informative.

    Raises:
        InvalidArgumentError: names the attribute at fault.
    """

    feature: FeatureKey
    operation: EditOperation
    value: float = 0.0
    unit: Unit = "scaled"
    label: str = ""

    def __post_init__(self) -> None:
        # frozen: the checked forms are put in place here, once.
        object.__setattr__(self, "feature", feature_key(self.feature))
        if self.operation not in OPERATIONS:
            raise invalid("operation", f"{self.operation!r} is unknown; one of {', '.join(OPERATIONS)}")
        if self.unit not in UNITS:
            raise invalid("unit", f"{self.unit!r} is unknown; one of {', '.join(UNITS)}")
        object.__setattr__(self, "value", float32("value", self.value))
        if self.operation == "ablate" and self.value:
            raise invalid("value", "ablate takes no value; use set for another activation than 0")

    @classmethod
    def from_proto(cls, message: edits_pb2.Edit, label: str = "") -> FeatureEdit:
        """From the wire."""
        named = message.feature.WhichOneof("feature") == "label"
        operation: Any = word(edits_pb2.EditOperation, message.operation)
        raw = message.unit == edits_pb2.EDIT_UNIT_RAW
        return cls(
            feature=message.feature.label if named else message.feature.index,
            operation=operation,
            value=shortest(message.value),
            unit="raw" if raw else "scaled",
            label=label,
        )

    def to_proto(self) -> edits_pb2.Edit:
        """To the wire."""
        return edits_pb2.Edit(
            feature=feature_ref(self.feature),
            operation=number(edits_pb2.EditOperation, self.operation),
            value=self.value,
            unit=edits_pb2.EDIT_UNIT_RAW if self.unit == "raw" else edits_pb2.EDIT_UNIT_SCALED,
        )

    @property
    def name(self) -> str:
        """The feature for people: its label, or "#412"."""
        if isinstance(self.feature, str):
            return self.feature
        return self.label or f"#{self.feature}"

    def __str__(self) -> str:
        name = self.name
        unit = " raw" if self.unit == "raw" and self.operation in ("set", "add", "switch") else ""
        written = {
            "set": f"set {name} to {self.value:g}{unit}",
            "add": f"add {self.value:g}{unit} to {name}",
            "scale": f"scale {name} by {self.value:g}",
            "ablate": f"ablate {name}",
            "switch": f"switch to {name} at {self.value:g}{unit}",
        }
        return written[self.operation]


def chained(edits: tuple[FeatureEdit, ...], more: Iterable[FeatureEdit]) -> tuple[FeatureEdit, ...]:
    """``edits`` and ``more``; an edit of a feature that is edited already takes the earlier one's place.

    As a slider that moves again. Edits commute and each refers to the unedited picture, so two of one feature would
    contradict each other. (The server does the same where an index and a name mean one feature, and says so.)
    """
    result = list(edits)
    for edit in more:
        same = [at for at, other in enumerate(result) if _same(edit.feature, other.feature)]
        if same:
            result[same[0]] = edit
        else:
            result.append(edit)
    return tuple(result)


def without(edits: tuple[FeatureEdit, ...], feature: FeatureKey) -> tuple[FeatureEdit, ...]:
    """``edits`` less the one of ``feature``, if there is one."""
    key = feature_key(feature)
    return tuple(edit for edit in edits if not (_same(edit.feature, key) or edit.label == key))


def feature_key(feature: FeatureKey) -> FeatureKey:
    """A checked index or label. Raises InvalidArgumentError."""
    if isinstance(feature, str):
        if not feature.strip():
            raise invalid("feature", "an empty label; pass a feature's label or its index")
        return feature
    try:
        index = operator.index(feature)
    except TypeError:
        raise invalid("feature", f"{feature!r} is neither an index nor a label") from None
    if isinstance(feature, bool) or not 0 <= index <= UINT32_MAX:
        raise invalid("feature", f"{feature!r} is not an index; indices are whole numbers from 0")
    return index


def feature_ref(feature: FeatureKey) -> edits_pb2.FeatureRef:
    """An index or label as it travels."""
    key = feature_key(feature)
    return edits_pb2.FeatureRef(label=key) if isinstance(key, str) else edits_pb2.FeatureRef(index=key)


def _same(a: FeatureKey, b: FeatureKey) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.casefold() == b.casefold()
    return a == b

"""Edits of features, and the resulting embedding: ``x' = x + sum (v_i - f_i(x)) d_i``.

The decoder is linear, so re-adding the reconstruction error after decoding the changed features cancels b_dec, the
error and every feature that was not edited (Daujotas 2024): k edits cost k decoder rows, no pass over all features.
Edits commute, because each refers to f(x) of the unedited embedding.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from faceteer_runtime.errors import BatchTooLarge, InvalidField, NotInBundle, UnknownFeature

from faceteer_sae.features import LARGEST_VALUE, cosine
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics


class Operation(IntEnum):
    """What an edit does; the numbers are the contract's EditOperation."""

    SET = 1
    ADD = 2
    SCALE = 3
    ABLATE = 4
    SWITCH = 5


class Unit(IntEnum):
    """The unit of an edit's value; the numbers are the contract's EditUnit (0 there means SCALED)."""

    SCALED = 1
    RAW = 2


# As plain numbers: looking up an enum's member costs more than comparing hundreds of edits with it.
_ADD, _SCALE, _ABLATE, _SWITCH = map(int, (Operation.ADD, Operation.SCALE, Operation.ABLATE, Operation.SWITCH))
_RAW = int(Unit.RAW)
_OPERATIONS, _UNITS = frozenset(map(int, Operation)), frozenset({0, *map(int, Unit)})


class EditColumns(NamedTuple):
    """k edits as they were asked for, column by column.

    Attributes:
        indices: int64 [k], of the features.
        operations: int64 [k], see :class:`Operation`.
        values: float64 [k].
        units: int64 [k], see :class:`Unit`; 0 means SCALED.
    """

    indices: np.ndarray
    operations: np.ndarray
    values: np.ndarray
    units: np.ndarray


class Edits(NamedTuple):
    """k edits, checked, and the rivals that their SWITCHes turn off: m >= k entries, the k named ones first.

    Attributes:
        indices: int64 [m], all different.
        operations: int64 [m], of :class:`Operation`; ABLATE for a rival.
        factors: float32 [m]: requested = factors * before + terms, in RAW units.
        terms: float32 [m].
        rival_of: int64 [m]: the feature whose SWITCH turned this rival off, -1 for a named edit.
    """

    indices: np.ndarray
    operations: np.ndarray
    factors: np.ndarray
    terms: np.ndarray
    rival_of: np.ndarray

    def requested(self, before: np.ndarray) -> np.ndarray:
        """v, float32 [m], from f(x), float32 [m]."""
        requested: np.ndarray = self.factors * before + self.terms
        return requested


class Edited(NamedTuple):
    """What edits did.

    Attributes:
        x: the edited embedding, float32 [d_in].
        before: f_i(x) of the edited features, float32 [m], RAW.
        requested: v_i, float32 [m], RAW.
        delta_norm: ||x' - x||.
        cosine: cos(x, x').
    """

    x: np.ndarray
    before: np.ndarray
    requested: np.ndarray
    delta_norm: float
    cosine: float


class Measured(NamedTuple):
    """How the features changed when the edited embedding was encoded again.

    Attributes:
        achieved: f_i(x') of the edited features, float32 [m], RAW.
        drift: ``||f_rest(x') - f_rest(x)|| / ||f_rest(x)||`` over features not edited; 1 where none of them fired
            before and some do now.
        drifted: int32 [n], the features not edited that moved most, largest move first.
        drifted_before: float32 [n].
        drifted_after: float32 [n].
    """

    achieved: np.ndarray
    drift: float
    drifted: np.ndarray
    drifted_before: np.ndarray
    drifted_after: np.ndarray


def check_edits(columns: EditColumns, *, d_sae: int, statistics: FeatureStatistics | None, max_edits: int) -> Edits:
    """Checks k edits and works out their rivals.

    Args:
        columns: the edits.
        d_sae: number of features.
        statistics: p99 and rivals, or None.
        max_edits: the limit on k.

    Raises:
        BatchTooLarge, InvalidField, UnknownFeature, NotInBundle: the first edit at fault, by its field.
    """
    indices, operations, values, units = columns
    k = len(indices)
    if k > max_edits:
        raise BatchTooLarge("edits", k, max_edits)
    # Sets of plain numbers answer most questions at once; each numpy call costs microseconds, however few the edits.
    kinds, measures = set(operations.tolist()), set(units.tolist())
    _refuse_wrong(columns, kinds, measures, d_sae)
    terms, scaled = values, units != _RAW
    for kind in kinds & {_SCALE, _ABLATE}:
        terms, scaled = np.where(operations == kind, 0.0, terms), scaled & (operations != kind)
    switch = operations == _SWITCH if _SWITCH in kinds else None
    if switch is not None or scaled.any():
        if statistics is None:
            raise _without_statistics(scaled, switch)
        p99 = statistics.p99[indices]
        if not p99.all() and (at := _first(scaled & (p99 == 0) & (values != 0))) is not None:
            raise InvalidField(
                f"edits[{at}].unit",
                f"feature {indices[at]} never fired on the training corpus and has no SCALED unit; use RAW",
            )
        terms = np.where(scaled, terms * p99, terms)
    factors = (operations == _ADD).astype(np.float64) if _ADD in kinds else np.zeros(k)
    if _SCALE in kinds:
        factors = np.where(operations == _SCALE, values, factors)
    if (at := _first(np.maximum(np.abs(terms), np.abs(factors)) > LARGEST_VALUE)) is not None:
        raise InvalidField(f"edits[{at}].value", f"{values[at]:.4g} is far beyond any activation; use a smaller value")
    # Of several edits of one feature the last counts, in the place of the first.
    last = {index: at for at, index in enumerate(indices.tolist())}
    if len(last) < k:
        kept = np.fromiter(last.values(), np.int64, len(last))
        indices, operations, factors, terms = indices[kept], operations[kept], factors[kept], terms[kept]
        switch = switch[kept] if switch is not None else None
    factors, terms = factors.astype(np.float32), terms.astype(np.float32)
    named = Edits(indices, operations, factors, terms, np.full(len(indices), -1))
    if switch is None or statistics is None:
        return named
    rivals, rival_of = _rivals(indices, switch, statistics)
    zeros = np.zeros(len(rivals), np.float32)
    ablated = Edits(rivals, np.full(len(rivals), _ABLATE), zeros, zeros, rival_of)
    return Edits(*map(np.concatenate, zip(named, ablated, strict=True)))


def apply_edits(sae: SparseAutoencoder, x: np.ndarray, edits: Edits, before: np.ndarray) -> Edited:
    """The edited embedding.

    Args:
        sae: for its decoder rows.
        x: float32 [d_in].
        edits: m of them.
        before: f_i(x), float32 [m], of the edited features.

    Raises:
        InvalidField: the edited embedding would be out of all bounds.
    """
    requested = edits.requested(before)
    delta = sae.combine(edits.indices, requested - before)
    edited = x + delta
    if not (np.abs(edited) <= LARGEST_VALUE).all():
        at = int(np.argmax(np.abs(requested - before)))
        raise InvalidField(f"edits[{at}].value", "the edited embedding is too large; use smaller values")
    wide = delta.astype(np.float64)
    return Edited(edited, before, requested, math.sqrt(wide @ wide), cosine(x, edited))


def measure(before: FeatureActivations, after: FeatureActivations, edited: np.ndarray, max_drifted: int) -> Measured:
    """Achieved activations of the edited features [m], and how all others moved, from f(x) and f(x')."""
    union = np.union1d(before.top_indices, after.top_indices)
    rest = union[~np.isin(union, edited)]
    f, f_new = before.at(rest), after.at(rest)
    moved = np.abs(f_new - f)
    length, change = float(np.linalg.norm(f)), float(np.linalg.norm(moved))
    drift = change / length if length > 0 else float(change > 0)
    order = np.argsort(-moved, kind="stable")[:max_drifted]
    order = order[moved[order] > 0]
    return Measured(after.at(edited), drift, rest[order].astype(np.int32), f[order], f_new[order])


def _refuse_wrong(columns: EditColumns, kinds: set[int], measures: set[int], d_sae: int) -> None:
    """Raises on the first edit at fault; ``kinds`` and ``measures`` are all operations and all units that occur."""
    indices, operations, values, units = columns
    named = set(indices.tolist())
    if named and not (indices.min() >= 0 and indices.max() < d_sae):
        at = _first((indices < 0) | (indices >= d_sae))
        field = f"edits[{at}].feature"
        raise UnknownFeature(f"{field}: no feature {indices[at]}; indices are below {d_sae}").at(field)
    if not kinds <= _OPERATIONS:
        at = _first((operations < 1) | (operations > _SWITCH))
        raise InvalidField(f"edits[{at}].operation", "must be SET, ADD, SCALE, ABLATE or SWITCH")
    if not measures <= _UNITS:
        at = _first((units < 0) | (units > _RAW))
        raise InvalidField(f"edits[{at}].unit", "must be SCALED or RAW")
    # A sum is finite when all it adds is: float32 values cannot overflow float64.
    if not math.isfinite(values.sum()):
        at = _first(~np.isfinite(values))
        raise InvalidField(f"edits[{at}].value", f"must be finite, not {values[at]}")
    if _ABLATE in kinds and (at := _first((operations == _ABLATE) & (values != 0))) is not None:
        raise InvalidField(f"edits[{at}].value", "ABLATE sets the activation to 0; leave value out, or use SET")


def activations(
    edits: Edits, edited: Edited, measured: Measured | None, statistics: FeatureStatistics | None
) -> dict[str, np.ndarray]:
    """What the report says of each edit, float32 [m]: before, requested and, if measured, achieved, each in RAW and, as
    ``<name>_scaled``, in SCALED units (0 without statistics)."""
    raw = {"before": edited.before, "requested": edited.requested}
    if measured is not None:
        raw["achieved"] = measured.achieved
    if statistics is None:
        none = np.zeros(len(edits.indices), np.float32)
        return raw | dict.fromkeys((f"{name}_scaled" for name in raw), none)
    return raw | {f"{name}_scaled": statistics.scaled(edits.indices, values) for name, values in raw.items()}


def _without_statistics(scaled: np.ndarray, switch: np.ndarray | None) -> NotInBundle:
    if switch is not None:
        why = f"edits[{_first(switch)}]: SWITCH needs feature statistics; this bundle has none"
    else:
        why = f"edits[{_first(scaled)}]: SCALED needs feature statistics, which this bundle lacks; use RAW"
    return NotInBundle("feature_statistics", why)


def _rivals(indices: np.ndarray, switch: np.ndarray, statistics: FeatureStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Rivals to ablate, each once, and whose they are (the first SWITCH's). One edited by name keeps its own edit."""
    found: dict[int, int] = {}
    named = set(indices.tolist())
    for index in indices[switch].tolist():
        for rival in statistics.rivals(index).tolist():
            if rival not in named:
                found.setdefault(rival, index)
    return np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.int64)


def _first(mask: np.ndarray) -> int | None:
    return int(np.argmax(mask)) if mask.any() else None

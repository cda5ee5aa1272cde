"""What a person should know about edits: what they ask for, what stands in their way, and how much came of them.

Features stand in the sentences as "#24", and by index beside them: whoever knows labels can put them in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from faceteer_sae.edits import EditColumns, Edited, Edits, Measured, Operation
from faceteer_sae.features import InputWarning
from faceteer_sae.model import FeatureActivations
from faceteer_sae.statistics import FeatureStatistics

_FAR = 4.0
"""A requested activation of more than this many times p99, or of less than 0, is worth a warning."""
_ACHIEVED = 0.3
"""Of the change asked for; less than this is worth a warning."""
_SMALL = 0.1
"""In units of p99: a change that was asked for, or a rival's activation, that is too small to speak of."""
_STRONG = 0.5
"""In units of p99: a feature set to less may be meant to stand beside its rivals."""
_NAMED = 5


def edit_warnings(
    columns: EditColumns,
    edits: Edits,
    edited: Edited,
    statistics: FeatureStatistics | None,
    measured: Measured | None = None,
    after: FeatureActivations | None = None,
) -> list[InputWarning]:
    """All warnings about edits.

    Args:
        columns: as they were asked for.
        edits: as they counted.
        edited: what they did.
        statistics: for rivals and units; without them much goes unsaid.
        measured: what was achieved; with ``after``, the features of the edited embedding, where it was measured.
        after: see ``measured``.
    """
    named = edits.rival_of < 0
    indices, operations = edits.indices[named], edits.operations[named]
    before, requested = edited.before[named], edited.requested[named]
    p99 = statistics.p99[indices] if statistics is not None else np.zeros(len(indices), np.float32)
    raised = requested > np.maximum(before, _SMALL * p99)
    found = _replaced(columns.indices) + _out_of_range(edits, edited, statistics)
    if statistics is not None and raised.any():
        found += _conflicts(indices[raised], statistics)
    if measured is not None and after is not None:
        achieved = measured.achieved[named]
        if statistics is not None:
            strong = raised & (operations == Operation.SET) & (requested >= _STRONG * p99)
            found += _rivals_on(indices[strong], edits.indices, after, statistics)
        found += _not_achieved(indices, before, requested, achieved, _SMALL * p99)
    return found


def _replaced(indices: np.ndarray) -> list[InputWarning]:
    if len(set(indices.tolist())) == len(indices):
        return []
    values, counts = np.unique(indices, return_counts=True)
    twice = values[counts > 1].tolist()
    return [_warning("EDIT_REPLACED", f"{_names(twice)} edited more than once; the last edit counts", twice)]


def _out_of_range(edits: Edits, edited: Edited, statistics: FeatureStatistics | None) -> list[InputWarning]:
    beyond = edited.requested < 0
    if statistics is not None:
        p99 = statistics.p99[edits.indices]
        beyond |= (p99 > 0) & (edited.requested > _FAR * p99)
    far = edits.indices[beyond].tolist()
    if not far:
        return []
    message = (
        f"{_names(far)} asked for less than 0 or more than {_FAR:g} times the usual maximum (99th percentile); the "
        "embedding may be unlike any picture's"
    )
    return [_warning("EDIT_OUT_OF_RANGE", message, far)]


def _conflicts(raised: np.ndarray, statistics: FeatureStatistics) -> list[InputWarning]:
    rivals, owners = _rivals_of(raised, statistics)
    both = np.isin(rivals, raised)
    pairs = sorted({(min(pair), max(pair)) for pair in zip(owners[both].tolist(), rivals[both].tolist(), strict=True)})
    if not pairs:
        return []
    shown = ", ".join(f"#{one} with #{other}" for one, other in pairs[:_NAMED])
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    message = (
        f"{shown}{more}: these features hardly ever fire together, so turning both up asks for what no picture shows; "
        "leave one of them out"
    )
    return [_warning("EDITS_CONFLICT", message, sorted({index for pair in pairs for index in pair}))]


def _rivals_on(
    indices: np.ndarray, edited: np.ndarray, after: FeatureActivations, statistics: FeatureStatistics
) -> list[InputWarning]:
    rivals, owners = _rivals_of(indices, statistics)
    scaled = statistics.scaled(rivals, after.at(rivals))
    on = (scaled >= _SMALL) & ~np.isin(rivals, edited)
    found = []
    for index in indices.tolist():
        where = np.flatnonzero(on & (owners == index))
        where = where[np.argsort(-scaled[where])][:_NAMED]
        if len(where):
            names = ", ".join(f"#{rivals[at]} (at {scaled[at]:.2f})" for at in where)
            message = (
                f"#{index} was set, but what hardly ever occurs together with it is still on: {names}. The picture may "
                "show that instead; use switch, which turns rivals off"
            )
            found.append(_warning("RIVALS_ON", message, [index, *rivals[where].tolist()]))
    return found


def _not_achieved(
    indices: np.ndarray, before: np.ndarray, requested: np.ndarray, achieved: np.ndarray, small: np.ndarray
) -> list[InputWarning]:
    # No activation is below 0.
    asked = np.maximum(requested, 0.0) - before
    share = np.divide(achieved - before, asked, out=np.ones(len(asked), np.float64), where=np.abs(asked) > small)
    found = []
    for at in np.flatnonzero(share < _ACHIEVED)[:_NAMED].tolist():
        message = (
            f"#{indices[at]} achieved {max(0.0, share[at]):.2f} of the change asked for, so the picture will hardly "
            "show it; try switch, or another feature for the same thing"
        )
        found.append(InputWarning("EDIT_NOT_ACHIEVED", message, float(share[at]), _ACHIEVED, (int(indices[at]),)))
    return found


def _rivals_of(indices: np.ndarray, statistics: FeatureStatistics) -> tuple[np.ndarray, np.ndarray]:
    """(rivals, whose they are), int64 each, of all these features, one after the other."""
    offsets = statistics.rivals_offsets
    starts, counts = offsets[indices], offsets[indices + 1] - offsets[indices]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rivals = statistics.rivals_indices[np.repeat(starts, counts) + within].astype(np.int64)
    return rivals, np.repeat(indices, counts)


def _names(indices: Sequence[int]) -> str:
    names = ", ".join(f"#{index}" for index in indices[:_NAMED])
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return f"{names}{more} {'was' if len(indices) == 1 else 'were'}"


def _warning(code: str, message: str, indices: Iterable[int]) -> InputWarning:
    return InputWarning(code, message, feature_indices=tuple(indices))

"""The labels closest to a mistyped one.

Knows nothing of features.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable

_CANDIDATES, _LEAST = 50, 0.5


def nearest_labels(label: str, labels: Iterable[str], count: int = 5) -> list[str]:
    """At most ``count`` of ``labels``, closest first; none that is far from ``label``.

    Shared pairs of letters choose the candidates, since difflib alone would take seconds over 163,840 labels.
    """
    wanted = label.strip().lower()
    pairs = _pairs(wanted)

    def overlap(other: str) -> float:
        others = _pairs(other.lower())
        return 2 * len(pairs & others) / (len(pairs) + len(others))

    matcher = difflib.SequenceMatcher(a="", b=wanted, autojunk=False)
    scored = []
    for candidate in heapq.nlargest(_CANDIDATES, set(labels), key=overlap):
        matcher.set_seq1(candidate.lower())
        # A label that holds the wanted word whole is near however long it is.
        ratio = max(matcher.ratio(), 0.9 if wanted and wanted in candidate.lower() else 0.0)
        if ratio >= _LEAST:
            scored.append((-ratio, candidate))
    return [candidate for _, candidate in sorted(scored)[:count]]


def _pairs(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[at : at + 2] for at in range(len(padded) - 1)}

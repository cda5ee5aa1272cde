"""The texts closest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

# A slip of the keyboard in a word of five letters leaves a ratio of 0.8; "water" and "white" have 0.6.
_CANDIDATES, _LEAST = 50, 0.72
# Separates the letters of two texts: no text contains it.
_BETWEEN = 0


class SpellingIndex:
    """Texts by the pairs of letters they hold, so that 50,000 of them are compared in a millisecond.

    Shared pairs choose the candidates, since difflib alone would take seconds over that many.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        padded = [f" {text.lower()} " for text in texts]
        lengths = np.fromiter((len(text) + 1 for text in padded), np.int64, len(padded))
        letters = np.frombuffer("".join(f"{text}\0" for text in padded).encode("utf-32-le"), "<u4").astype(np.int64)
        owners = np.repeat(np.arange(len(texts)), lengths)
        pairs = (letters[:-1] << 21) | letters[1:]
        within = (letters[:-1] != _BETWEEN) & (letters[1:] != _BETWEEN)
        codes, found = np.unique(pairs[within], return_inverse=True)
        # Each pair once a text.
        each = np.unique(found.astype(np.int64) * max(len(texts), 1) + owners[:-1][within])
        self._codes = codes
        self._owners = (each % max(len(texts), 1)).astype(np.int32)
        self._starts = np.searchsorted(each // max(len(texts), 1), np.arange(len(codes) + 1))
        self._counts = np.bincount(self._owners, minlength=len(texts))

    def nearest(self, text: str, allowed: np.ndarray | None = None, count: int = 5) -> list[str]:
        """At most ``count`` texts, closest first; none that is far from ``text``.

        Args:
            text: as typed.
            allowed: bool [texts], which may be named; None for all.
        """
        wanted = text.strip().lower()
        padded = np.frombuffer(f" {wanted} ".encode("utf-32-le"), "<u4").astype(np.int64)
        pairs = np.unique((padded[:-1] << 21) | padded[1:])
        places = np.searchsorted(self._codes, pairs)
        known = [int(place) for place, pair in zip(places, pairs, strict=True)
                 if place < len(self._codes) and self._codes[place] == pair]  # fmt: skip
        if not known:
            return []
        owners = np.concatenate([self._owners[self._starts[place] : self._starts[place + 1]] for place in known])
        shared = np.bincount(owners, minlength=len(self._texts))
        overlap = 2 * shared / (len(pairs) + self._counts)
        if allowed is not None:
            overlap[~allowed] = 0
        candidates = np.argsort(-overlap, kind="stable")[:_CANDIDATES] if len(overlap) <= 4096 else _top(overlap)
        matcher = difflib.SequenceMatcher(a="", b=wanted, autojunk=False)
        scored = []
        for candidate in (self._texts[at] for at in candidates if overlap[at] > 0):
            matcher.set_seq1(candidate.lower())
            # A text that holds the wanted word whole is near however long it is.
            ratio = max(matcher.ratio(), 0.9 if len(wanted) > 2 and wanted in candidate.lower() else 0.0)
            if ratio >= _LEAST:
                scored.append((-ratio, candidate))
        return [candidate for _, candidate in sorted(scored)[:count]]


def _top(overlap: np.ndarray) -> np.ndarray:
    return np.argpartition(-overlap, _CANDIDATES)[:_CANDIDATES]

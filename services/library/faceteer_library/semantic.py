"""Which texts of a catalogue the embeddings of labels belong to."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from faceteer_library.label_embeddings import LabelEmbeddings
from faceteer_library.texts import Texts
from faceteer_library.words import fold


class SemanticIndex:
    """Which texts of a catalogue the rows of :class:`LabelEmbeddings` belong to.

    Args:
        embeddings: the library's.
        labels: of each row.
        texts: the library's own texts.
    """

    def __init__(self, embeddings: LabelEmbeddings, labels: Sequence[str], texts: Texts) -> None:
        self._embeddings = embeddings
        self._rows = {fold(label): row for row, label in enumerate(labels)}
        self._own = [(row, number) for row, label in enumerate(labels) for number in texts.same(label)]
        self._n_own = len(texts)
        self._index(self._own)

    def with_person_labels(self, texts: Texts | None) -> SemanticIndex:
        """The same with people's own texts: one that is another label but for its case means what that one means."""
        rows = (
            [(self._rows.get(fold(text)), self._n_own + number) for number, text in enumerate(texts.texts)]
            if texts
            else []
        )
        extra = [(row, number) for row, number in rows if row is not None]
        if not extra:
            return self
        changed = copy.copy(self)
        changed._index(sorted(self._own + extra))
        return changed

    def _index(self, pairs: Sequence[tuple[int, int]]) -> None:
        rows = np.fromiter((row for row, _ in pairs), np.int64, len(pairs))
        self._numbers = np.fromiter((number for _, number in pairs), np.int64, len(pairs))
        self._starts = np.searchsorted(rows, np.arange(len(self._embeddings) + 1))

    def closest(self, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(texts' numbers, their centred cosines): the labels close in meaning, closest first."""
        rows, cosines = self._embeddings.closest(query)
        numbers = [self._numbers[self._starts[row] : self._starts[row + 1]] for row in rows]
        each = np.repeat(cosines, [len(one) for one in numbers])
        return np.concatenate(numbers) if numbers else np.empty(0, np.int64), each

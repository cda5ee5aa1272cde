"""Features by words and by meaning: finds texts, fuses the two rankings, and scores features by their label's text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from faceteer_library.catalogue import Catalogue
from faceteer_library.label_embeddings import LabelEmbeddings
from faceteer_library.texts import Texts, fold

_FUSION = 60.0
"""Reciprocal rank fusion, the sum of 1 / (60 + rank) over the rankings: Cormack, Clarke, Büttcher 2009."""
# A feature found by one of its other words ranks behind those found by their label.
_TERM_RANKS = 20


class Found(NamedTuple):
    """Features, best first.

    Attributes:
        places: int64 [k], places in the catalogue.
        scores: float64 [k], higher is better.
        total: how many there are on all pages.
    """

    places: np.ndarray
    scores: np.ndarray
    total: int


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

    def ranks(self, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(texts' numbers, their ranks from 1): the labels close in meaning, those of one row with one rank."""
        rows = self._embeddings.closest(query).rows
        numbers = [self._numbers[self._starts[row] : self._starts[row + 1]] for row in rows]
        ranks = np.repeat(np.arange(1, len(rows) + 1), [len(each) for each in numbers])
        return np.concatenate(numbers) if numbers else np.empty(0, np.int64), ranks


def search(
    catalogue: Catalogue,
    words: str,
    query: np.ndarray | None,
    semantic: SemanticIndex | None,
    kept: np.ndarray | None,
    offset: int,
    size: int,
) -> Found:
    """The features whose label, or other words, hold all words, and those whose label means the same.

    The label that is the words comes first, then the fused rank; within a label the better predicting feature, then the
    more often firing. The total counts every feature found by words, and those of at most 500 labels found by meaning.

    Args:
        words: the last one may be incomplete.
        query: float32 [d], the embedding of the words; None for words alone.
        semantic: None where the library has no embeddings of labels.
        kept: bool [n], which features may be found; None for all.
    """
    by_words = catalogue.gather(lambda texts: texts.matching(words))
    lexical = 1.0 / (_FUSION + catalogue.lengths[by_words])
    of_text = np.zeros(catalogue.n_texts)
    of_text[by_words] = lexical
    if query is not None and semantic is not None:
        numbers, ranks = semantic.ranks(query)
        of_text[numbers] += 1.0 / (_FUSION + ranks)
    of_text[catalogue.gather(lambda texts: texts.same(words))] += 1.0
    of_text[0] = 0.0
    scores = of_text[catalogue.labels]
    if len(by_words) and len(catalogue.terms.numbers):
        of_term = np.zeros(catalogue.n_texts)
        of_term[by_words] = 1.0 / (_FUSION + _TERM_RANKS + catalogue.lengths[by_words])
        scores = np.maximum(scores, _best_of(catalogue, of_term))
    return best(catalogue, scores, kept, offset, size)


def best(catalogue: Catalogue, scores: np.ndarray, kept: np.ndarray | None, offset: int, size: int) -> Found:
    """A page of the features with a score above zero; equal ones by detection score, then firing share, then index."""
    found = np.flatnonzero(scores > 0 if kept is None else (scores > 0) & kept)
    # Far less than the difference between any two ranks.
    keys = scores[found] + 1e-9 * catalogue.quality[found]
    end = offset + size
    if len(found) > end:
        top = np.argpartition(-keys, end)[:end]
        order = top[np.argsort(-keys[top])][offset:]
    else:
        order = np.argsort(-keys)[offset:]
    places = found[order]
    return Found(places, scores[places], len(found))


def _best_of(catalogue: Catalogue, of_term: np.ndarray) -> np.ndarray:
    """The best score among each feature's other words, float64 [n]; none where a person named the feature."""
    scores = np.zeros(len(catalogue))
    described = catalogue.described
    texts = np.flatnonzero(of_term[: len(described.offsets) - 1])
    starts, ends = described.offsets[texts], described.offsets[texts + 1]
    counts = ends - starts
    # The places that all these texts describe, one after the other.
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places = described.numbers[np.repeat(starts, counts) + within]
    np.maximum.at(scores, places, np.repeat(of_term[texts], counts))
    scores[catalogue.renamed] = 0.0
    return scores

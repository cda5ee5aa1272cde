"""Features by words: all that :mod:`faceteer_library.naming` finds, best first, page by page."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from faceteer_library import naming
from faceteer_library.catalogue import Catalogue
from faceteer_library.semantic import SemanticIndex


class Found(NamedTuple):
    """Features, best first.

    Attributes:
        places: int64 [k], places in the catalogue.
        scores: float64 [k], higher is better.
        total: how many there are on all pages.
        meeting: how the words met the library's texts.
    """

    places: np.ndarray
    scores: np.ndarray
    total: int
    meeting: naming.Meeting


def search(
    catalogue: Catalogue,
    words: str,
    query: np.ndarray | None,
    semantic: SemanticIndex | None,
    kept: np.ndarray | None,
    offset: int,
    size: int,
) -> Found:
    """The features that the words name, mean or are part of.

    The total counts every feature found by words, and those of at most 500 labels found by meaning.

    Args:
        words: the last one may be incomplete.
        query: float32 [d], the embedding of the words; None for words alone.
        semantic: None where the library has no embeddings of labels.
        kept: bool [n], which features may be found; None for all.
    """
    meeting = naming.meet(catalogue, words, query, semantic)
    scores = naming.scores(catalogue, meeting)
    found = np.flatnonzero(scores > 0 if kept is None else (scores > 0) & kept)
    # Far less than any two strengths differ by.
    keys = scores[found] + 1e-9 * catalogue.quality[found]
    end = offset + size
    if len(found) > end:
        top = np.argpartition(-keys, end)[:end]
        order = top[np.argsort(-keys[top])][offset:]
    else:
        order = np.argsort(-keys)[offset:]
    places = found[order]
    return Found(places, scores[places], len(found), meeting)

"""Distinct texts (labels and other words) and full-text search over them.

Many features share a label, so searching texts instead of features keeps common words quick.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from faceteer_library.spelling import SpellingIndex


class Texts:
    """Texts by number, with an FTS5 index in memory. Methods may be called from any thread."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._by_fold: dict[str, list[int]] = {}
        for number, text in enumerate(self.texts):
            self._by_fold.setdefault(fold(text), []).append(number)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        # Contentless: the texts themselves are above. Prefix indexes make search-as-you-type quick.
        self._connection.execute(
            """CREATE VIRTUAL TABLE words USING fts5(
            text, content = '', tokenize = 'porter unicode61 remove_diacritics 2', prefix = '1 2 3')"""
        )
        self._connection.executemany(
            "INSERT INTO words (rowid, text) VALUES (?, ?)", ((n, text) for n, text in enumerate(self.texts) if text)
        )
        self._connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        self._connection.commit()
        self.lengths = np.fromiter((len(re.findall(r"\w+", text)) for text in self.texts), np.int32, len(self.texts))
        """Words in each text, int32 [texts]."""

    def __len__(self) -> int:
        return len(self.texts)

    def same(self, text: str) -> list[int]:
        """The texts that are ``text`` without regard to case and to how accents are written."""
        return self._by_fold.get(fold(text), [])

    def matching(self, words: str) -> np.ndarray:
        """Numbers of the texts that hold all words, the last of which may be incomplete; int64, ascending."""
        match = match_expression(words)
        if not match:
            return np.empty(0, np.int64)
        with self._lock:
            rows = self._connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (match,)).fetchall()
        return np.fromiter((row for (row,) in rows), np.int64, len(rows))

    @cached_property
    def spelling(self) -> SpellingIndex:
        """For suggestions."""
        return SpellingIndex(self.texts)


def fold(text: str) -> str:
    """A text as it is compared."""
    return unicodedata.normalize("NFC", text).strip().casefold()


def match_expression(words: str) -> str:
    """A full-text query for all of a person's words, the last as a prefix: each quoted, so that none is an operator."""
    found = re.findall(r"\w+", words)
    return " ".join(f'"{word}"' for word in found) + "*" if found else ""

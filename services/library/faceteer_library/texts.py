"""Distinct texts (labels and other words) and full-text search over them.

Many features share a label, so searching texts instead of features keeps common words quick.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from faceteer_library import words as wording
from faceteer_library.spelling import SpellingIndex
from faceteer_library.words import fold

# Chinese and Japanese, written without spaces: full-text search takes a whole run of characters for one word.
_UNSPACED = re.compile("[\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff\\uff66-\\uff9f]")


class Texts:
    """Texts by number, with an FTS5 index in memory. Methods may be called from any thread."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._by_fold: dict[str, list[int]] = {}
        for number, text in enumerate(self.texts):
            self._by_fold.setdefault(fold(text), []).append(number)
        self._by_key: dict[tuple[str, ...], list[int]] = {}
        for number, text in enumerate(self.texts):
            words = wording.split(text)
            for key in set(wording.keys(words)) if words else ():
                self._by_key.setdefault(key, []).append(number)
        self._unspaced = [(number, fold(text)) for number, text in enumerate(self.texts) if _UNSPACED.search(text)]
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
        letters = (max(1, len(re.findall(r"\w", text))) for text in self.texts)
        self.letters = np.fromiter(letters, np.int32, len(self.texts))
        """Letters and digits in each text, int32 [texts]; at least 1."""

    def __len__(self) -> int:
        return len(self.texts)

    def same(self, text: str) -> list[int]:
        """The texts that are ``text`` without regard to case and to how accents are written."""
        return self._by_fold.get(fold(text), [])

    def named(self, words: Sequence[str]) -> list[int]:
        """The texts that are these words, folded, in any form: "snowy" and "snow" are each other's."""
        found: dict[int, None] = {}
        for key in wording.keys(words):
            found |= dict.fromkeys(self._by_key.get(key, ()))
        return list(found)

    def matching(self, words: str) -> np.ndarray:
        """Numbers of the texts that hold all words, the last of which may be incomplete; int64, ascending.

        Words of a script without spaces are found anywhere within a text.
        """
        match = match_expression(words)
        if not match:
            return np.empty(0, np.int64)
        with self._lock:
            rows = self._connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (match,)).fetchall()
        found = {row for (row,) in rows}
        if self._unspaced and _UNSPACED.search(words):
            parts = fold(words).split()
            found |= {number for number, text in self._unspaced if all(part in text for part in parts)}
        return np.array(sorted(found), np.int64)

    @cached_property
    def spelling(self) -> SpellingIndex:
        """For suggestions."""
        return SpellingIndex(self.texts)


def match_expression(words: str) -> str:
    """A full-text query for all of a person's words, the last as a prefix: each quoted, so that none is an operator."""
    found = re.findall(r"\w+", words)
    return " ".join(f'"{word}"' for word in found) + "*" if found else ""

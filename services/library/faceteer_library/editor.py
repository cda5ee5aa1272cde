"""Changes what jobs found out later in a library that is there already: labels, scores, icons, safety classes.

Knows nothing of how they were found. Works on a copy and puts it in place, whole, at the end; people's labels lie in a
file of their own, which no job touches.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from faceteer_library.schema import SELECTIONS, VERSION, require_fts5
from faceteer_library.writer import LABEL_SOURCES, ExampleRow


class Described(NamedTuple):
    """A feature as the library has it now."""

    index: int
    label: str
    label_source: str
    terms: tuple[str, ...]
    firing_share: float
    p99: float
    max: float
    detection_score: float | None
    detection_balanced_accuracy: float | None
    causal_score: float | None
    safety_class: str


class LibraryEditor:
    """A library file under change, as a ``with`` block: kept when the block ends well, else as if nothing had been.

    Raises:
        ValueError: no library of this version there, or a value that contradicts itself.
        RuntimeError: Python's SQLite has no FTS5.
    """

    def __init__(self, path: Path | str) -> None:
        require_fts5()
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"{self._path}: no library there; make one with build-library")
        descriptor, name = tempfile.mkstemp(prefix=self._path.name, suffix=".part", dir=self._path.parent)
        os.close(descriptor)
        self._part = Path(name)
        try:
            shutil.copyfile(self._path, self._part)
            self._connection = sqlite3.connect(self._part)
            self._connection.executescript("PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;")
            self.facts: dict[str, str] = dict(self._connection.execute("SELECT key, value FROM meta"))
        except (OSError, sqlite3.DatabaseError) as error:
            self._part.unlink(missing_ok=True)
            raise ValueError(f"{self._path}: not a feature library that can be changed ({error})") from None
        if self.facts.get("version") != str(VERSION):
            self._connection.close()
            self._part.unlink()
            raise ValueError(
                f"{self._path}: library version {self.facts.get('version')}, not {VERSION}; make it anew with"
                " build-library"
            )

    def features(self) -> Iterator[Described]:
        """Every feature, by index."""
        query = """SELECT feature, label, label_source, terms, firing_share, p99, max, detection_score,
            detection_balanced_accuracy, causal_score, safety_class FROM features ORDER BY feature"""
        for row in self._connection.execute(query).fetchall():
            yield Described(*row[:3], tuple(json.loads(row[3])), *row[4:])

    def examples(self, index: int, selection: str = "strongest") -> list[ExampleRow]:
        """A feature's examples, strongest first."""
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, not {selection!r}")
        query = """SELECT picture, activation, webp, caption, quantile_from, quantile_to FROM examples
            JOIN thumbnails ON sha256 = thumbnail WHERE feature = ? AND selection = ? ORDER BY rank"""
        rows = self._connection.execute(query, (index, selection))
        return [ExampleRow(*row[:4], quantiles=(row[4], row[5])) for row in rows]

    def icon_of(self, index: int) -> tuple[bytes, list[float]] | None:
        """A feature's icon and the SCALED strengths in it, or None."""
        row = self._connection.execute("SELECT webp, strengths FROM icons WHERE feature = ?", (index,)).fetchone()
        return None if row is None else (row[0], np.frombuffer(row[1], "<f4").tolist())

    def icon_keys(self) -> dict[int, str]:
        """The content address of every icon that is there, by feature."""
        return dict(self._connection.execute("SELECT feature, key FROM icons"))

    def label(
        self,
        index: int,
        label: str,
        *,
        source: str = "automatic",
        terms: Sequence[str] = (),
        detection_score: float | None = None,
        detection_balanced_accuracy: float | None = None,
        causal_score: float | None = None,
    ) -> None:
        """Gives a feature a label and its scores; an empty label takes label and scores away.

        Scores belong to a label: with a new text those that are None become unknown, with the same text they stay.
        """
        if source not in LABEL_SOURCES:
            raise ValueError(f"label source must be one of {LABEL_SOURCES}, not {source!r}")
        found = self._connection.execute("SELECT label FROM features WHERE feature = ?", (index,)).fetchone()
        if found is None:
            raise ValueError(f"there is no feature {index} in {self._path}")
        if found[0] != label:
            self._connection.execute(
                """UPDATE features SET detection_score = NULL, detection_balanced_accuracy = NULL, causal_score = NULL
                WHERE feature = ?""",
                (index,),
            )
        self._connection.execute(
            """UPDATE features SET label = ?, label_source = ?, terms = ?,
            detection_score = COALESCE(?, detection_score),
            detection_balanced_accuracy = COALESCE(?, detection_balanced_accuracy),
            causal_score = COALESCE(?, causal_score) WHERE feature = ?""",
            (
                label,
                source if label else "",
                json.dumps(list(terms) if label else [], ensure_ascii=False),
                detection_score,
                detection_balanced_accuracy,
                causal_score,
                index,
            ),
        )
        self._connection.execute("DELETE FROM words WHERE rowid = ?", (index,))
        if label:
            self._connection.execute("INSERT INTO words (rowid, label) VALUES (?, ?)", (index, label))

    def detection(self, index: int, auc: float | None, balanced_accuracy: float | None) -> None:
        """Records how well a feature's label predicts where it fires; None for not measured."""
        self._connection.execute(
            "UPDATE features SET detection_score = ?, detection_balanced_accuracy = ? WHERE feature = ?",
            (auc, balanced_accuracy, index),
        )

    def causal_score(self, index: int, score: float | None) -> None:
        """Records how much more what a feature causes looks like its label."""
        self._connection.execute("UPDATE features SET causal_score = ? WHERE feature = ?", (score, index))

    def safety_class(self, index: int, name: str) -> None:
        """Puts a feature into a class that the operator may gate; empty takes it out."""
        self._connection.execute("UPDATE features SET safety_class = ? WHERE feature = ?", (name, index))

    def meaning(self, label: str, embeds: np.ndarray) -> None:
        """Adds the CLIP text embedding [d] of a label; stored with norm 1, as float16."""
        packed = (embeds / np.linalg.norm(embeds)).astype("<f2").tobytes()
        self._connection.execute("INSERT OR REPLACE INTO meanings VALUES (?, ?)", (label, packed))

    def forget_meanings(self) -> None:
        """Takes all labels' text embeddings away."""
        self._connection.execute("DELETE FROM meanings")

    def icon(self, index: int, webp: bytes, strengths: Sequence[float], key: str) -> None:
        """Adds or replaces a feature's icon, the SCALED strengths in it, left to right, and its content address."""
        packed = np.asarray(strengths, "<f4").tobytes()
        self._connection.execute("INSERT OR REPLACE INTO icons VALUES (?, ?, ?, ?)", (index, webp, packed, key))

    def meta(self, key: str, value: str) -> None:
        """Adds or replaces a fact about the library as a whole."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        self.facts[key] = value

    def save(self) -> None:
        """Puts what was done so far in place, whole, and goes on: a long job that is stopped later keeps it."""
        self._connection.commit()
        draft = self._part.with_suffix(".whole")
        try:
            shutil.copyfile(self._part, draft)
            draft.chmod(0o644)
            os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)

    def discard(self) -> None:
        """Gives everything up that was not saved, as a block that fails does."""
        self.__exit__(RuntimeError, None, None)

    def __enter__(self) -> LibraryEditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with closing(self._connection):
                if kind is None:
                    self._connection.execute("INSERT INTO words (words) VALUES ('optimize')")
                    self._connection.commit()
            if kind is None:
                self._part.chmod(0o644)  # mkstemp's own mode is for its maker alone
                os.replace(self._part, self._path)
        finally:
            self._part.unlink(missing_ok=True)

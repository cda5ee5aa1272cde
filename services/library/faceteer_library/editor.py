"""Changes an existing library: the labels, scores, icons and safety classes that later jobs find."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faceteer_library.schema import CAUSAL_JUDGES, LABEL_SOURCES, SELECTIONS, UPGRADE_2, VERSION
from faceteer_library.writer import ExampleRow, LibraryDraft


@dataclass(frozen=True, slots=True)
class Described:
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
    causal_judge: str
    safety_class: str


class LibraryEditor(LibraryDraft):
    """A library file under change, as a ``with`` block: kept when the block ends without an error, else as it was.

    A library of version 2 is one of today's from then on.

    Raises:
        ValueError: no library of this version there, or a value that contradicts itself.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        if not self._path.is_file():
            raise ValueError(f"{self._path}: no library there; make one with build-library")
        try:
            with closing(sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True)) as source:
                source.backup(self._connection)
            self.facts |= self._connection.execute("SELECT key, value FROM meta")
        except sqlite3.DatabaseError as error:
            self.discard()
            raise ValueError(f"{self._path}: not a feature library that can be changed ({error})") from None
        if self.facts.get("version") == "2":
            self._connection.executescript(UPGRADE_2)
            self.facts["version"] = str(VERSION)
        if self.facts.get("version") != str(VERSION):
            self.discard()
            raise ValueError(
                f"{self._path}: library version {self.facts.get('version')}, not {VERSION}; build it again with"
                " build-library"
            )
        # Full-text tables that earlier writers made and nothing reads.
        self._connection.execute("DROP TABLE IF EXISTS words")

    def features(self) -> Iterator[Described]:
        """Every feature, by index."""
        query = """SELECT feature, label, label_source, terms, firing_share, p99, max, detection_score,
            detection_balanced_accuracy, causal_score, causal_judge, safety_class FROM features ORDER BY feature"""
        for row in self._connection.execute(query).fetchall():
            index, label, source, terms, *figures = row
            yield Described(index, label, source, tuple(json.loads(terms)), *figures)

    def examples(self, index: int, selection: str = "strongest") -> list[ExampleRow]:
        """A feature's examples, strongest first."""
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, not {selection!r}")
        query = """SELECT picture, activation, webp, caption, quantile_from, quantile_to FROM examples
            JOIN thumbnails ON sha256 = thumbnail WHERE feature = ? AND selection = ? ORDER BY rank"""
        rows = self._connection.execute(query, (index, selection))
        return [
            ExampleRow(picture, activation, webp, caption, (low, high))
            for picture, activation, webp, caption, low, high in rows
        ]

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
                """UPDATE features SET detection_score = NULL, detection_balanced_accuracy = NULL, causal_score = NULL,
                causal_judge = ''
                WHERE feature = ?""",
                (index,),
            )
        self._connection.execute(
            """UPDATE features SET label = ?, label_source = ?, terms = ?,
            detection_score = COALESCE(?, detection_score),
            detection_balanced_accuracy = COALESCE(?, detection_balanced_accuracy),
            causal_judge = CASE WHEN ? IS NULL THEN causal_judge ELSE ? END,
            causal_score = COALESCE(?, causal_score) WHERE feature = ?""",
            (
                label,
                source if label else "",
                json.dumps(list(terms) if label else [], ensure_ascii=False),
                detection_score,
                detection_balanced_accuracy,
                causal_score,
                CAUSAL_JUDGES[0],
                causal_score,
                index,
            ),
        )

    def detection(self, index: int, auc: float | None, balanced_accuracy: float | None) -> None:
        """Records how well a feature's label predicts where it fires; None for not measured."""
        self._connection.execute(
            "UPDATE features SET detection_score = ?, detection_balanced_accuracy = ? WHERE feature = ?",
            (auc, balanced_accuracy, index),
        )

    def causal_score(self, index: int, score: float | None, judge: str = CAUSAL_JUDGES[0]) -> None:
        """Records how well a feature's label says what it causes, and who judged; None for not measured."""
        if judge not in CAUSAL_JUDGES:
            raise ValueError(f"judge must be one of {CAUSAL_JUDGES}, not {judge!r}")
        self._connection.execute(
            "UPDATE features SET causal_score = ?, causal_judge = ? WHERE feature = ?",
            (score, judge if score is not None else "", index),
        )

    def safety_class(self, index: int, name: str) -> None:
        """Puts a feature into a class that the operator may gate; empty takes it out."""
        self._connection.execute("UPDATE features SET safety_class = ? WHERE feature = ?", (name, index))

    def forget_meanings(self) -> None:
        """Takes all labels' text embeddings away."""
        self._connection.execute("DELETE FROM meanings")

"""Reads a library file, with people's labels laid over it.

Knows nothing of gRPC. One connection a thread; the library is opened read-only, and people's labels are attached as
soon as their file exists.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.errors import UnknownFeature

from faceteer_library.nearest import nearest_labels
from faceteer_library.schema import PEOPLE, VERSION, require_fts5

_COLUMNS = """f.feature, COALESCE(p.label, f.label) AS shown,
    CASE WHEN p.label IS NULL THEN f.label_source ELSE 'person' END AS source,
    f.firing_share, f.mean, f.p50, f.p99, f.max, f.detection_score, f.causal_score, f.safety_class"""
_FROM = "FROM features f LEFT JOIN people.labels p ON p.feature = f.feature"


class Row(NamedTuple):
    """One feature as it is shown: a person's label before an automatic one."""

    index: int
    label: str
    source: str
    firing_share: float
    mean: float
    p50: float
    p99: float
    max: float
    detection_score: float | None
    causal_score: float | None
    safety_class: str


class Hit(NamedTuple):
    """A search's find; a higher score is better."""

    row: Row
    score: float


@dataclass
class Filter:
    """SQL conditions over the shown features, joined by AND, and their values."""

    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, condition: str, *values: Any) -> None:
        self.conditions.append(condition)
        self.values += values

    @property
    def where(self) -> str:
        return " AND ".join(self.conditions) or "1"


class Store:
    """A library file. Methods may be called from any thread.

    Raises:
        BundleError: the file is missing, is no library, or is of another version; or people's labels are no such file.
    """

    def __init__(self, path: Path, people: Path) -> None:
        require_fts5()
        self._path, self._people = path, people
        self._local = threading.local()
        if not path.is_file():
            raise BundleError(f"{path}: no such library")
        try:
            self.meta: dict[str, str] = dict(self._read("SELECT key, value FROM meta"))
            self.size = int(self._read("SELECT count(*) FROM features")[0][0])
        except sqlite3.DatabaseError as error:
            raise BundleError(f"{path}: not a feature library ({error})") from None
        if self.meta.get("version") not in ("1", str(VERSION)):
            raise BundleError(f"{path}: library version {self.meta.get('version')} is not known here ({VERSION} is)")
        # Version 1 kept the strongest examples only.
        self._strongest = "" if self.meta["version"] == "1" else "AND selection = 'strongest'"

    def get(self, index: int) -> Row:
        """One feature. Raises UnknownFeature."""
        rows = self._read(f"SELECT {_COLUMNS} {_FROM} WHERE f.feature = ?", index)
        if not rows:
            raise UnknownFeature(f"there is no feature {index}; the library has {self.size}")
        return Row(*rows[0])

    def resolve(self, label: str) -> Row:
        """The feature with this label, without regard to case; the best scored, then the most often firing, of several.

        Raises:
            UnknownFeature: with the nearest labels.
        """
        fold = _fold_function(label)
        rows = self._read(
            f"""SELECT {_COLUMNS} {_FROM} WHERE p.label IS NULL AND {fold}(f.label) = {fold}(?1) AND f.label <> ''
            UNION ALL SELECT {_COLUMNS} FROM people.labels p JOIN features f ON f.feature = p.feature
            WHERE {fold}(p.label) = {fold}(?1)
            ORDER BY f.detection_score DESC, f.firing_share DESC, f.feature LIMIT 1""",
            label.strip(),
        )
        if rows:
            return Row(*rows[0])
        labels = (shown for (shown,) in self._read(f"SELECT DISTINCT COALESCE(p.label, f.label) {_FROM}") if shown)
        raise UnknownFeature(f"no feature is labelled {label[:120]!r}", nearest_labels(label[:120], labels))

    def list(self, chosen: Filter, order: str, offset: int, size: int) -> tuple[list[Row], int]:
        """Features by filter in an ``ORDER BY`` of ours, and how many match in all."""
        query = f"SELECT {_COLUMNS} {_FROM} WHERE {chosen.where} ORDER BY {order} LIMIT ? OFFSET ?"
        rows = [Row(*row) for row in self._read(query, *chosen.values, size, offset)]
        (total,) = self._read(f"SELECT count(*) {_FROM} WHERE {chosen.where}", *chosen.values)[0]
        return rows, total

    def search(self, words: str, chosen: Filter, offset: int, size: int) -> tuple[list[Hit], int]:
        """Features whose label holds all words (the last may be incomplete): exact labels first, then by BM25."""
        match = match_expression(words)
        if not match:
            return [], 0
        hits = f"""WITH hits (feature, score) AS (
            SELECT rowid, -bm25(words) FROM words WHERE words MATCH ?
                AND rowid NOT IN (SELECT feature FROM people.labels)
            UNION ALL SELECT rowid, -bm25(people_words) FROM people.people_words WHERE people_words MATCH ?)
            SELECT {{what}} FROM hits JOIN features f ON f.feature = hits.feature
            LEFT JOIN people.labels p ON p.feature = f.feature WHERE {chosen.where}"""
        fold = _fold_function(words)
        exact = f"({fold}(COALESCE(p.label, f.label)) = {fold}(?))"
        rows = self._read(
            hits.format(what=f"{_COLUMNS}, hits.score, {exact} AS exact")
            + " ORDER BY exact DESC, hits.score DESC, f.firing_share DESC, f.feature LIMIT ? OFFSET ?",
            match,
            match,
            words.strip(),
            *chosen.values,
            size,
            offset,
        )
        (total,) = self._read(hits.format(what="count(*)"), match, match, *chosen.values)[0]
        # BM25 is small; an exact label stays ahead of whatever else it is compared with.
        return [Hit(Row(*row[:-2]), row[-2] + (1000.0 if row[-1] else 0.0)) for row in rows], total

    def similar(self, index: int, chosen: Filter, offset: int, size: int) -> tuple[list[Hit], int]:
        """Features whose decoder directions are nearest to one's, by cosine."""
        query = f"""SELECT {{what}} FROM relatives r JOIN features f ON f.feature = r.other
            LEFT JOIN people.labels p ON p.feature = f.feature
            WHERE r.feature = ? AND r.relation = 'nearest' AND {chosen.where}"""
        rows = self._read(
            query.format(what=f"{_COLUMNS}, r.score") + " ORDER BY r.rank LIMIT ? OFFSET ?",
            index,
            *chosen.values,
            size,
            offset,
        )
        (total,) = self._read(query.format(what="count(*)"), index, *chosen.values)[0]
        return [Hit(Row(*row[:-1]), row[-1]) for row in rows], total

    def histogram(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Upper edges float32 [n] and counts int64 [n]."""
        edges, counts = self._read("SELECT histogram_edges, histogram_counts FROM features WHERE feature = ?", index)[0]
        return np.frombuffer(edges, "<f4"), np.frombuffer(counts, "<i8")

    def relatives(self, index: int, relation: str) -> list[tuple[int, str, float]]:
        """(other, its label, score), best first."""
        return self._read(
            """SELECT r.other, COALESCE(p.label, f.label, ''), r.score FROM relatives r
            LEFT JOIN features f ON f.feature = r.other LEFT JOIN people.labels p ON p.feature = r.other
            WHERE r.feature = ? AND r.relation = ? ORDER BY r.rank""",
            index,
            relation,
        )

    def examples(self, index: int, offset: int, size: int) -> tuple[list[tuple[str, float, bytes, str]], int]:
        """(picture, activation, WebP, caption), strongest first, and how many are kept."""
        rows = self._read(
            f"""SELECT e.picture, e.activation, t.webp, e.caption FROM examples e
            JOIN thumbnails t ON t.sha256 = e.thumbnail WHERE e.feature = ? {self._strongest}
            ORDER BY e.rank LIMIT ? OFFSET ?""",
            index,
            size,
            offset,
        )
        (total,) = self._read(f"SELECT count(*) FROM examples WHERE feature = ? {self._strongest}", index)[0]
        return rows, total

    def icon(self, index: int) -> tuple[bytes, list[float]] | None:
        """(WebP, strengths), or None."""
        rows = self._read("SELECT webp, strengths FROM icons WHERE feature = ?", index)
        return (rows[0][0], np.frombuffer(rows[0][1], "<f4").tolist()) if rows else None

    def _read(self, query: str, *values: Any) -> Sequence[Any]:
        connection = self._connection()
        return connection.execute(query, values).fetchall()

    def _connection(self) -> sqlite3.Connection:
        local = self._local
        connection: sqlite3.Connection | None = getattr(local, "connection", None)
        if connection is None:
            # immutable: the bundle may lie on a read-only disk, where SQLite could not even take a lock.
            connection = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
            connection.create_function("fold", 1, _fold, deterministic=True)
            connection.execute("ATTACH ':memory:' AS people")
            connection.executescript(re.sub(r"(TABLE IF NOT EXISTS) ", r"\1 people.", PEOPLE))
            local.connection, local.people = connection, False
        if not local.people and self._people_ready():
            connection.execute("DETACH people")
            connection.execute("ATTACH ? AS people", (f"{self._people.resolve().as_uri()}?mode=ro",))
            local.people = True
        return connection

    def _people_ready(self) -> bool:
        """Whether the file of people's labels exists and has its tables, the last of which is ``history``."""
        if not self._people.is_file():
            return False
        with closing(sqlite3.connect(f"{self._people.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            try:
                return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'history'").fetchone())
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                raise BundleError(f"{self._people}: not a file of people's labels ({error})") from None


def _fold(text: str | None) -> str | None:
    return None if text is None else unicodedata.normalize("NFC", text).casefold()


def _fold_function(text: str) -> str:
    """SQLite's lower() has an index, but knows only ASCII; for the rest there is ``fold``, which reads every row."""
    return "lower" if text.isascii() else "fold"


def match_expression(words: str) -> str:
    """A full-text query for all of a person's words, the last as a prefix: each quoted, so that none is an operator."""
    found = re.findall(r"\w+", words)
    return " ".join(f'"{word}"' for word in found) + "*" if found else ""

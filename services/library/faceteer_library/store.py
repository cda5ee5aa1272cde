"""Reads a library file, with people's labels laid over it.

Knows nothing of gRPC. Names and figures of all features are in memory (:mod:`faceteer_library.catalogue`); histograms,
relatives, examples and icons are read when asked for, one connection a thread, read-only.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.errors import UnknownFeature

from faceteer_library import search
from faceteer_library.catalogue import FIGURES, Catalogue, Row
from faceteer_library.filters import Filter
from faceteer_library.gate import EVERYTHING, Sight
from faceteer_library.meanings import Meanings
from faceteer_library.nearest import NearTexts
from faceteer_library.schema import SELECTIONS, VERSION, require_fts5

__all__ = ["Example", "Facts", "Filter", "Hit", "Row", "Sight", "Store"]


class Hit(NamedTuple):
    """A search's find; a higher score is better."""

    row: Row
    score: float


class Example(NamedTuple):
    """A picture on which a feature fires: name, RAW activation, WebP, caption, the quantiles it was drawn between."""

    picture: str
    activation: float
    thumbnail: bytes
    caption: str
    quantile_from: float = 0.0
    quantile_to: float = 0.0


class Facts(NamedTuple):
    """What a library covers, as far as a call sees it."""

    n_features: int
    n_alive: int
    n_labelled: int
    safety_classes: tuple[str, ...]


class _Shown(NamedTuple):
    catalogue: Catalogue
    meant: search.MeantLabels | None


class Store:
    """A library file. Methods may be called from any thread.

    ``sight`` says what the call may see; features beyond it are as if they were not there.

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
        except sqlite3.DatabaseError as error:
            raise BundleError(f"{path}: not a feature library ({error})") from None
        if self.meta.get("version") not in ("1", str(VERSION)):
            raise BundleError(f"{path}: library version {self.meta.get('version')} is not known here ({VERSION} is)")
        self._first = self.meta["version"] == "1"
        try:
            self._own = Catalogue.read(self._read(self._features_query()))
            self._meanings, labels = self._read_meanings()
        except (sqlite3.DatabaseError, ValueError) as error:
            raise BundleError(f"{path}: a damaged feature library ({error})") from None
        meanings, own = self._meanings, self._own.texts[0]
        self._meant = search.MeantLabels(meanings, labels, own) if meanings is not None else None
        self.size = len(self._own)
        self._lock = threading.Lock()
        self._people_connection: sqlite3.Connection | None = None
        self._people_version = -1
        self._shown = self._show({})
        self._current()

    def warm_up(self) -> None:
        """Finds what is found once: the orders of lists and searches, and the index of near labels."""
        self.list(Filter(), "label", 0, 1)
        self.search("a", Filter(), 0, 1)
        self._own.texts[0].near.nearest("a")

    @property
    def searches_meaning(self) -> bool:
        """Whether labels' meanings are known."""
        return self._meanings is not None

    @property
    def embed_dim(self) -> int:
        """d of the meanings; 0 without any."""
        return self._meanings.dim if self._meanings is not None else 0

    def facts(self, sight: Sight = EVERYTHING) -> Facts:
        """Counts of what is there, and the safety classes that occur."""
        catalogue = self._current().catalogue
        seen = catalogue.seen(sight)
        seen = np.ones(len(catalogue), bool) if seen is None else seen
        alive, labelled = catalogue.figures["firing_share"] > 0, catalogue.labels != 0
        classes = [name for name in catalogue.class_names if name and sight.sees(name)]
        return Facts(int(seen.sum()), int((alive & seen).sum()), int((labelled & seen).sum()), tuple(sorted(classes)))

    def get(self, index: int, sight: Sight = EVERYTHING) -> Row:
        """One feature. Raises UnknownFeature."""
        catalogue = self._current().catalogue
        place = catalogue.place(index)
        if place is None or not catalogue.sees(sight, place):
            raise UnknownFeature(f"there is no feature {index} in this library")
        return catalogue.row(place)

    def resolve(self, label: str, sight: Sight = EVERYTHING) -> Row:
        """The feature with this label, without regard to case; the best scored, then the most often firing, of several.

        Raises:
            UnknownFeature: with the nearest labels.
        """
        catalogue = self._current().catalogue
        seen = catalogue.seen(sight)
        numbers = catalogue.gather(lambda texts: texts.same(label))
        scores = np.isin(catalogue.labels, numbers[numbers > 0]).astype(np.float64)
        found = search.best(catalogue, scores, seen, 0, 1)
        if found.total:
            return catalogue.row(int(found.places[0]))
        in_use = np.zeros(catalogue.n_texts, bool)
        in_use[catalogue.labels if seen is None else catalogue.labels[seen]] = True
        in_use[0] = False
        near: list[str] = []
        base = 0
        for texts in catalogue.texts:
            near += texts.near.nearest(label[:120], in_use[base : base + len(texts)])
            base += len(texts)
        if len(catalogue.texts) > 1:
            near = NearTexts(near).nearest(label[:120])
        raise UnknownFeature(f"no feature is labelled {label[:120]!r}", near)

    def list(
        self, chosen: Filter, order: str, offset: int, size: int, sight: Sight = EVERYTHING
    ) -> tuple[list[Row], int]:
        """Features by filter in an order of :data:`faceteer_library.catalogue.ORDERS`, and how many match in all."""
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(sight))
        places = catalogue.order(order)
        if kept is not None:
            places = places[kept[places]]
        return [catalogue.row(int(place)) for place in places[offset : offset + size]], len(places)

    def search(
        self,
        words: str,
        chosen: Filter,
        offset: int,
        size: int,
        embeds: np.ndarray | None = None,
        sight: Sight = EVERYTHING,
    ) -> tuple[list[Hit], int]:
        """Features by words of labels and, with the words' embedding float32 [d], by meaning: :func:`search.search`."""
        catalogue, meant = self._current()
        kept = _both(chosen.mask(catalogue), catalogue.seen(sight))
        return _hits(catalogue, search.search(catalogue, words, embeds, meant, kept, offset, size))

    def similar(
        self, index: int, chosen: Filter, offset: int, size: int, sight: Sight = EVERYTHING
    ) -> tuple[list[Hit], int]:
        """Features whose decoder directions are nearest to one's, by cosine."""
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(sight))
        related = self._related(index, "nearest")
        places = [(catalogue.place(other), score) for other, score in related]
        hits = [(place, score) for place, score in places if place is not None and (kept is None or kept[place])]
        return [Hit(catalogue.row(place), score) for place, score in hits[offset : offset + size]], len(hits)

    def firing(
        self,
        indices: np.ndarray,
        activations: np.ndarray,
        chosen: Filter,
        offset: int,
        size: int,
        sight: Sight = EVERYTHING,
    ) -> tuple[list[Hit], int]:
        """The features of one picture, by activation / p99; those without a p99, never seen on the corpus, last.

        Args:
            indices: int64 [k], each at most once; what the library does not know is left out.
            activations: float32 [k], RAW; only those above zero count.
        """
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(sight))
        places = np.searchsorted(catalogue.indices, indices)
        inside = places < len(catalogue)
        inside[inside] = catalogue.indices[places[inside]] == indices[inside]
        inside &= activations > 0
        places, activations = places[inside], activations[inside].astype(np.float64)
        if kept is not None:
            places, activations = places[kept[places]], activations[kept[places]]
        p99 = catalogue.figures["p99"][places]
        scores = np.divide(activations, p99, out=np.zeros(len(places)), where=p99 > 0)
        order = np.lexsort((places, -activations, -scores))[offset : offset + size]
        return [Hit(catalogue.row(int(places[at])), float(scores[at])) for at in order], len(places)

    def histogram(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Upper edges float32 [n] and counts int64 [n]."""
        edges, counts = self._read("SELECT histogram_edges, histogram_counts FROM features WHERE feature = ?", index)[0]
        return np.frombuffer(edges, "<f4"), np.frombuffer(counts, "<i8")

    def relatives(self, index: int, relation: str, sight: Sight = EVERYTHING) -> Sequence[tuple[int, str, float]]:
        """(other, its label, score), best first."""
        catalogue = self._current().catalogue
        found = []
        for other, score in self._related(index, relation):
            place = catalogue.place(other)
            if place is None:
                found.append((other, "", score))
            elif catalogue.sees(sight, place):
                found.append((other, catalogue.text(int(catalogue.labels[place])), score))
        return found

    def examples(
        self, index: int, offset: int, size: int, selection: str = SELECTIONS[0]
    ) -> tuple[Sequence[Example], int]:
        """Examples of one selection in their order, strongest first, and how many are kept."""
        if self._first:
            # Version 1 kept the strongest only.
            if selection != SELECTIONS[0]:
                return [], 0
            columns, condition, values = "0.0, 0.0", "e.feature = ?", (index,)
        else:
            columns, condition = "e.quantile_from, e.quantile_to", "e.feature = ? AND e.selection = ?"
            values = (index, selection)  # type: ignore[assignment]
        rows = self._read(
            f"""SELECT e.picture, e.activation, t.webp, e.caption, {columns} FROM examples e
            JOIN thumbnails t ON t.sha256 = e.thumbnail WHERE {condition} ORDER BY e.rank LIMIT ? OFFSET ?""",
            *values,
            size,
            offset,
        )
        (total,) = self._read(f"SELECT count(*) FROM examples e WHERE {condition}", *values)[0]
        return [Example(*row) for row in rows], total

    def icon(self, index: int) -> tuple[bytes, list[float]] | None:
        """(WebP, strengths), or None."""
        rows = self._read("SELECT webp, strengths FROM icons WHERE feature = ?", index)
        return (rows[0][0], np.frombuffer(rows[0][1], "<f4").tolist()) if rows else None

    def _related(self, index: int, relation: str) -> Sequence[tuple[int, float]]:
        query = "SELECT other, score FROM relatives WHERE feature = ? AND relation = ? ORDER BY rank"
        return self._read(query, index, relation)

    def _features_query(self) -> str:
        missing = {"detection_balanced_accuracy": "NULL"} if self._first else {}
        figures = ", ".join(missing.get(name, name) for name in FIGURES)
        terms = "'[]'" if self._first else "terms"
        return f"SELECT feature, label, label_source, safety_class, {terms}, {figures} FROM features ORDER BY feature"

    def _read_meanings(self) -> tuple[Meanings | None, list[str]]:
        rows = [] if self._first else self._read("SELECT label, embeds FROM meanings")
        if not rows:
            return None, []
        embeds = np.frombuffer(b"".join(embeds for _, embeds in rows), "<f2").reshape(len(rows), -1)
        return Meanings(embeds), [label for label, _ in rows]

    def _show(self, people: dict[int, str]) -> _Shown:
        if not people:
            return _Shown(self._own, self._meant)
        catalogue = self._own.with_people(people)
        extra = catalogue.texts[1] if len(catalogue.texts) > 1 else None
        return _Shown(catalogue, self._meant.with_people(extra) if self._meant is not None else None)

    def _current(self) -> _Shown:
        """What is shown now: made anew when a person's label has changed, in this process or in another."""
        with self._lock:
            if self._people_connection is None:
                if not self._people_ready():
                    return self._shown
                uri = f"{self._people.resolve().as_uri()}?mode=ro"
                self._people_connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            (version,) = self._people_connection.execute("PRAGMA data_version").fetchone()
            if version != self._people_version:
                rows = self._people_connection.execute("SELECT feature, label FROM labels ORDER BY feature").fetchall()
                self._shown, self._people_version = self._show(dict(rows)), version
            return self._shown

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

    def _read(self, query: str, *values: Any) -> Sequence[Any]:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # immutable: the bundle may lie on a read-only disk, where SQLite could not even take a lock.
            uri = f"{self._path.resolve().as_uri()}?mode=ro&immutable=1"
            connection = self._local.connection = sqlite3.connect(uri, uri=True)
        return connection.execute(query, values).fetchall()


def _both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _hits(catalogue: Catalogue, found: search.Found) -> tuple[list[Hit], int]:
    hits = [
        Hit(catalogue.row(int(place)), float(score)) for place, score in zip(found.places, found.scores, strict=True)
    ]
    return hits, found.total

"""Reads a library file, with people's labels laid over it.

Names and figures of all features are in memory (:mod:`faceteer_library.catalogue`); histograms,
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

from faceteer_library import naming, search
from faceteer_library.access import EVERYTHING, Visibility
from faceteer_library.catalogue import FIGURES, Catalogue, Row
from faceteer_library.filters import Filter
from faceteer_library.label_embeddings import LabelEmbeddings
from faceteer_library.naming import Kind, Match
from faceteer_library.schema import SELECTIONS, VERSION, causal_columns, require_fts5
from faceteer_library.semantic import SemanticIndex
from faceteer_library.spelling import SpellingIndex


class Hit(NamedTuple):
    """A search's find; a higher score is better. ``match`` is empty for a search that is not by words."""

    row: Row
    score: float
    match: Match = Match()


class Resolved(NamedTuple):
    """The feature that a name means, and how it was found."""

    row: Row
    match: Match


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


class _Snapshot(NamedTuple):
    catalogue: Catalogue
    semantic: SemanticIndex | None


class Store:
    """A library file. Methods may be called from any thread.

    ``visible`` says what the call may see; features beyond it are as if they were not there.

    Raises:
        BundleError: the file is missing, is no library, or is of another version; or people's labels are no such file.
    """

    def __init__(self, path: Path, person_labels: Path) -> None:
        require_fts5()
        self._path, self._labels_path = path, person_labels
        self._local = threading.local()
        if not path.is_file():
            raise BundleError(f"{path}: no such library")
        try:
            self.meta: dict[str, str] = dict(self._read("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            raise BundleError(f"{path}: not a feature library ({error})") from None
        if self.meta.get("version") not in ("1", "2", str(VERSION)):
            raise BundleError(f"{path}: library version {self.meta.get('version')} is not known here ({VERSION} is)")
        self._version_1 = self.meta["version"] == "1"
        try:
            self._own = Catalogue.read(self._read(self._features_query()))
            self._embeddings, labels = self._read_embeddings()
        except (sqlite3.DatabaseError, ValueError) as error:
            raise BundleError(f"{path}: a damaged feature library ({error})") from None
        embeddings, own = self._embeddings, self._own.texts[0]
        self._semantic = SemanticIndex(embeddings, labels, own) if embeddings is not None else None
        self.size = len(self._own)
        self._lock = threading.Lock()
        self._labels_connection: sqlite3.Connection | None = None
        self._labels_version = -1
        self._snapshot = self._show({})
        self._current()

    def warm_up(self) -> None:
        """Finds what is found once: the orders of lists and searches, and the index of near labels."""
        self.list(Filter(), "label", 0, 1)
        self.search("a", Filter(), 0, 1)
        self._own.texts[0].spelling.nearest("a")

    @property
    def searches_meaning(self) -> bool:
        """Whether labels' meanings are known."""
        return self._embeddings is not None

    @property
    def embed_dim(self) -> int:
        """d of the meanings; 0 without any."""
        return self._embeddings.dim if self._embeddings is not None else 0

    def facts(self, visible: Visibility = EVERYTHING) -> Facts:
        """Counts of what is there, and the safety classes that occur."""
        catalogue = self._current().catalogue
        seen = catalogue.seen(visible)
        seen = np.ones(len(catalogue), bool) if seen is None else seen
        alive, labelled = catalogue.figures["firing_share"] > 0, catalogue.labels != 0
        classes = [name for name in catalogue.class_names if name and visible.sees(name)]
        return Facts(int(seen.sum()), int((alive & seen).sum()), int((labelled & seen).sum()), tuple(sorted(classes)))

    def get(self, index: int, visible: Visibility = EVERYTHING) -> Row:
        """One feature. Raises UnknownFeature."""
        (found,) = self.get_many([index], visible)
        if found is None:
            raise UnknownFeature(f"there is no feature {index} in this library")
        return found.row

    def get_many(self, features: Sequence[int | str], visible: Visibility = EVERYTHING) -> list[Resolved | None]:
        """Features by index or name, all of one moment; None for those that are not there."""
        snapshot = self._current()
        return [
            _named(snapshot, feature, visible)
            if isinstance(feature, str)
            else _indexed(snapshot.catalogue, feature, visible)
            for feature in features
        ]

    def resolve(self, name: str, visible: Visibility = EVERYTHING, *, by_label: bool = False) -> Resolved:
        """The feature that a name means: :mod:`faceteer_library.naming`.

        Args:
            name: its label, another word for it, or a synonym of these.
            visible: what the call may see.
            by_label: take only a feature whose label it is.

        Raises:
            UnknownFeature: with the labels that are nearly spelt so.
        """
        snapshot = self._current()
        found = _named(snapshot, name, visible)
        if found is not None and (found.match.kind == Kind.LABEL or not by_label):
            return found
        raise UnknownFeature(
            f"no feature is called {name[:120]!r}, and none by a word that means the same",
            _nearly_spelt(snapshot.catalogue, name, visible),
        )

    def nearly_spelt(self, words: str, visible: Visibility = EVERYTHING) -> Sequence[str]:
        """At most five labels that differ from the words by a slip of the keyboard, closest first."""
        return _nearly_spelt(self._current().catalogue, words, visible)

    def list(
        self, chosen: Filter, order: str, offset: int, size: int, visible: Visibility = EVERYTHING
    ) -> tuple[Sequence[Row], int]:
        """Features by filter in an order of :data:`faceteer_library.catalogue.ORDERS`, and how many match in all."""
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(visible))
        places = catalogue.order(order)
        if kept is not None:
            places = places[kept[places]]
        return [catalogue.row(int(place), visible) for place in places[offset : offset + size]], len(places)

    def search(
        self,
        words: str,
        chosen: Filter,
        offset: int,
        size: int,
        embeds: np.ndarray | None = None,
        visible: Visibility = EVERYTHING,
    ) -> tuple[Sequence[Hit], int]:
        """Features by words of labels and, with the words' embedding float32 [d], by meaning: :func:`search.search`."""
        catalogue, semantic = self._current()
        kept = _both(chosen.mask(catalogue), catalogue.seen(visible))
        found = search.search(catalogue, words, embeds, semantic, kept, offset, size)
        hits = []
        for place, score in zip(found.places.tolist(), found.scores.tolist(), strict=True):
            row = catalogue.row(place, visible)
            hits.append(Hit(row, score, naming.match(catalogue, found.meeting, words, place, row.label_count)))
        return hits, found.total

    def similar(
        self, index: int, chosen: Filter, offset: int, size: int, visible: Visibility = EVERYTHING
    ) -> tuple[Sequence[Hit], int]:
        """Features whose decoder directions are nearest to one's, by cosine."""
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(visible))
        related = self._related(index, "nearest")
        places = [(catalogue.place(other), score) for other, score in related]
        hits = [(place, score) for place, score in places if place is not None and (kept is None or kept[place])]
        return [Hit(catalogue.row(place, visible), score) for place, score in hits[offset : offset + size]], len(hits)

    def firing(
        self,
        indices: np.ndarray,
        activations: np.ndarray,
        chosen: Filter,
        offset: int,
        size: int,
        visible: Visibility = EVERYTHING,
    ) -> tuple[Sequence[Hit], int]:
        """The features of one picture, by activation / p99; those without a p99, never seen on the corpus, last.

        Args:
            indices: int64 [k], each at most once; what the library does not know is left out.
            activations: float32 [k], RAW; only those above zero count.
        """
        catalogue = self._current().catalogue
        kept = _both(chosen.mask(catalogue), catalogue.seen(visible))
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
        return [Hit(catalogue.row(int(places[at]), visible), float(scores[at])) for at in order], len(places)

    def histogram(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Upper edges float32 [n] and counts int64 [n]."""
        edges, counts = self._read("SELECT histogram_edges, histogram_counts FROM features WHERE feature = ?", index)[0]
        return np.frombuffer(edges, "<f4"), np.frombuffer(counts, "<i8")

    def relatives(
        self, index: int, relation: str, visible: Visibility = EVERYTHING
    ) -> Sequence[tuple[int, str, float]]:
        """(other, its label, score), best first."""
        catalogue = self._current().catalogue
        found = []
        for other, score in self._related(index, relation):
            place = catalogue.place(other)
            if place is None:
                found.append((other, "", score))
            elif catalogue.sees(visible, place):
                found.append((other, catalogue.text(int(catalogue.labels[place])), score))
        return found

    def examples(
        self, index: int, offset: int, size: int, selection: str = SELECTIONS[0]
    ) -> tuple[Sequence[Example], int]:
        """Examples of one selection in their order, strongest first, and how many are kept."""
        if self._version_1:
            # Version 1 kept the strongest only.
            columns, condition = "0.0, 0.0", "e.feature = ?1 AND ?2 = 'strongest'"
        else:
            columns, condition = "e.quantile_from, e.quantile_to", "e.feature = ?1 AND e.selection = ?2"
        rows = self._read(
            f"""SELECT e.picture, e.activation, t.webp, e.caption, {columns} FROM examples e
            JOIN thumbnails t ON t.sha256 = e.thumbnail WHERE {condition} ORDER BY e.rank LIMIT ?3 OFFSET ?4""",
            index,
            selection,
            size,
            offset,
        )
        (total,) = self._read(f"SELECT count(*) FROM examples e WHERE {condition}", index, selection)[0]
        return [Example(*row) for row in rows], total

    def icon(self, index: int) -> tuple[bytes, Sequence[float]] | None:
        """(WebP, strengths), or None."""
        rows = self._read("SELECT webp, strengths FROM icons WHERE feature = ?", index)
        return (rows[0][0], np.frombuffer(rows[0][1], "<f4").tolist()) if rows else None

    def _related(self, index: int, relation: str) -> Sequence[tuple[int, float]]:
        query = "SELECT other, score FROM relatives WHERE feature = ? AND relation = ? ORDER BY rank"
        return self._read(query, index, relation)

    def _features_query(self) -> str:
        score, judge = causal_columns(self.meta["version"])
        instead = {"causal_score": score}
        if self._version_1:
            instead["detection_balanced_accuracy"] = "NULL"
        figures = ", ".join(instead.get(name, name) for name in FIGURES)
        terms = "'[]'" if self._version_1 else "terms"
        return f"""SELECT feature, label, label_source, safety_class, {terms}, {judge}, {figures} FROM features
            ORDER BY feature"""

    def _read_embeddings(self) -> tuple[LabelEmbeddings | None, Sequence[str]]:
        rows = [] if self._version_1 else self._read("SELECT label, embeds FROM meanings")
        if not rows:
            return None, []
        embeds = np.frombuffer(b"".join(embeds for _, embeds in rows), "<f2").reshape(len(rows), -1)
        return LabelEmbeddings(embeds), [label for label, _ in rows]

    def _show(self, given: dict[int, str]) -> _Snapshot:
        if not given:
            return _Snapshot(self._own, self._semantic)
        catalogue = self._own.with_person_labels(given)
        extra = catalogue.texts[1] if len(catalogue.texts) > 1 else None
        return _Snapshot(catalogue, self._semantic.with_person_labels(extra) if self._semantic is not None else None)

    def _current(self) -> _Snapshot:
        """What is shown now: rebuilt when a person's label has changed, in this process or in another."""
        with self._lock:
            if self._labels_connection is None:
                if not self._labels_ready():
                    return self._snapshot
                uri = f"{self._labels_path.resolve().as_uri()}?mode=ro"
                self._labels_connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            (version,) = self._labels_connection.execute("PRAGMA data_version").fetchone()
            if version != self._labels_version:
                rows = self._labels_connection.execute("SELECT feature, label FROM labels ORDER BY feature").fetchall()
                self._snapshot, self._labels_version = self._show(dict(rows)), version
            return self._snapshot

    def _labels_ready(self) -> bool:
        """Whether the file of people's labels exists and has its tables, the last of which is ``history``."""
        if not self._labels_path.is_file():
            return False
        with closing(sqlite3.connect(f"{self._labels_path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            try:
                return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'history'").fetchone())
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                raise BundleError(f"{self._labels_path}: not a file of people's labels ({error})") from None

    def _read(self, query: str, *values: Any) -> Sequence[Any]:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # immutable: the bundle may lie on a read-only disk, where SQLite could not even take a lock.
            uri = f"{self._path.resolve().as_uri()}?mode=ro&immutable=1"
            connection = self._local.connection = sqlite3.connect(uri, uri=True)
        return connection.execute(query, values).fetchall()


def _indexed(catalogue: Catalogue, index: int, visible: Visibility) -> Resolved | None:
    place = catalogue.place(index)
    if place is None or not catalogue.sees(visible, place):
        return None
    return Resolved(catalogue.row(place, visible), Match())


def _named(snapshot: _Snapshot, name: str, visible: Visibility) -> Resolved | None:
    """What a name means; never a feature that merely holds its words."""
    catalogue = snapshot.catalogue
    meeting = naming.meet(catalogue, name, None, None, whole=True)
    scores = naming.scores(catalogue, meeting)
    seen = catalogue.seen(visible)
    if seen is not None:
        scores[~seen] = 0.0
    best = np.flatnonzero((scores > 0) & (scores == scores.max(initial=0.0)))
    if not len(best):
        return None
    place = int(best[np.argmax(catalogue.quality[best])])
    row = catalogue.row(place, visible)
    return Resolved(row, naming.match(catalogue, meeting, name, place, row.label_count))


def _nearly_spelt(catalogue: Catalogue, words: str, visible: Visibility) -> list[str]:
    seen = catalogue.seen(visible)
    in_use = np.zeros(catalogue.n_texts, bool)
    in_use[catalogue.labels if seen is None else catalogue.labels[seen]] = True
    in_use[0] = False
    near: list[str] = []
    base = 0
    for texts in catalogue.texts:
        near += texts.spelling.nearest(words[:120], in_use[base : base + len(texts)])
        base += len(texts)
    return SpellingIndex(near).nearest(words[:120]) if len(catalogue.texts) > 1 else near


def _both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    both: np.ndarray = first & second
    return both

"""Writes a library: features, statistics, examples, relatives, icons. Used by offline jobs.

People's labels live in a file of their own, which no writer touches.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from faceteer_runtime.files import whole_file

from faceteer_library.schema import CAUSAL_JUDGES, LABEL_SOURCES, LIBRARY, RELATIONS, SELECTIONS, VERSION


@dataclass(frozen=True)
class FeatureRow:
    """One feature. Activations are RAW, over the corpus' pictures on which the feature fires.

    Attributes:
        index: in [0, d_sae).
        label: empty when there is none.
        firing_share: the share of pictures on which it fires, 0 to 1.
        mean, p50, p99, max: of the activation where it fires; 0 for a dead feature.
        histogram_edges: upper edges of the bins, float32 [n].
        histogram_counts: pictures in each bin, int64 [n].
        label_source: "automatic" or "model".
        detection_score, causal_score, detection_balanced_accuracy: see library.proto; None for not measured.
        causal_judge: who measured causal_score, one of :data:`faceteer_library.schema.CAUSAL_JUDGES`; ignored without.
        safety_class: empty for none.
        terms: other words that describe it, best first.
    """

    index: int
    label: str
    firing_share: float
    mean: float
    p50: float
    p99: float
    max: float
    histogram_edges: np.ndarray
    histogram_counts: np.ndarray
    label_source: str = "automatic"
    detection_score: float | None = None
    causal_score: float | None = None
    safety_class: str = ""
    detection_balanced_accuracy: float | None = None
    terms: tuple[str, ...] = ()
    causal_judge: str = CAUSAL_JUDGES[0]


@dataclass(frozen=True)
class ExampleRow:
    """A picture on which a feature fires: its name in the corpus, RAW activation, small WebP, caption.

    ``quantiles``: between which quantiles of the activation it was drawn at random, 0 to 1; (0, 0) for the strongest.
    """

    picture: str
    activation: float
    thumbnail: bytes
    caption: str = ""
    quantiles: tuple[float, float] = (0.0, 0.0)


class LibraryDraft:
    """A library under construction, as a ``with`` block: put at ``path``, whole, when the block ends without an error.

    The draft is an unnamed database among SQLite's temporary files (in SQLITE_TMPDIR), so a killed job leaves nothing
    behind, and two jobs on one library do not write into each other's.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._connection = sqlite3.connect("")
        self._connection.execute("PRAGMA journal_mode = OFF")
        self.facts: dict[str, str] = {}

    def icon(self, index: int, webp: bytes, strengths: Sequence[float], key: str = "") -> None:
        """Adds or replaces a feature's icon, the SCALED strengths in it, left to right, and its content address."""
        packed = np.asarray(strengths, "<f4").tobytes()
        self._connection.execute("INSERT OR REPLACE INTO icons VALUES (?, ?, ?, ?)", (index, webp, packed, key))

    def meaning(self, label: str, embeds: np.ndarray) -> None:
        """Adds the CLIP text embedding [d] of a label; stored with norm 1, as float16."""
        packed = (embeds / np.linalg.norm(embeds)).astype("<f2").tobytes()
        self._connection.execute("INSERT OR REPLACE INTO meanings VALUES (?, ?)", (label, packed))

    def meta(self, key: str, value: str) -> None:
        """Adds or replaces a fact about the library as a whole."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        self.facts[key] = value

    def save(self) -> None:
        """Publishes what was done so far, complete, and continues: a long job that is stopped later keeps it."""
        self._connection.commit()
        with whole_file(self._path) as part:
            part.unlink(missing_ok=True)  # VACUUM INTO makes the file itself
            self._connection.execute("VACUUM INTO ?", (str(part),))

    def discard(self) -> None:
        """Gives up everything that was not saved, as a block that fails does."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.save()
        finally:
            self._connection.close()


class LibraryWriter(LibraryDraft):
    """Builds a library and puts it in place, whole, when its ``with`` block ends without an error.

    Args:
        path: the library file; replaced if it exists.
        sae_revision: of the SAE whose features these are.
        corpus: a name for the pictures.
        n_pictures: how many there were.
        encoder_revision, embed_dim: of the encoder whose embeddings the SAE takes.

    Raises:
        ValueError: a row that contradicts itself (an unknown relation, label source or judge, histogram lengths
            that differ).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        sae_revision: str,
        corpus: str,
        n_pictures: int,
        encoder_revision: str = "",
        embed_dim: int = 0,
    ) -> None:
        super().__init__(path)
        self._connection.executescript(LIBRARY)
        facts = {
            "version": str(VERSION),
            "sae_revision": sae_revision,
            "corpus": corpus,
            "n_pictures": str(n_pictures),
            "encoder_revision": encoder_revision,
            "embed_dim": str(embed_dim),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for key, value in facts.items():
            self.meta(key, value)

    def feature(self, row: FeatureRow) -> None:
        """Adds one feature; each index once."""
        if row.label_source not in LABEL_SOURCES:
            raise ValueError(f"label_source must be one of {LABEL_SOURCES}, not {row.label_source!r}")
        if row.causal_judge not in CAUSAL_JUDGES:
            raise ValueError(f"causal_judge must be one of {CAUSAL_JUDGES}, not {row.causal_judge!r}")
        if len(row.histogram_edges) != len(row.histogram_counts):
            raise ValueError(f"feature {row.index}: histogram edges and counts differ in length")
        self._connection.execute(
            f"INSERT INTO features VALUES ({', '.join('?' * 16)})",
            (
                row.index,
                row.label,
                row.label_source if row.label else "",
                row.firing_share,
                row.mean,
                row.p50,
                row.p99,
                row.max,
                np.asarray(row.histogram_edges, "<f4").tobytes(),
                np.asarray(row.histogram_counts, "<i8").tobytes(),
                row.detection_score,
                row.detection_balanced_accuracy,
                row.causal_score,
                row.causal_judge if row.causal_score is not None else "",
                row.safety_class,
                json.dumps(row.terms, ensure_ascii=False),
            ),
        )

    def examples(self, index: int, rows: Sequence[ExampleRow], selection: str = "strongest") -> None:
        """Adds a feature's examples, strongest first. A thumbnail that many features share is stored once."""
        for rank, row in enumerate(rows):
            self.example(index, selection, rank, row)

    def example(self, index: int, selection: str, rank: int, row: ExampleRow) -> None:
        """Adds one example at its rank, 0 being the first; in any order."""
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, not {selection!r}")
        digest = hashlib.sha256(row.thumbnail).digest()
        self._connection.execute("INSERT OR IGNORE INTO thumbnails VALUES (?, ?)", (digest, row.thumbnail))
        self._connection.execute(
            "INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (index, selection, rank, row.picture, row.activation, row.caption, *row.quantiles, digest),
        )

    def relatives(self, index: int, relation: str, others: Iterable[tuple[int, float]]) -> None:
        """Adds features related to ``index``, best first: (other, score) as described in library.proto."""
        if relation not in RELATIONS:
            raise ValueError(f"relation must be one of {RELATIONS}, not {relation!r}")
        self._connection.executemany(
            "INSERT INTO relatives VALUES (?, ?, ?, ?, ?)",
            ((index, relation, rank, other, score) for rank, (other, score) in enumerate(others)),
        )

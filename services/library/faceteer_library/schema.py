"""The tables of a library file and of a file of people's labels."""

from __future__ import annotations

import sqlite3
from contextlib import closing

VERSION = 3
LABEL_SOURCES = ("automatic", "model")
# Who looked at an icon: the text tower that gave the label too, or a classifier that had no part in it.
CAUSAL_JUDGES = ("text_tower", "classifier")
SELECTIONS = ("strongest", "quantiles")
RELATIONS = ("coactivating", "rivals", "nearest")

LIBRARY = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE features (
    feature INTEGER PRIMARY KEY,
    label TEXT NOT NULL,
    label_source TEXT NOT NULL,
    firing_share REAL NOT NULL,
    mean REAL NOT NULL, p50 REAL NOT NULL, p99 REAL NOT NULL, max REAL NOT NULL,
    histogram_edges BLOB NOT NULL,   -- float32, little-endian
    histogram_counts BLOB NOT NULL,  -- int64, little-endian
    detection_score REAL,
    detection_balanced_accuracy REAL,
    causal_score REAL,
    causal_judge TEXT NOT NULL DEFAULT '',  -- empty without a causal score
    safety_class TEXT NOT NULL,
    terms TEXT NOT NULL DEFAULT '[]'  -- other words that describe it, best first: a JSON list
);
-- With row ids: WITHOUT ROWID keeps little of a row in the b-tree itself, and each picture would take a page more.
CREATE TABLE thumbnails (sha256 BLOB PRIMARY KEY, webp BLOB NOT NULL);
CREATE TABLE examples (
    feature INTEGER NOT NULL, selection TEXT NOT NULL, rank INTEGER NOT NULL,
    picture TEXT NOT NULL, activation REAL NOT NULL, caption TEXT NOT NULL,
    quantile_from REAL NOT NULL, quantile_to REAL NOT NULL,
    thumbnail BLOB NOT NULL REFERENCES thumbnails,
    PRIMARY KEY (feature, selection, rank)
) WITHOUT ROWID;
CREATE TABLE relatives (
    feature INTEGER NOT NULL, relation TEXT NOT NULL, rank INTEGER NOT NULL,
    other INTEGER NOT NULL, score REAL NOT NULL,
    PRIMARY KEY (feature, relation, rank)
) WITHOUT ROWID;
CREATE TABLE icons (
    feature INTEGER PRIMARY KEY, webp BLOB NOT NULL, strengths BLOB NOT NULL, key TEXT NOT NULL  -- content address
);
-- The CLIP text embedding of each label that a job gave: float16 [d], L2-normalised.
CREATE TABLE meanings (label TEXT PRIMARY KEY, embeds BLOB NOT NULL);
"""

PERSON_LABELS = """
CREATE TABLE IF NOT EXISTS labels (
    feature INTEGER PRIMARY KEY,
    label TEXT NOT NULL,
    author TEXT NOT NULL,
    at TEXT NOT NULL  -- UTC, ISO 8601
);
CREATE TABLE IF NOT EXISTS history (
    feature INTEGER NOT NULL, label TEXT NOT NULL, author TEXT NOT NULL, at TEXT NOT NULL
);
"""


UPGRADE_2 = """
ALTER TABLE features ADD COLUMN causal_judge TEXT NOT NULL DEFAULT '';
-- Version 2 wrote exactly 0.5 where an icon showed no change, which measures nothing.
UPDATE features SET causal_score = NULL WHERE causal_score = 0.5;
UPDATE features SET causal_judge = 'text_tower' WHERE causal_score IS NOT NULL;
UPDATE meta SET value = '3' WHERE key = 'version';
"""
"""From version 2, to be written in version 3; who only reads asks :func:`causal_columns`."""


def causal_columns(version: str) -> tuple[str, str]:
    """SQL for a feature's causal score and its judge in a library of a version, as :data:`UPGRADE_2` makes them."""
    if version == str(VERSION):
        return "causal_score", "causal_judge"
    score = "NULLIF(causal_score, 0.5)"
    return score, f"CASE WHEN {score} IS NULL THEN '' ELSE 'text_tower' END"


def require_fts5() -> None:
    """Raises RuntimeError, in one sentence, where Python's SQLite was built without full-text search."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("CREATE VIRTUAL TABLE probe USING fts5(x)")
        except sqlite3.OperationalError:
            raise RuntimeError(
                f"this Python's SQLite ({sqlite3.sqlite_version}) has no FTS5; install a Python whose SQLite has it"
            ) from None

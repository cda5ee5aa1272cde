"""Labels given by people: kept in a separate file, made with the first one, so that rebuilding a library loses none."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from faceteer_library.schema import PERSON_LABELS


class PersonLabels:
    """Writes labels, and every change to a history; :mod:`faceteer_library.store` reads them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, feature: int, label: str, author: str) -> None:
        """Records a label, or takes it back when ``label`` is empty.

        Raises:
            OSError: the file cannot be written.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            # SQLite lets writers of this and other processes take turns, each waiting for 5 s at most.
            with closing(sqlite3.connect(self.path, isolation_level="IMMEDIATE")) as connection, connection:
                connection.executescript(PERSON_LABELS)
                connection.execute("DELETE FROM labels WHERE feature = ?", (feature,))
                if label:
                    connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (feature, label, author, at))
                connection.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (feature, label, author, at))
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path}: {error}") from error

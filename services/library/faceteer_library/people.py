"""People's labels: a small file of their own, made when the first label is given.

Knows nothing of the library they belong to, so rebuilding a library loses none of them.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from faceteer_library.schema import PEOPLE


class People:
    """Writes labels; readers attach the file (see :mod:`faceteer_library.store`). Every change is kept in a history."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def set(self, feature: int, label: str, author: str) -> None:
        """Records a label, or takes it back when ``label`` is empty.

        Raises:
            OSError: the file cannot be written.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            try:
                with closing(sqlite3.connect(self.path)) as connection, connection:
                    connection.executescript(PEOPLE)
                    connection.execute("DELETE FROM labels WHERE feature = ?", (feature,))
                    connection.execute("DELETE FROM people_words WHERE rowid = ?", (feature,))
                    if label:
                        connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (feature, label, author, at))
                        connection.execute("INSERT INTO people_words (rowid, label) VALUES (?, ?)", (feature, label))
                    connection.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (feature, label, author, at))
            except sqlite3.DatabaseError as error:
                raise OSError(f"{self.path}: {error}") from error

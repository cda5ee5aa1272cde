"""Pictures in Parquet files: a column of bytes, or of {bytes, path} as Hugging Face's datasets write it.

Rows are read a few at a time, from the row groups that a piece touches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from faceteer_trainer.corpus.pictures import Entry, Piece, caption_of, files_fingerprint, printable
from faceteer_trainer.errors import JobError

_IMAGE = ("image", "bytes", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
_CAPTION = ("caption", "text", "txt")
_NAME = ("name", "key", "__key__", "path", "file_name", "filename", "id")
_ROWS = 16


class _Columns(NamedTuple):
    image: str
    is_struct: bool
    caption: str | None
    name: str | None


class Tables:
    """One or many Parquet files, in order."""

    def __init__(self, root: Path, names: list[str], captions: str) -> None:
        self.root = root
        self.description = f"pictures in {len(names)} Parquet files of {root.name}"
        self._names = names
        self.passed_over: Counter[str] = Counter()
        self._captions = captions

    def fingerprint(self) -> str:
        """Of every file's path, size and time of change."""
        return files_fingerprint(self.root, self._names)

    def pieces(self) -> Iterator[Piece]:
        """A file each; only its metadata is read."""
        for name in self._names:
            with _opened(self.root / name) as file:
                self._columns(name, file.schema_arrow)
                yield Piece(name, 0, file.metadata.num_rows)

    def entries(self, piece: Piece) -> Iterator[Entry]:
        """Rows `piece.first` to `piece.first + piece.count`."""
        with _opened(self.root / piece.file) as file:
            columns = self._columns(piece.file, file.schema_arrow)
            groups, start, skipped = [], 0, 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start + rows <= piece.first:
                    skipped = start + rows
                elif start < piece.first + piece.count:
                    groups.append(group)
                start += rows
            wanted = [name for name in (columns.image, columns.caption, columns.name) if name is not None]
            row = skipped
            for batch in file.iter_batches(_ROWS, groups, wanted):
                inside = slice(max(piece.first - row, 0), max(piece.first + piece.count - row, 0))
                for at, values in zip(range(row, row + len(batch))[inside], batch[inside].to_pylist(), strict=True):
                    yield _entry(piece.file, at, values, columns)
                row += len(batch)
                if row >= piece.first + piece.count:
                    return

    def _columns(self, file: str, schema: pa.Schema) -> _Columns:
        image = next((name for name in _IMAGE if name in schema.names), None)
        if image is None:
            raise JobError(
                f"{self.root / file}: no column of pictures; call it one of {', '.join(_IMAGE)} (there are: "
                f"{', '.join(schema.names)})"
            )
        kind = schema.field(image).type
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not is_struct and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
            raise JobError(f"{self.root / file}: column {image} is of type {kind}; it must hold the files' bytes")
        caption = next((name for name in _CAPTION if name in schema.names), None)
        if self._captions == "none":
            caption = None
        elif self._captions != "auto":
            if self._captions not in schema.names:
                raise JobError(f"{self.root / file}: no column {self._captions} (there are: {', '.join(schema.names)})")
            caption = self._captions
        name = next((name for name in _NAME if name in schema.names and name != image), None)
        return _Columns(image, is_struct, caption, name)


def _entry(file: str, row: int, values: dict[str, Any], columns: _Columns) -> Entry:
    image = values[columns.image]
    data = image.get("bytes") if columns.is_struct and image is not None else image
    path = image.get("path") if columns.is_struct and image is not None else None
    found = values[columns.name] if columns.name is not None else path
    name = printable(str(found)) if found not in (None, "") else f"{file}/{row}"
    caption = values[columns.caption] if columns.caption is not None else None
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    text = caption_of("txt", caption.encode("utf-8", "replace")) if isinstance(caption, str) else ""
    return Entry(name, text, data, "" if data is not None else "the row holds no bytes")


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # Streamed: a row group of a thousand photographs need not be in memory at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise JobError(f"{path}: not a whole Parquet file ({reason}); fetch it again, or leave it out") from None

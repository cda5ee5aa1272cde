"""A corpus of embeddings on disk: shards that are read through memory maps, whatever their number.

    corpus.json                what it is, and its shards with their rows
    embeds-00000.safetensors   "embeds" [m, d] float16 or float32; the encoder's revision in the header
    pictures-00000.parquet     beside it, optional: name, caption, thumbnail (WebP) of each row
    bad.jsonl                  pictures that could not be read, and why

Rows are numbered over all shards, in the order of corpus.json.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file

CARD = "corpus.json"
FORMAT = 1
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_CODES = {"float16": "F16", "float32": "F32"}


def shard_name(number: int) -> str:
    """The file name of a corpus' shard."""
    return f"embeds-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """One shard: its file names in the corpus' directory, and how many rows it holds."""

    embeds: str
    rows: int
    pictures: str | None = None


@dataclass(frozen=True)
class CorpusCard:
    """What corpus.json says.

    Attributes:
        name: of the corpus, for people.
        encoder_revision: of the encoder that made the embeddings.
        embed_dim: d.
        dtype: float16 or float32.
        shards: in order.
        n_bad: pictures left out because they could not be read.
        source: what the pictures were, for people.
        complete: False until the job that writes it has finished.
    """

    name: str
    encoder_revision: str
    embed_dim: int
    dtype: str
    shards: tuple[Shard, ...]
    n_bad: int = 0
    source: str = ""
    complete: bool = True

    def write(self, directory: Path) -> None:
        """Write corpus.json whole or not at all."""
        with job_file(directory / CARD) as part:
            part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


class PictureRow(NamedTuple):
    """What is known of one row's picture; thumbnail is a WebP file, empty where none was kept."""

    name: str
    caption: str
    thumbnail: bytes


def write_embeds(path: Path, embeds: npt.NDArray[np.floating], *, dtype: str, encoder_revision: str) -> None:
    """Write a shard's embeddings [m, d] as a safetensors file, whole or not at all; the same bytes for the same input.

    Raises:
        JobError: a value is not finite, or does not fit float16; the disk is full.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(embeds, _DTYPES[_CODES[dtype]])
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise JobError(f"{path}: row {row} is not finite in {dtype}; store float32, or leave the picture out")
    header = json.dumps(
        {
            "__metadata__": {"encoder_revision": encoder_revision},
            "embeds": {"dtype": _CODES[dtype], "shape": list(values.shape), "data_offsets": [0, values.nbytes]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    with job_file(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(values.data)


class Mapped(NamedTuple):
    """A shard that is mapped: its values [rows, d] in the file's own dtype, read-only."""

    values: npt.NDArray[np.floating]
    pages: mmap.mmap

    def forget(self) -> None:
        """Take the pages that were touched out of this process' memory; the system may keep them, or read them again.

        Without it a process that has read a whole corpus would count all of it as its own.
        """
        self.pages.madvise(mmap.MADV_DONTNEED)


def map_embeds(path: Path, rows: int, embed_dim: int, encoder_revision: str) -> Mapped:
    """A shard's embeddings [rows, d] through a read-only memory map.

    Raises:
        JobError: the file is missing, cut short, of another shape or of another encoder.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > 1_000_000:
                raise ValueError("no safetensors header")
            header: dict[str, Any] = json.loads(file.read(length))
        entry = header["embeds"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
    except FileNotFoundError:
        raise JobError(f"{path}: missing; run embed again into this folder to regenerate it") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise JobError(f"{path}: not an embedding shard ({error}); delete it and run embed again") from None
    found = header.get("__metadata__", {}).get("encoder_revision")
    if found != encoder_revision:
        raise JobError(f"{path}: made by encoder {found}, but the corpus is of {encoder_revision}; delete it")
    if shape != (rows, embed_dim) or stop - start != rows * embed_dim * dtype.itemsize:
        raise JobError(f"{path}: holds {list(shape)} values, not {[rows, embed_dim]}; delete it and run embed again")
    if size < 8 + length + stop:
        raise JobError(f"{path}: cut short ({size} of {8 + length + stop} bytes); delete it and run embed again")
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Mapped(np.frombuffer(pages, dtype, rows * embed_dim, 8 + length + start).reshape(shape), pages)


class EmbeddingCorpus:
    """Embeddings [n, d] over many shards, mapped and never loaded whole. Safe to use from many processes.

    Attributes:
        directory: where it is.
        card: what corpus.json says.
    """

    def __init__(self, directory: Path, card: CorpusCard) -> None:
        self.directory, self.card = directory, card
        self._starts = np.cumsum([0, *(shard.rows for shard in card.shards)])
        self._maps: list[Mapped | None] = [None] * len(card.shards)

    @classmethod
    def open(cls, directory: Path | str, *, encoder_revision: str | None = None) -> EmbeddingCorpus:
        """Read corpus.json and look at every shard's header and size.

        Args:
            directory: made by `faceteer_trainer embed`.
            encoder_revision: refuse embeddings of another encoder.

        Raises:
            JobError: not a corpus, unfinished, of another encoder, empty, or a shard is missing or cut short.
        """
        directory = Path(directory)
        path = directory / CARD
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            if given.pop("format") != FORMAT:
                raise JobError(f"{path}: a format that this version does not read")
            given["shards"] = tuple(Shard(**shard) for shard in given["shards"])
            card = CorpusCard(**given)
        except FileNotFoundError:
            raise JobError(f"{directory}: no embedding corpus ({CARD} is missing); make one with embed") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{path}: not readable ({error}); run embed again") from None
        if not card.complete:
            raise JobError(f"{directory}: the embed job has not finished; run it again to resume")
        if encoder_revision is not None and card.encoder_revision != encoder_revision:
            raise JobError(
                f"{directory}: embeddings of encoder {card.encoder_revision}, but {encoder_revision} is needed; "
                "embed the pictures with that bundle"
            )
        corpus = cls(directory, card)
        if len(corpus) == 0:
            raise JobError(f"{directory}: holds no embeddings")
        for index in range(len(card.shards)):
            corpus.shard(index)
        return corpus

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def embed_dim(self) -> int:
        """The length d of an embedding."""
        return self.card.embed_dim

    @property
    def encoder_revision(self) -> str:
        """Of the encoder that made the embeddings."""
        return self.card.encoder_revision

    def shard(self, index: int) -> npt.NDArray[np.floating]:
        """One shard's embeddings [m, d], a read-only map in the file's dtype."""
        return self._map(index).values

    def _map(self, index: int) -> Mapped:
        mapped = self._maps[index]
        if mapped is None:
            shard = self.card.shards[index]
            path = self.directory / shard.embeds
            mapped = self._maps[index] = map_embeds(path, shard.rows, self.embed_dim, self.encoder_revision)
        return mapped

    def rows(self, indices: npt.NDArray[np.integer] | Sequence[int]) -> npt.NDArray[np.float32]:
        """Any rows, float32 [m, d], in the order asked for.

        Raises:
            JobError: a row is not finite.
            IndexError: there is no such row.
        """
        wanted = self._numbers(indices)
        found = np.empty((len(wanted), self.embed_dim), np.float32)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        for index in np.unique(shards):
            here = np.flatnonzero(shards == index)
            # Sorted, so that the disk is read forwards.
            here = here[np.argsort(wanted[here], kind="stable")]
            mapped = self._map(int(index))
            found[here] = mapped.values[wanted[here] - self._starts[index]]
            mapped.forget()
        self._check(found, wanted)
        return found

    def chunks(self, size: int = 4096) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Every row once, in order: (number of the first row, float32 [<= size, d]); never across two shards.

        Raises:
            JobError: a row is not finite.
        """
        for index, shard in enumerate(self.card.shards):
            first = int(self._starts[index])
            for start in range(0, shard.rows, size):
                mapped = self._map(index)
                chunk = mapped.values[start : start + size].astype(np.float32)
                mapped.forget()
                self._check(chunk, np.arange(first + start, first + start + len(chunk)))
                yield first + start, chunk

    @property
    def has_pictures(self) -> bool:
        """Whether every row has a name (and perhaps a caption and a thumbnail)."""
        return all(shard.pictures is not None for shard in self.card.shards)

    def pictures(self, indices: npt.NDArray[np.integer] | Sequence[int]) -> list[PictureRow]:
        """What is known of these rows' pictures, in the order asked for; a name made of the number where nothing is."""
        wanted = self._numbers(indices)
        found: list[PictureRow | None] = [None] * len(wanted)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        for index in np.unique(shards):
            here = np.flatnonzero(shards == index)
            file = self.card.shards[index].pictures
            if file is None:
                for at in here:
                    found[at] = PictureRow(f"picture-{wanted[at]}", "", b"")
                continue
            at_rows = wanted[here] - self._starts[index]
            for row, at in zip(_picture_rows(self.directory / file, at_rows), here, strict=True):
                found[at] = row
        return [row for row in found if row is not None]

    def _numbers(self, indices: npt.NDArray[np.integer] | Sequence[int]) -> npt.NDArray[np.int64]:
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a corpus of {len(self)}")
        return wanted

    def _check(self, values: npt.NDArray[np.float32], numbers: npt.NDArray[np.int64]) -> None:
        finite = np.isfinite(values).all(1)
        if not finite.all():
            number = int(numbers[int(np.flatnonzero(~finite)[0])])
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            raise JobError(
                f"{self.directory / self.card.shards[shard].embeds}: row {number - int(self._starts[shard])} holds NaN "
                "or infinite values; delete the shard and run embed again"
            )


def _picture_rows(path: Path, wanted: npt.NDArray[np.int64]) -> list[PictureRow]:
    """These rows of one shard's pictures, in the order asked for; only row groups that hold any of them are read."""
    try:
        with pq.ParquetFile(path) as file:
            starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
            groups = np.searchsorted(starts, wanted, side="right") - 1
            read = np.unique(groups)
            table = file.read_row_groups(read.tolist(), columns=["name", "caption", "thumbnail"])
        # Where each group that was read begins in the table.
        begins = np.cumsum([0, *np.diff(starts)[read]])
        at = begins[np.searchsorted(read, groups)] + wanted - starts[groups]
        rows = table.take(at).to_pylist()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise JobError(f"{path}: not readable ({error}); run embed again") from None
    return [PictureRow(row["name"], row["caption"] or "", row["thumbnail"] or b"") for row in rows]

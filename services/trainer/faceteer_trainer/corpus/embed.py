"""One shard of a corpus: its pictures read, decoded, encoded and written. The same function on one machine or many.

A batch is a slice of the source's list, however much of it can be read, and is encoded by one thread: its bytes depend
neither on the number of threads nor on what was done before.
"""

from __future__ import annotations

import io
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from faceteer_encoder.model import load_encoder
from faceteer_encoder.settings import EncoderSettings
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_runtime.errors import ImageTooLarge, UnreadableImage
from PIL import Image

from faceteer_trainer.corpus.pictures import Entry, Source
from faceteer_trainer.corpus.plan import Task
from faceteer_trainer.corpus.shards import map_embeds, shard_name, write_embeds
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file

# A batch ends early when its files reach this size together.
_BATCH_BYTES = 256_000_000
_WEBP_QUALITY = 80
# Rows a row group: what must be read to show one picture.
_ROW_GROUP = 256


class Made(NamedTuple):
    """A shard that is on the disk: its embeddings, and the pictures left out."""

    rows: int
    n_bad: int


class _Batch(NamedTuple):
    entries: list[Entry]
    embeds: list[npt.NDArray[np.float32]]
    thumbnails: list[bytes]
    bad: list[tuple[str, str]]
    size: int


@dataclass(frozen=True)
class EmbedderSettings:
    """What makes a shard's bytes what they are.

    Attributes:
        bundle: directory of a bundle with an encoder.
        dtype: of the embeddings on disk, float16 or float32; the encoder computes in float32.
        batch: pictures at a time.
        thumbnails: longest side in pixels, 0 for none.
        device: where the model runs.
    """

    bundle: str
    dtype: str = "float16"
    batch: int = 64
    thumbnails: int = 128
    device: str = "cpu"


class Embedder:
    """A bundle's encoder, and the threads that use it.

    Attributes:
        revision: of the encoder.
        embed_dim: d.
    """

    def __init__(self, settings: EmbedderSettings, threads: int = 1) -> None:
        """Load the encoder as the service does, with the service's limits on a picture's bytes and pixels.

        Raises:
            JobError: no such bundle, or no usable encoder in it, or no such device.
        """
        limits = EncoderSettings.model_fields
        try:
            part = Bundle.open(settings.bundle).part("encoder")
            self._encoder, self._preprocessor = load_encoder(
                part.path,
                device=settings.device,
                max_image_bytes=limits["encoder_max_image_bytes"].default,
                max_image_pixels=limits["encoder_max_image_pixels"].default,
            )
        except (BundleError, RuntimeError) as error:
            raise JobError(str(error).splitlines()[0]) from None
        self.revision, self.embed_dim = part.revision, self._encoder.embed_dim
        self._dtype, self._batch, self._thumbnails = settings.dtype, settings.batch, settings.thumbnails
        # On a GPU one batch at a time, while other threads decode the next ones.
        self._turn = nullcontext() if settings.device == "cpu" else threading.Lock()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "embed")
        torch.set_num_threads(1)

    def close(self) -> None:
        """Stop the threads; batches that have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def made(self, directory: Path, number: int) -> Made | None:
        """What is on the disk of a shard, None where anything of it is missing or damaged."""
        path = directory / shard_name(number)
        try:
            rows = _rows_of(path)
            map_embeds(path, rows, self.embed_dim, self.revision)
            if pq.read_metadata(directory / pictures_name(number)).num_rows != rows:
                return None
            bad = directory / bad_name(number)
            return Made(rows, len(bad.read_bytes().splitlines()) if bad.exists() else 0)
        except (OSError, ValueError, JobError, pa.ArrowException):
            return None

    def make(self, source: Source, task: Task, directory: Path, progress: Callable[[int], None]) -> Made:
        """Embed a task's pictures and write the shard's files; the embeddings last, as the sign that all are there.

        Args:
            source: where the task's pictures are.
            task: the shard's number and pictures.
            directory: of the corpus.
            progress: told of pictures done, some at a time.

        Raises:
            JobError: the source has changed or cannot be read, or the disk is full.
        """
        embeds: list[npt.NDArray[np.float32]] = []
        names: list[str] = []
        captions: list[str] = []
        thumbnails: list[bytes] = []
        bad: list[tuple[str, str]] = []
        found = 0
        for batch in self._batches(source, task):
            embeds += batch.embeds
            names += [entry.name for entry in batch.entries]
            captions += [entry.caption for entry in batch.entries]
            thumbnails += batch.thumbnails
            bad += batch.bad
            found += batch.size
            progress(batch.size)
        if found != task.count:
            raise JobError(
                f"{source.root}: {found} pictures where there were {task.count}; the source changed meanwhile"
            )
        (directory / shard_name(task.number)).unlink(missing_ok=True)
        lines = [json.dumps({"shard": task.number, "name": name, "reason": reason}) for name, reason in bad]
        path = directory / bad_name(task.number)
        path.unlink(missing_ok=True)
        if lines:
            with job_file(path) as part:
                part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table = pa.table(
            {
                "name": pa.array(names, pa.string()),
                "caption": pa.array(captions, pa.string()),
                "thumbnail": pa.array(thumbnails, pa.binary()),
            }
        )
        # Through a Python file object: pyarrow's own reports a full disk with a different error.
        with job_file(directory / pictures_name(task.number)) as part, part.open("wb") as file:
            pq.write_table(table, file, row_group_size=_ROW_GROUP, compression="zstd")
        values = np.stack(embeds) if embeds else np.empty((0, self.embed_dim), np.float32)
        write_embeds(directory / shard_name(task.number), values, dtype=self._dtype, encoder_revision=self.revision)
        return Made(len(values), len(bad))

    def _batches(self, source: Source, task: Task) -> Iterator[_Batch]:
        """Batches in order; one more is being read than threads work."""
        under_way: deque[Future[_Batch]] = deque()
        try:
            for entries in self._slices(entry for piece in task.pieces for entry in source.entries(piece)):
                under_way.append(self._pool.submit(self._encoded, entries))
                if len(under_way) > self._threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def _slices(self, entries: Iterator[Entry]) -> Iterator[list[Entry]]:
        group: list[Entry] = []
        size = 0
        for entry in entries:
            group.append(entry)
            size += len(entry.data) if isinstance(entry.data, bytes) else 0
            if len(group) == self._batch or size >= _BATCH_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _encoded(self, entries: list[Entry]) -> _Batch:
        good: list[Entry] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        bad: list[tuple[str, str]] = []
        for entry in entries:
            try:
                pixels.append(self._preprocessor.pixels(_bytes_of(entry)))
                good.append(entry)
            except (ImageTooLarge, UnreadableImage) as error:
                bad.append((entry.name, error.description))
            except _LeftOutError as error:
                bad.append((entry.name, str(error)))
        if not good:
            return _Batch([], [], [], bad, len(entries))
        with self._turn:
            embeds = self._encoder.encode_images(pixels)
        kept: list[int] = []
        largest = float(np.finfo(self._dtype).max)
        for at, values in enumerate(embeds):
            # NaN is not <= anything.
            if np.abs(values).max() <= largest:
                kept.append(at)
            else:
                bad.append((good[at].name, f"the embedding is not finite in {self._dtype}"))
        return _Batch(
            [good[at] for at in kept],
            [embeds[at] for at in kept],
            [self._thumbnail(pixels[at]) for at in kept],
            bad,
            len(entries),
        )

    def _thumbnail(self, pixels: npt.NDArray[np.uint8]) -> bytes:
        """What the model sees of a picture, as WebP; never larger than that."""
        if not self._thumbnails:
            return b""
        image = Image.fromarray(pixels)
        if max(image.size) > self._thumbnails:
            image.thumbnail((self._thumbnails, self._thumbnails), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=_WEBP_QUALITY, method=4)
        return file.getvalue()


class _LeftOutError(Exception):
    """Why a picture's bytes were not even read."""


def pictures_name(number: int) -> str:
    """The file name of what is known of a shard's pictures."""
    return f"pictures-{number:05d}.parquet"


def bad_name(number: int) -> str:
    """The file name of a shard's bad pictures, while the run goes on."""
    return f"bad-{number:05d}.jsonl"


def _bytes_of(entry: Entry) -> bytes:
    if entry.data is None:
        raise _LeftOutError(entry.reason)
    if isinstance(entry.data, bytes):
        return entry.data
    limit = EncoderSettings.model_fields["encoder_max_image_bytes"].default
    try:
        # Before reading: the preprocessor would refuse it too, but a file of many gigabytes must not come into memory.
        if (size := entry.data.stat().st_size) > limit:
            raise _LeftOutError(f"{size} bytes are more than the {limit} that are taken")
        return entry.data.read_bytes()
    except OSError as error:
        raise _LeftOutError(f"could not be read ({error.strerror})") from None


def _rows_of(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["embeds"]["shape"][0])

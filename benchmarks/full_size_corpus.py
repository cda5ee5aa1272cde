"""Writes a corpus of full size, reads it back by chunks and by random rows: rates, and memory that does not grow.

    python benchmarks/full_size_corpus.py DIRECTORY [--rows 1400000] [--dim 1280] [--features 16384] [--keep]

Each figure is of a process of its own, so that its peak of memory is its own; the last lines read corpora of a tenth
and of the full size, and the two peaks should be alike. Results: docs/corpora.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from faceteer_postcards.synthetic import SparseMixtures
from faceteer_trainer.corpus.shards import EmbeddingCorpus

CHUNK, BATCH, BATCHES = 4096, 4096, 50


def _write(directory: Path, mixtures: SparseMixtures, rows: int) -> int:
    mixtures.write(directory, rows)
    return rows


def _by_chunks(directory: Path, mixtures: SparseMixtures, rows: int) -> int:
    corpus = EmbeddingCorpus.open(directory, encoder_revision=mixtures.encoder_revision)
    squares = sum(float(np.einsum("ij,ij->", chunk, chunk)) for _, chunk in corpus.chunks(CHUNK))
    print(f"    root mean square norm {np.sqrt(squares / rows):.3f}")
    return len(corpus)


def _by_rows(directory: Path, mixtures: SparseMixtures, rows: int) -> int:
    corpus = EmbeddingCorpus.open(directory, encoder_revision=mixtures.encoder_revision)
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        wanted = rng.integers(0, rows, BATCH)
        found = corpus.rows(wanted)
    # The last batch against the rows as they were generated: what was written is what is read.
    for at in range(3):
        block, row = divmod(int(wanted[at]), 4096)
        np.testing.assert_allclose(found[at], mixtures.block(block)[0][row], rtol=1e-3, atol=1e-3)
    return BATCH * BATCHES


def _measured(
    job: Callable[[Path, SparseMixtures, int], int], directory: Path, mixtures: SparseMixtures, rows: int, what: str
) -> None:
    """Run a job in a fresh process and print its rate and its peak of memory."""

    def measure() -> None:
        torch.set_num_threads(1)
        start = time.perf_counter()
        done = job(directory, mixtures, rows)
        seconds = time.perf_counter() - start
        gigabytes = done * mixtures.d * 2 / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{what}: {done:,} rows ({gigabytes:.2f} GB) in {seconds:.1f} s, {done / seconds:,.0f} rows/s, "
            f"{gigabytes / seconds:.2f} GB/s, peak memory {peak:,.0f} MiB",
            flush=True,
        )

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def main() -> None:
    """Write, read by chunks, read at random; at a tenth of the size and at the full one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1_400_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--mean-active", type=float, default=24.0)
    parser.add_argument("--keep", action="store_true", help="keep the full corpus")
    arguments = parser.parse_args()
    mixtures = SparseMixtures(arguments.features, arguments.dim, arguments.mean_active)
    tenth = arguments.directory.with_name(f"{arguments.directory.name}-tenth")
    for directory, rows in ((tenth, arguments.rows // 10), (arguments.directory, arguments.rows)):
        _measured(_write, directory, mixtures, rows, "write     ")
        _measured(_by_chunks, directory, mixtures, rows, "by chunks ")
        _measured(_by_rows, directory, mixtures, rows, "at random ")
    shutil.rmtree(tenth)
    if not arguments.keep:
        shutil.rmtree(arguments.directory)


if __name__ == "__main__":
    main()

"""Draws postcards into tar shards and embeds them with a bundle: rate, and memory that does not grow with the corpus.

    python benchmarks/embed_throughput.py DIRECTORY [--bundle deploy/bundles/postcards] [--pictures 20000] [--keep]

The job runs as a user runs it, once over a tenth of the tars and once over all. Results: docs/corpora.md.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from faceteer_postcards.render import render
from faceteer_postcards.world import sample_scene
from PIL import Image

A_TAR = 2000


def _draw(directory: Path, pictures: int) -> None:
    """Tar shards of 2,000 PNG pictures; those that are there are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    for first in range(0, pictures, A_TAR):
        path = directory / f"postcards-{first // A_TAR:05d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for seed in range(first, min(first + A_TAR, pictures)):
                file = io.BytesIO()
                Image.fromarray(render(sample_scene(seed))).save(file, "PNG")
                member = tarfile.TarInfo(f"{seed:07d}.png")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)
        path.with_suffix(".part").replace(path)


def _embed(images: str, bundle: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    job = [sys.executable, "-m", "faceteer_trainer", "embed", "--images", images, "--bundle", str(bundle)]
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([*job, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().splitlines()
    if process.returncode:
        raise SystemExit("\n".join(said))
    print(
        f"{said[-1]}; {seconds:.1f} s with start-up, {usage.ru_utime + usage.ru_stime:.1f} s of CPU, "
        f"peak memory {usage.ru_maxrss / 1024:,.0f} MiB",
        flush=True,
    )


def main() -> None:
    """A tenth, then all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--keep", action="store_true", help="keep the tars and the corpus")
    arguments = parser.parse_args()
    tars = arguments.directory / "tars"
    start = time.perf_counter()
    _draw(tars, arguments.pictures)
    print(f"{arguments.pictures} pictures drawn in {time.perf_counter() - start:.0f} s", flush=True)
    tenth = max(1, arguments.pictures // A_TAR // 10)
    for pattern, name in ((str(tars / f"postcards-0000[0-{tenth - 1}].tar"), "tenth"), (str(tars), "corpus")):
        _embed(pattern, arguments.bundle, arguments.directory / name)
    if not arguments.keep:
        shutil.rmtree(arguments.directory)


if __name__ == "__main__":
    main()

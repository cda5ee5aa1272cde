"""Pulls a bundle: checks licences, sizes and free space, then fetches and checks each file, then completes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from faceteer_runtime.files import write_json
from rich.console import Console

from faceteer_trainer.bundles.manifest import Recipe, Wanted
from faceteer_trainer.bundles.sources import Published, Source, free_bytes, link_or_copy, sha256_of
from faceteer_trainer.errors import JobError
from faceteer_trainer.progress import Progress

# Beside the parts, and gone when the bundle is whole: digests of what has been fetched and checked already.
STATE = ".pull.json"
# Space for the SAE in its serving form and the library, with a margin, besides the pulled files.
_BESIDES = 1_500_000_000


def pull(
    recipe: Recipe,
    out: Path,
    source: Source,
    complete: Callable[[Path, Recipe, dict[str, Published]], Path],
    *,
    console: Console | None = None,
) -> Path:
    """Makes ``out`` a whole bundle, going on where an earlier pull stopped.

    Args:
        recipe: what to pull.
        out: the bundle's directory.
        source: where from.
        complete: makes the parts that are not published as they are served, and seals; given out, recipe and what the
            source said of each path.
        console: for licences and progress; standard error by default.

    Raises:
        JobError: something is not there, is not what it should be, or does not fit on the disk.
    """
    console = console or Console(stderr=True)
    console.print(f"[bold]{recipe.name}[/bold]: {recipe.description}", highlight=False)
    for part, licence in recipe.licences.items():
        console.print(f"  licence of the {part}: {licence}", highlight=False)
    published = {wanted.path: source.look(wanted) for wanted in recipe.files}
    wanted_files = [_pinned(wanted, published[wanted.path]) for wanted in recipe.files]
    done = _read_state(out)
    left = [wanted for wanted in wanted_files if not _is_there(out, wanted, done)]
    need = sum(wanted.size or wanted.about for wanted in left)
    console.print(f"  {len(wanted_files)} files, {_gigabytes(need)} still to fetch", highlight=False)
    room = free_bytes(out)
    if need and need + _BESIDES > room:
        raise JobError(
            f"{out}: {_gigabytes(need + _BESIDES)} are needed on this disk, {_gigabytes(room)} are free; "
            "make room, or let --out name another disk"
        )
    out.mkdir(parents=True, exist_ok=True)
    fetched = 0

    def advance(count: int) -> None:
        nonlocal fetched
        fetched += count
        report(recipe.name, fetched, need)

    with Progress(console, unit="MB") as report:
        for wanted in left:
            twin = next((other for other in wanted_files if other.path in done and _same(other, wanted)), None)
            if twin is not None:
                (out / wanted.path).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(out / twin.path, out / wanted.path)
                advance(wanted.size or wanted.about)
            else:
                source.fetch(wanted, published[wanted.path], out / wanted.path, advance)
            done[wanted.path] = _check(out / wanted.path, wanted)
            write_json(out / STATE, done)
    exact = {
        path: found._replace(sha256=done[path], size=found.size or (out / path).stat().st_size)
        for path, found in published.items()
    }
    made = complete(out, recipe, exact)
    shutil.rmtree(out / "sources", ignore_errors=True)
    (out / STATE).unlink(missing_ok=True)
    return made


def _pinned(wanted: Wanted, published: Published) -> Wanted:
    if wanted.sha256 and published.sha256 and wanted.sha256 != published.sha256:
        raise JobError(
            f"{wanted.repo}/{wanted.file}: its publisher now states SHA-256 {published.sha256}, but the manifest "
            f"asks for {wanted.sha256}; it has changed since, and is not taken"
        )
    return replace(wanted, sha256=wanted.sha256 or published.sha256, size=published.size or wanted.size)


def _is_there(out: Path, wanted: Wanted, done: dict[str, str]) -> bool:
    path = out / wanted.path
    if not path.is_file() or (wanted.size is not None and path.stat().st_size != wanted.size):
        return False
    if wanted.path not in done:
        # From an earlier, completed pull: its digest decides.
        if wanted.sha256 is None or sha256_of(path) != wanted.sha256:
            return False
        done[wanted.path] = wanted.sha256
    return wanted.sha256 is None or done[wanted.path] == wanted.sha256


def _check(path: Path, wanted: Wanted) -> str:
    size = path.stat().st_size
    if wanted.size is not None and size != wanted.size:
        path.unlink()
        raise JobError(f"{path}: {size} of {wanted.size} bytes arrived; run the same command again to go on")
    digest = sha256_of(path)
    if wanted.sha256 is not None and digest != wanted.sha256:
        path.unlink()
        raise JobError(
            f"{path}: its SHA-256 is {digest}, not {wanted.sha256}; it was damaged or exchanged on the way, and is gone"
        )
    return digest


def _same(a: Wanted, b: Wanted) -> bool:
    return (a.repo, a.file, a.revision) == (b.repo, b.file, b.revision)


def _read_state(out: Path) -> dict[str, str]:
    try:
        state: dict[str, str] = json.loads((out / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

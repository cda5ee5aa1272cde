"""Replays a recipe on every picture of a folder. What is done already is left alone, so a stopped job can go on.

python examples/batch_job/batch.py night.json photos/ edited/ --at-once 4
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import faceteer

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


async def edit_one(client: faceteer.AsyncClient, recipe: faceteer.Recipe, source: Path, target: Path) -> None:
    """Draws one picture and moves it into place once it is whole."""
    photo = await client.open(source)
    image = await photo.edit(recipe).render()
    partial = target.with_suffix(".partial")
    image.save(partial, "PNG")
    os.replace(partial, target)


async def run(recipe: faceteer.Recipe, sources: list[Path], out: Path, at_once: int) -> list[str]:
    """Edits all of them, ``at_once`` at a time; one sentence for each that failed."""
    failures: list[str] = []
    waiting = iter(sources)

    async def worker(client: faceteer.AsyncClient) -> None:
        for source in waiting:
            target = out / f"{source.name}.png"
            if target.exists():
                continue
            try:
                await edit_one(client, recipe, source, target)
                print(target)
            except (faceteer.RevisionMismatchError, faceteer.ServerUnreachableError):
                raise  # the same for all that would follow
            except (faceteer.FaceteerError, OSError) as error:
                failures.append(f"{source}: {error}")

    async with faceteer.connect_async() as client, asyncio.TaskGroup() as workers:
        for _ in range(at_once):
            workers.create_task(worker(client))
    return failures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Replay a recipe on every picture of a folder.")
    parser.add_argument("recipe", type=faceteer.Recipe.load, help="saved by edit.recipe().save(...) or --save-recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at-once", type=int, default=4, help="pictures under way; the server batches their steps")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    sources = sorted(path for path in given.folder.iterdir() if path.suffix.lower() in ENDINGS)
    try:
        failures = asyncio.run(run(given.recipe, sources, given.out, given.at_once))
    except* faceteer.FaceteerError as stopped:
        sys.exit(f"stopped: {stopped.exceptions[0]}")
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

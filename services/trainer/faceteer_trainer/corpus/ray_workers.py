"""Shards made by Ray Data's workers, on one machine or many: the same function as without it, so the same bytes.

A worker is told a shard's number, and reads everything else from the plan. Bundle, pictures and corpus must be at the
same paths on every machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from faceteer_trainer.corpus.embed import Embedder, EmbedderSettings, Made
from faceteer_trainer.corpus.plan import Plan
from faceteer_trainer.corpus.sources import open_source
from faceteer_trainer.errors import JobError


class _Worker:
    """One Ray actor: an encoder, and one thread that uses it."""

    def __init__(self, plan: Plan, images: str, captions: str, settings: EmbedderSettings) -> None:
        self._plan, self._embedder = plan, Embedder(settings)
        self._source = open_source(images, captions)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        made: list[Made] = []
        # An error is handed back as its sentence: Ray would wrap the exception in pages of its own.
        try:
            for number in batch["number"]:
                task = self._plan.task(int(number))
                made.append(self._embedder.make(self._source, task, self._plan.directory, lambda _: None))
        except JobError as error:
            numbers = np.asarray(batch["number"])
            return {"number": numbers, "rows": 0 * numbers, "n_bad": 0 * numbers, "error": [str(error)] * len(numbers)}
        return {
            "number": batch["number"],
            "rows": np.array([shard.rows for shard in made]),
            "n_bad": np.array([shard.n_bad for shard in made]),
            "error": [""] * len(made),
        }


def make_shards(
    plan: Plan,
    numbers: Sequence[int],
    images: str,
    captions: str,
    embedder: EmbedderSettings,
    address: str,
    workers: int,
    done: Callable[[int, Made], None],
) -> None:
    """Make these shards with Ray Data; each worker holds one core, and one GPU where the device is one.

    Args:
        plan: of the corpus.
        numbers: of the shards to make.
        images, captions: what open_source takes.
        embedder: what makes a shard.
        address: of a Ray cluster, or "local": one is started here, listens on this machine only, and ends with the job.
        workers: how many at a time.
        done: told of every shard that is made.

    Raises:
        JobError: Ray is not installed or not to be reached, or a shard could not be made.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One progress bar is enough.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    local = address == "local"
    if local:
        # With this variable Ray keeps all of its ports to this machine; on Linux it would otherwise listen everywhere.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        # optional
        import ray
        import ray.data
    except ImportError:
        raise JobError("--ray needs Ray: pip install 'faceteer-trainer[ray]'") from None
    where: dict[str, Any] = (
        {"address": "local", "num_cpus": workers, "include_dashboard": False} if local else {"address": address}
    )
    try:
        ray.init(**where, configure_logging=True, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"--ray {address}: {str(error).splitlines()[0]}") from None
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        on_gpu = embedder.device != "cpu"
        shards = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        made = shards.map_batches(
            _Worker,
            fn_constructor_args=(plan, images, captions, embedder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(numbers))),
            num_cpus=1,
            num_gpus=1 if on_gpu else None,
        )
        _take(made.iter_rows(), done)
    finally:
        ray.shutdown()


def _take(rows: Iterable[dict[str, Any]], done: Callable[[int, Made], None]) -> None:
    for row in rows:
        if row["error"]:
            raise JobError(row["error"])
        done(int(row["number"]), Made(int(row["rows"]), int(row["n_bad"])))

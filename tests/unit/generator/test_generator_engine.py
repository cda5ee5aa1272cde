"""The engine and the delivery on a model that only counts: turns, previews, failures, leaving, closing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from faceteer_generator import delivery
from faceteer_generator.delivery import from_record
from faceteer_generator.engine import Engine
from faceteer_generator.generation import Finished, Generation, Image, Preview, Progress
from faceteer_generator.requests import GenerationSettings, ImageSpec
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed
from unit.generator.generator_specs import image_spec

PREVIEW_SIDE = 8


class Counting:
    """A denoising, and what else counts its calls."""

    def __init__(self, name: Any, calls: int, log: list[Any]) -> None:
        self.name, self.calls_left, self.log = name, calls, log
        self.latents, self.clean = name, name
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.calls_left == 0

    def advance(self) -> None:
        self.log.append(self.name)
        self.calls_left -= 1


class FakeDenoiser:
    """Logs every call; seeds in ``broken`` fail where they are told to. A step waits for ``gate``."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.previews: list[list[bool]] = []
        self.decoded: list[list[int]] = []
        self.broken: dict[int, str] = {}
        self.gate = threading.Semaphore(10_000)

    def begin(self, spec: ImageSpec) -> Counting:
        self.fail(spec.seed, "begin")
        return Counting((spec.seed, spec.width, spec.height), spec.run_steps, [])

    def step(self, images: Sequence[Counting], estimates: Sequence[bool]) -> None:
        assert self.gate.acquire(timeout=10)
        self.log.append([image.name[0] for image in images])
        self.previews.append(list(estimates))
        for image in images:
            self.fail(image.name[0], "whole step")
            image.calls_left -= 1
            if self.broken.get(image.name[0]) == "step":
                image.error = ValueError("step")

    def decode(self, latents: Sequence[Any]) -> list[np.ndarray]:
        self.decoded.append([seed for seed, _, _ in latents])
        for seed, _, _ in latents:
            self.fail(seed, "decode")
        return [np.full((height, width, 3), seed, dtype=np.uint8) for seed, width, height in latents]

    def preview(self, estimates: Sequence[Any]) -> list[np.ndarray]:
        return [np.zeros((PREVIEW_SIDE, PREVIEW_SIDE, 3), dtype=np.uint8) for _ in estimates]

    def fail(self, seed: int, where: str) -> None:
        if self.broken.get(seed) == where:
            raise ValueError(where)


class Under:
    """An engine under test."""

    def __init__(self) -> None:
        self.model = FakeDenoiser()
        self.worker = ModelWorker("test")
        self.cache = Cache(1 << 20, Metrics())
        self.metrics = Metrics()
        self.engine = Engine(
            self.model,  # type: ignore[arg-type]
            self.worker,
            self.cache,
            max_batch=4,
            max_queue=20,
            metrics=self.metrics,
        )

    def submit(self, *seeds: int, steps: int = 3, preview_every: int = 0, width: int = 64) -> Generation:
        settings = GenerationSettings(width, 64, steps, 2.0, seeds, "ddim", "png", 0)
        specs = [(f"{seed} {width}", image_spec(seed, steps=steps, width=width)) for seed in seeds]
        return self.engine.submit(settings, specs, {}, preview_every=preview_every, cache_us=7)

    async def run(self, name: str, calls: int = 3, **options: Any) -> Computed[str]:
        begin = options.get("begin", lambda: Counting(name, calls, self.model.log))
        return await self.engine.run(name, calls, begin, lambda task: f"result of {task.name}")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the model has no event
                await asyncio.sleep(0.002)


@pytest.fixture
async def under() -> AsyncIterator[Under]:
    made = Under()
    yield made
    made.model.gate.release(10_000)
    await made.engine.close()
    made.worker.close()


async def read(generation: Generation) -> list[Any]:
    async with asyncio.timeout(10):
        return [event async for event in generation.events()]


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


async def test_a_file_is_delivered_and_cached_under_its_key_with_its_size(under: Under) -> None:
    events = await read(under.submit(5, width=128))
    (image,) = of(Image, events)
    assert (image.index, image.seed, image.cached) == (0, 5, False)
    assert (image.file.width, image.file.height) == (128, 64)
    record = await under.cache.get("5 128")
    assert record is not None
    assert from_record(record) == image.file
    cost = events[-1].cost
    assert (cost.cached, cost.cache_us) == (False, 7)
    assert cost.compute_us > 0
    assert under.engine.active == 0
    assert under.metrics.value("faceteer_batch_size_sum", batcher="generator") == 3


async def test_a_new_request_joins_the_next_step_and_a_closed_one_is_not_picked_again(under: Under) -> None:
    model = under.model
    model.gate = threading.Semaphore(1)
    first = under.submit(1, steps=9)
    await under.until(lambda: len(model.log) == 1)
    second = under.submit(2)
    model.gate.release(2)
    await under.until(lambda: len(model.log) == 3)
    first.close()
    first.close()
    model.gate.release(9)
    assert of(Image, await read(second))[0].seed == 2
    await under.until(lambda: under.engine.active == 0)
    # The second and third step had begun before the first was closed, perhaps with the second waiting already.
    assert model.log[0] == [1]
    assert [1, 2] in model.log[1:3]
    assert model.log[4:] in ([[2]], [[2], [2]])


async def test_a_preview_whose_file_takes_longer_comes_before_its_image(
    under: Under, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def slow(pixels: np.ndarray, format: str, quality: int) -> bytes:
        if pixels.shape[0] == PREVIEW_SIDE:
            time.sleep(0.3)
        made.append("preview" if pixels.shape[0] == PREVIEW_SIDE else "image")
        return b"file"

    monkeypatch.setattr(delivery, "encode_image", slow)
    events = await read(under.submit(1, steps=3, preview_every=1))
    assert made == ["image", "preview"]
    assert [type(event) for event in events[-3:]] == [Preview, Image, Finished]
    # Only one of an image is made at a time: the second step asked for none.
    assert under.model.previews == [[True], [False], [False]]


async def test_previews_come_as_often_as_asked_to_those_who_asked_and_not_of_the_last_step(under: Under) -> None:
    model = under.model
    model.gate = threading.Semaphore(0)
    asked, silent = under.submit(1, 2, steps=4, preview_every=2), under.submit(1, steps=4)
    for step in range(4):
        model.gate.release()
        await under.until(lambda step=step: len(model.log) == step + 1)  # type: ignore[misc]
        # Time for a preview's file.
        await asyncio.sleep(0.05)
    events = await read(asked)
    assert [(event.index, event.step) for event in of(Preview, events)] == [(0, 2), (1, 2)]
    assert not of(Preview, await read(silent))
    assert model.previews == [[False, False], [True, True], [False, False], [False, False]]


async def test_a_preview_that_cannot_be_made_is_left_out(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(pixels: np.ndarray, format: str, quality: int) -> bytes:
        if pixels.shape[0] == PREVIEW_SIDE:
            raise ValueError
        return b"file"

    monkeypatch.setattr(delivery, "encode_image", fails)
    events = await read(under.submit(1, preview_every=1))
    assert not of(Preview, events)
    assert isinstance(events[-1], Finished)
    assert under.model.previews[0] == [True]


async def test_equal_images_are_drawn_once_and_one_of_two_may_leave(under: Under) -> None:
    under.model.gate = threading.Semaphore(1)
    leaving, staying = under.submit(1, steps=4), under.submit(1, 1, steps=4)
    await under.until(lambda: len(under.model.log) == 1)
    leaving.close()
    under.model.gate.release(9)
    events = await read(staying)
    assert [(image.index, image.seed) for image in of(Image, events)] == [(0, 1), (1, 1)]
    assert of(Progress, events)[-1] == Progress(1, 4, 4)
    assert under.model.log == [[1]] * 4
    assert under.model.decoded == [[1]]


async def test_images_that_end_together_are_decoded_four_at_a_time_by_size(under: Under) -> None:
    under.engine._queue.max_batch = 20
    wide = under.submit(11, 12, steps=2, width=128)
    await asyncio.gather(read(under.submit(1, 2, 3, 4, 5, 6, steps=2)), read(wide))
    assert sorted(under.model.decoded) == [[1, 2, 3, 4], [5, 6], [11, 12]]


@pytest.mark.parametrize("where", ["begin", "step", "decode"])
async def test_an_image_that_fails_takes_its_own_request_only(under: Under, where: str) -> None:
    under.model.broken = {2: where}
    good, bad, shared = under.submit(1, 3), under.submit(2, 4, steps=3), under.submit(2)
    for one in (bad, shared):
        with pytest.raises(ValueError, match=where):
            await read(one)
    assert {image.seed for image in of(Image, await read(good))} == {1, 3}
    assert under.engine.active == 0


async def test_a_file_that_cannot_be_made_fails_its_request(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "encode_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await read(under.submit(1))
    assert under.engine.active == 0


async def test_a_step_that_fails_as_a_whole_fails_all_and_the_next_request_starts_anew(under: Under) -> None:
    under.model.broken = {1: "whole step"}
    calls = [under.submit(1), under.submit(2)]
    for one in calls:
        with pytest.raises(ValueError, match="whole step"):
            await read(one)
    assert under.engine.active == 0
    assert isinstance((await read(under.submit(3)))[-1], Finished)


async def test_other_tasks_take_turns_with_steps_one_call_each(under: Under) -> None:
    under.model.gate = threading.Semaphore(0)
    generation = under.submit(1, steps=4)
    tasks = [asyncio.create_task(under.run(name, calls)) for name, calls in (("a", 3), ("b", 2))]
    await asyncio.sleep(0.05)
    under.model.gate.release(9)
    first, second = await asyncio.gather(*tasks)
    await read(generation)
    assert (first.value, second.value) == ("result of a", "result of b")
    # The step that had begun alone, and then turn by turn.
    assert under.model.log == [[1], [1], "a", "b", [1], "a", "b", [1], "a"] or under.model.log == [
        *([[1], "a", "b"] * 2),
        [1],
        "a",
        [1],
    ]
    assert first.queue_us > 40_000
    assert not first.cached


async def test_identical_tasks_run_once_and_outlive_the_caller_who_came_first(under: Under) -> None:
    under.model.gate = threading.Semaphore(0)
    holding = under.submit(1, steps=2)
    leader, follower = (asyncio.create_task(under.run("a", 3)) for _ in range(2))
    await asyncio.sleep(0.05)
    leader.cancel()
    under.model.gate.release(9)
    assert (await follower).value == "result of a"
    assert under.model.log.count("a") == 3
    await read(holding)
    assert under.engine.active == 0


async def test_a_task_that_all_have_left_gets_no_further_call(under: Under) -> None:
    under.model.gate = threading.Semaphore(2)
    holding = under.submit(1, steps=5)
    task = asyncio.create_task(under.run("a", 10))
    await under.until(lambda: under.model.log.count("a") == 1)
    task.cancel()
    await asyncio.sleep(0)
    under.model.gate.release(9)
    await read(holding)
    assert under.model.log.count("a") <= 2
    assert under.engine.active == 0


async def test_a_task_that_fails_fails_all_its_callers_and_nobody_else(under: Under) -> None:
    def broken() -> Any:
        raise ValueError("begin")

    generation = under.submit(1)
    outcomes = await asyncio.gather(*(under.run("a", begin=broken) for _ in range(2)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["begin", "begin"]
    assert isinstance((await read(generation))[-1], Finished)
    assert (await under.run("a")).value == "result of a"


async def test_tasks_and_images_share_the_places(under: Under) -> None:
    under.model.gate = threading.Semaphore(0)
    for seed in range(24):
        under.submit(seed)
    with pytest.raises(QueueFull):
        await under.run("a")
    with pytest.raises(QueueFull):
        under.submit(30)


async def test_closing_fails_what_waits_and_leaves_the_worker_to_its_owner(under: Under) -> None:
    under.model.gate = threading.Semaphore(0)
    generation = under.submit(1)
    task = asyncio.create_task(under.run("a"))
    await asyncio.sleep(0.02)
    await under.engine.close()
    with pytest.raises(Draining):
        await read(generation)
    with pytest.raises(Draining):
        await task
    with pytest.raises(Draining):
        under.submit(2)
    under.model.gate.release(9)
    assert await under.worker.run(lambda: "still there") == "still there"
    assert under.engine.active == 0

"""The service through a real server and a real stub."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from faceteer.v1 import generator_pb2, tensor_pb2
from faceteer_runtime.bundle import seal
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from PIL import Image
from rpc_errors import read_error
from tiny_bundle import EMBED_DIM
from unit.generator.generator_specs import embeds_of

REVISION = "0123456789abcdef"


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    array = np.asarray(array, dtype="<f4")
    return tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def request(seed: int = 1, preview_every: int = 0, **settings: Any) -> generator_pb2.GenerateRequest:
    return generator_pb2.GenerateRequest(
        input=tensor_pb2.EmbedsInput(embeds=tensor(embeds_of(seed))),
        settings=generator_pb2.GenerationSettings(**({"seeds": [seed]} | settings)),
        preview_every=preview_every,
    )


async def events(serving: Any, message: generator_pb2.GenerateRequest, **options: Any) -> list[Any]:
    return [event async for event in serving.stub.Generate(message, timeout=60, **options)]


def kinds(answers: list[Any]) -> list[str]:
    return [answer.WhichOneof("event") for answer in answers]


def images(answers: list[Any]) -> list[Any]:
    return [answer.image for answer in answers if answer.WhichOneof("event") == "image"]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that nobody announces; fails when it takes too long."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the engine has no event for tests
            await asyncio.sleep(0.01)


async def idle(serving: Any, seconds: float = 10.0) -> None:
    """Waits until nothing is drawn any more."""
    await until(lambda: serving.engine.active == 0, seconds)


async def until_progress(call: Any) -> None:
    """Reads until the first step is done."""
    async for event in call:
        if event.WhichOneof("event") == "progress":
            return


async def test_a_picture_comes_with_its_events_in_order(serve: Any) -> None:
    serving = await serve()
    answers = await events(serving, request(7, preview_every=2))
    order = kinds(answers)
    assert order[:2] == ["queued", "started"]
    assert order[-2:] == ["image", "finished"]
    assert set(order[2:-2]) == {"progress", "preview"}
    assert answers[1].started.seeds == [7]
    settings = answers[1].started.settings
    assert (settings.width, settings.height, settings.steps, settings.guidance_scale) == (64, 64, 4, 2.0)
    assert (settings.scheduler, settings.format) == (
        generator_pb2.SCHEDULER_DDIM,
        generator_pb2.IMAGE_FORMAT_PNG,
    )
    steps = [answer.progress.step for answer in answers if answer.WhichOneof("event") == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4
    previews = [answer.preview for answer in answers if answer.WhichOneof("event") == "preview"]
    assert [preview.step for preview in previews] == [2]
    with Image.open(io.BytesIO(previews[0].data)) as preview:
        assert preview.size == (64, 64)
    execution = answers[-1].finished.execution
    assert execution.compute_us > 0
    assert not execution.cached
    assert execution.request_id


async def test_get_generator_publishes_defaults_and_limits(serve: Any) -> None:
    serving = await serve(generator_max_batch=5, generator_max_seeds=3)
    answer = await serving.stub.GetGenerator(generator_pb2.GetGeneratorRequest())
    assert answer.embed_dim == EMBED_DIM
    assert answer.encoder_revision == REVISION
    assert [(size.width, size.height) for size in answer.sizes] == [(64, 64), (128, 64)]
    assert (answer.max_steps, answer.max_seeds, answer.max_batch, answer.has_prior) == (200, 3, 5, False)
    assert (answer.defaults.steps, answer.defaults.guidance_scale) == (4, 2.0)
    assert len(answer.schedulers) == 4
    assert (answer.kind, answer.reads_images) == ("kandinsky-2-2", True)
    assert (answer.size_multiple, answer.max_pixels) == (0, 0)


async def test_a_size_rule_is_published_and_served(serve: Any, generator_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(generator_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["parts"]["generator"] |= {"size_multiple": 32, "max_pixels": 128 * 128}
    seal(bundle, manifest)
    serving = await serve(bundle=bundle)
    answer = await serving.stub.GetGenerator(generator_pb2.GetGeneratorRequest())
    assert (answer.size_multiple, answer.max_pixels) == (32, 16384)
    (image,) = images(await events(serving, request(1, width=96, height=160)))
    assert (image.width, image.height) == (96, 160)


async def test_a_picture_drawn_before_comes_from_the_cache_and_no_model_runs(serve: Any) -> None:
    serving = await serve()
    first = await events(serving, request(3, seeds=[3, 4]))
    second = await events(serving, request(3, seeds=[4, 3]))
    assert kinds(second) == ["queued", "started", "image", "image", "finished"]
    assert [image.cached for image in images(second)] == [True, True]
    assert {image.seed: image.data for image in images(first)} == {image.seed: image.data for image in images(second)}
    assert second[-1].finished.execution.cached
    assert second[-1].finished.execution.compute_us == 0
    partly = await events(serving, request(3, seeds=[3, 5]))
    assert kinds(partly)[:2] == ["queued", "started"]
    assert {image.seed: image.cached for image in images(partly)} == {3: True, 5: False}
    assert not partly[-1].finished.execution.cached
    for change in ({"steps": 5}, {"guidance_scale": 2.5}, {"width": 128}, {"scheduler": 1}, {"format": 2}):
        assert not images(await events(serving, request(3, seeds=[3], **change)))[0].cached, change


async def test_identical_concurrent_requests_are_drawn_once(serve: Any) -> None:
    serving = await serve()
    answers = await asyncio.gather(*(events(serving, request(3, steps=30)) for _ in range(6)))
    assert len({images(answer)[0].data for answer in answers}) == 1
    assert all(kinds(answer)[:2] == ["queued", "started"] for answer in answers)
    # 30 steps of one picture, whatever number of callers waits for it.
    assert serving.server.resources.metrics.value("faceteer_batch_size_sum", batcher="generator") == 30


async def test_one_of_two_identical_requests_may_leave(serve: Any) -> None:
    serving = await serve()
    call = serving.stub.Generate(request(3, steps=60))
    await until_progress(call)
    other = asyncio.create_task(events(serving, request(3, steps=60)))
    await asyncio.sleep(0.05)
    call.cancel()
    assert kinds(await other)[-1] == "finished"


async def test_no_seed_means_one_that_the_server_picks_and_reports(serve: Any) -> None:
    serving = await serve()
    first, second = await events(serving, request(seeds=[])), await events(serving, request(seeds=[]))
    assert first[1].started.seeds == [images(first)[0].seed]
    assert first[1].started.seeds != second[1].started.seeds
    again = await events(serving, request(seeds=first[1].started.seeds))
    assert images(again)[0].data == images(first)[0].data


async def test_an_embedding_is_found_under_its_id_or_has_expired(serve: Any) -> None:
    serving = await serve()
    embedding_id = embeds_content_id(REVISION, embeds_of(1))
    serving.server.resources.cache.put(embeds_key(embedding_id), {"embeds": embeds_of(1)})
    by_id = generator_pb2.GenerateRequest(input=tensor_pb2.EmbedsInput(embedding_id=embedding_id))
    by_id.settings.seeds.append(1)
    assert images(await events(serving, by_id))[0].data == images(await events(serving, request(1)))[0].data
    by_id.input.embedding_id = embedding_id[:-1] + ("0" if embedding_id[-1] != "0" else "1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(serving, by_id)
    assert read_error(caught.value).reason == "EMBEDDING_EXPIRED"
    foreign = embeds_content_id("feedfeedfeedfeed", embeds_of(1))
    serving.server.resources.cache.put(embeds_key(foreign), {"embeds": embeds_of(1)})
    by_id.input.embedding_id = foreign
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(serving, by_id)
    assert read_error(caught.value).reason == "REVISION_MISMATCH"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"steps": 201}, "settings.steps"),
        ({"steps": 51, "scheduler": generator_pb2.SCHEDULER_LCM}, "settings.steps"),
        ({"width": 63}, "settings.width"),
        ({"height": 128}, "settings.width"),
        ({"guidance_scale": float("nan")}, "settings.guidance_scale"),
        ({"guidance_scale": float("inf")}, "settings.guidance_scale"),
        ({"guidance_scale": -0.1}, "settings.guidance_scale"),
        ({"guidance_scale": 30.5}, "settings.guidance_scale"),
        ({"seeds": range(17)}, "settings.seeds"),
        ({"scheduler": 9}, "settings.scheduler"),
        ({"format": 9}, "settings.format"),
        ({"quality": 101}, "settings.quality"),
    ],
    ids=str,
)
async def test_settings_out_of_range_are_refused_by_field(serve: Any, settings: dict[str, Any], field: str) -> None:
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(serving, request(1, **settings))
    failure = read_error(caught.value)
    assert (failure.code, failure.fields) == ("INVALID_ARGUMENT", [field])


async def test_missing_and_unusable_embeds_are_refused_by_field(serve: Any) -> None:
    serving = await serve()
    good = request(1)
    faults: list[tuple[generator_pb2.GenerateRequest, str]] = [(generator_pb2.GenerateRequest(), "input")]
    for array in (np.zeros(EMBED_DIM + 1), np.zeros((1, EMBED_DIM)), np.full(EMBED_DIM, np.nan)):
        bad = generator_pb2.GenerateRequest(input=tensor_pb2.EmbedsInput(embeds=tensor(array)))
        faults.append((bad, "input.embeds"))
        negative = generator_pb2.GenerateRequest(input=good.input, negative=bad.input)
        faults.append((negative, "negative.embeds"))
    faults.append((generator_pb2.GenerateRequest(input=good.input, negative=tensor_pb2.EmbedsInput()), "negative"))
    for message, field in faults:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(serving, message)
        failure = read_error(caught.value)
        assert failure.code == "INVALID_ARGUMENT"
        assert failure.fields[0].startswith(field)


async def test_negative_embeds_steer_the_picture(serve: Any) -> None:
    serving = await serve()
    message = request(1)
    plain = images(await events(serving, message))[0].data
    message.negative.embeds.CopyFrom(tensor(embeds_of(2)))
    assert images(await events(serving, message))[0].data != plain


async def test_there_is_no_prior(serve: Any) -> None:
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.EmbedPrompt(generator_pb2.EmbedPromptRequest(prompt="a boat"))
    assert read_error(caught.value).reason == "NOT_IN_BUNDLE"


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
async def test_who_goes_away_is_drawn_no_further_and_neighbours_finish(serve: Any, leave: str) -> None:
    serving = await serve()
    neighbour = asyncio.create_task(events(serving, request(2, steps=40)))
    gone = serving.stub.Generate(request(1, steps=200, seeds=range(8)), timeout=0.6 if leave == "deadline" else None)
    await until_progress(gone)
    if leave == "cancel":
        gone.cancel()
    assert await gone.code() == (grpc.StatusCode.CANCELLED if leave == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED)
    assert kinds(await neighbour)[-1] == "finished"
    await idle(serving)
    # 8 pictures of 200 steps were not drawn to their end.
    assert serving.server.resources.metrics.value("faceteer_batch_size_sum", batcher="generator") < 800


async def test_a_full_queue_is_refused_at_once_and_recovers(serve: Any) -> None:
    serving = await serve(generator_max_batch=2, generator_max_queue=2)
    # Something has to have run, or there is no rate to estimate from.
    await events(serving, request(99))
    calls = [asyncio.create_task(events(serving, request(seed, steps=30))) for seed in range(12)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [read_error(outcome) for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(refused) == 8
    assert all((failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL") for failure in refused)
    assert all(failure.retry_after is not None and 0 < failure.retry_after < 30 for failure in refused)
    assert sum(kinds(outcome)[-1] == "finished" for outcome in outcomes if isinstance(outcome, list)) == 4
    await idle(serving)
    assert kinds(await events(serving, request(50)))[-1] == "finished"


async def test_many_seeds_do_not_keep_one_picture_waiting(serve: Any) -> None:
    serving = await serve(generator_max_batch=2)
    many = serving.stub.Generate(request(1, steps=20, seeds=range(8)))
    await until_progress(many)
    single = asyncio.create_task(events(serving, request(30, steps=20)))
    done_before = [event async for event in many if event.WhichOneof("event") == "image" and not single.done()]
    assert kinds(await single)[-1] == "finished"
    assert len(done_before) <= 2


async def test_embeds_that_overflow_fail_alone(serve: Any) -> None:
    serving = await serve()
    wild = request(1, steps=20)
    wild.input.embeds.CopyFrom(tensor(np.full(EMBED_DIM, 3e38)))
    good, bad = await asyncio.gather(
        events(serving, request(2, steps=20)), events(serving, wild), return_exceptions=True
    )
    assert isinstance(good, list)
    assert kinds(good)[-1] == "finished"
    assert isinstance(bad, grpc.aio.AioRpcError)
    assert "overflowed at step" in read_error(bad).message
    await idle(serving)


async def test_a_slow_reader_holds_nobody_up_and_misses_no_picture(serve: Any) -> None:
    serving = await serve()
    slow = serving.stub.Generate(request(1, steps=100, seeds=[1, 2], preview_every=1))
    reading = aiter(slow)
    first = await anext(reading)
    assert first.WhichOneof("event") == "queued"
    assert kinds(await events(serving, request(9)))[-1] == "finished"
    await idle(serving, 60)
    rest = [event async for event in reading]
    assert len(images(rest)) == 2
    assert kinds(rest)[-1] == "finished"


async def test_the_files_are_what_was_asked_for(serve: Any) -> None:
    serving = await serve()
    (png,) = images(await events(serving, request(1, width=128)))
    (webp,) = images(await events(serving, request(1, width=128, format=generator_pb2.IMAGE_FORMAT_WEBP)))
    lossy = images(await events(serving, request(1, width=128, format=generator_pb2.IMAGE_FORMAT_WEBP, quality=20)))[0]
    pixels = []
    for picture, format in ((png, "PNG"), (webp, "WEBP"), (lossy, "WEBP")):
        with Image.open(io.BytesIO(picture.data)) as image:
            assert (image.format, image.size) == (format, (128, 64)) == (format, (picture.width, picture.height))
            pixels.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert len(lossy.data) < len(webp.data)


async def test_stopping_the_server_ends_what_is_drawn(serve: Any) -> None:
    serving = await serve()
    call = asyncio.create_task(events(serving, request(1, steps=200)))
    await until(lambda: serving.engine.active > 0)
    await serving.server.stop(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert serving.engine.active == 0

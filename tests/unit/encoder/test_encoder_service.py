"""EncoderService through a real server: each content once, each fault alone, room for everybody."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import open_clip
import pytest
import torch
from faceteer.v1 import encoder_pb2, tensor_pb2
from faceteer_encoder.admission import Capacity
from faceteer_encoder.model import load_encoder
from faceteer_encoder.service import build
from faceteer_encoder.settings import EncoderSettings
from faceteer_runtime.bundle import BundleError, seal
from faceteer_runtime.cache_keys import embeds_key
from faceteer_runtime.errors import QueueFull
from faceteer_runtime.server import start
from files_entered import files_entered
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from rpc_errors import Failure, read_error, read_item
from safetensors.torch import load_file, save_file
from tiny_bundle import EMBED_DIM, _write_encoder, picture, picture_bytes

Serve = Callable[..., Any]
FLOAT16 = tensor_pb2.ELEMENT_TYPE_FLOAT16
IMAGES = encoder_pb2.EncodeImagesRequest
TEXTS = encoder_pb2.EncodeTextsRequest


def values(message: tensor_pb2.Tensor) -> np.ndarray:
    dtype = "<f2" if message.element_type == FLOAT16 else "<f4"
    assert list(message.shape) == [EMBED_DIM]
    return np.frombuffer(message.data, dtype).astype(np.float32)


async def encode(served: Any, *images: bytes, **more: Any) -> encoder_pb2.EncodeImagesResponse:
    answer: encoder_pb2.EncodeImagesResponse = await served.stub.EncodeImages(IMAGES(images=images, **more))
    return answer


async def refused(call: Any) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_error(caught.value)


def reference(bundle: Path) -> tuple[open_clip.CLIP, Callable[[Image.Image], torch.Tensor], dict[str, Any]]:
    """open_clip itself: model, transform and configuration."""
    config = json.loads((bundle / "encoder" / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"]).eval()
    model.load_state_dict(load_file(bundle / "encoder" / "open_clip_model.safetensors"))
    return model, image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False), config


async def test_the_service_says_what_it_serves_and_its_limits(serve: Serve) -> None:
    served = await serve(encoder_max_batch=5, encoder_max_image_bytes=1000, encoder_max_image_pixels=2000)
    answer = await served.stub.GetEncoder(encoder_pb2.GetEncoderRequest())
    revision = served.server.resources.bundle.part("encoder").revision
    assert answer == encoder_pb2.GetEncoderResponse(
        revision=revision,
        bundle="tiny",
        embed_dim=EMBED_DIM,
        image_size=64,
        max_batch=5,
        max_image_bytes=1000,
        max_image_pixels=2000,
        has_text_tower=True,
        context_length=16,
    )


async def test_embeds_are_open_clips_raw_projections(served: Any, encoder_bundle: Path) -> None:
    model, transform, config = reference(encoder_bundle)
    tokenizer = open_clip.SimpleTokenizer(
        str(encoder_bundle / "encoder" / "bpe_simple_vocab.txt.gz"),
        context_length=config["model_cfg"]["text_cfg"]["context_length"],
    )
    texts = ["a boat at night", "two red", "snow " * 40]
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(picture(seed, 90)) for seed in range(5)])).numpy()
        words = model.encode_text(tokenizer(texts)).numpy()
    answer = await encode(served, *(picture_bytes(seed, 90) for seed in range(5)))
    for expected, result in zip(images, answer.results, strict=True):
        assert np.allclose(values(result.embedding.embeds), expected, rtol=1e-5, atol=1e-4)
        assert not np.isclose(np.linalg.norm(expected), 1.0, atol=0.5)
    spoken = await served.stub.EncodeTexts(TEXTS(texts=texts))
    for expected, result in zip(words, spoken.results, strict=True):
        assert np.allclose(values(result.embedding.embeds), expected, rtol=1e-5, atol=1e-4)


async def test_embeds_travel_as_float16_where_asked(served: Any) -> None:
    (wide,) = (await encode(served, picture_bytes(1))).results
    (half,) = (await encode(served, picture_bytes(1), element_type=FLOAT16)).results
    assert half.embedding.embeds.element_type == FLOAT16
    assert half.embedding.embedding_id == wide.embedding.embedding_id
    assert np.allclose(values(half.embedding.embeds), values(wide.embedding.embeds), rtol=1e-3)


async def test_a_picture_seen_before_is_neither_decoded_nor_encoded(served: Any) -> None:
    first = await encode(served, picture_bytes(1), picture_bytes(2))
    runs = served.value("faceteer_model_seconds_count", batcher="encoder_images")
    second = await encode(served, picture_bytes(2), picture_bytes(1))
    assert [result.cached for result in first.results] == [False, False]
    assert [result.cached for result in second.results] == [True, True]
    assert not first.execution.cached
    assert second.execution.cached
    assert second.execution.compute_us == second.execution.queue_us == 0
    assert first.execution.compute_us > 0
    assert second.results[0].embedding == first.results[1].embedding
    assert served.value("faceteer_model_seconds_count", batcher="encoder_images") == runs


async def test_two_pictures_of_equal_height_do_not_share_an_entry(served: Any) -> None:
    wide, narrow = Image.new("RGB", (120, 64), "navy"), Image.new("RGB", (70, 64), "orange")
    files = []
    for image in (wide, narrow):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    apart = [(await encode(served, file)).results[0] for file in files]
    assert not apart[1].cached
    assert apart[0].embedding.embedding_id != apart[1].embedding.embedding_id
    assert not np.allclose(values(apart[0].embedding.embeds), values(apart[1].embedding.embeds))


@pytest.fixture
def other_preprocessing(encoder_bundle: Path, tmp_path: Path) -> Path:
    """The same weights behind another preprocessing: another revision."""
    directory = tmp_path / "other"
    shutil.copytree(encoder_bundle, directory)
    path = directory / "encoder" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(config))
    seal(directory)
    return directory


async def test_another_revision_does_not_answer_from_the_first_ones_cache(
    serve: Serve, other_preprocessing: Path, encoder_bundle: Path
) -> None:
    first = await serve()
    one = (await encode(first, picture_bytes(1))).results[0]
    # The same process, the same cache.
    settings = EncoderSettings(listen="127.0.0.1:0", bundle=other_preprocessing)
    resources = type(first.server.resources)(
        settings,
        type(first.server.resources.bundle).open(other_preprocessing),
        first.server.resources.cache,
        first.server.resources.metrics,
    )
    second = await start(settings, build, resources)
    async with grpc.aio.insecure_channel(second.address) as channel:
        stub = type(first.stub)(channel)
        other = (await stub.EncodeImages(IMAGES(images=[picture_bytes(1)]))).results[0]
    await second.stop(0.0)
    assert not other.cached
    assert other.embedding.embedding_id.split("-")[0] != one.embedding.embedding_id.split("-")[0]
    assert not np.allclose(values(other.embedding.embeds), values(one.embedding.embeds), rtol=1e-3)


async def test_an_id_leads_others_to_the_embeds(served: Any) -> None:
    (result,) = (await encode(served, picture_bytes(4))).results
    record = await served.server.resources.cache.get(embeds_key(result.embedding.embedding_id))
    assert record["embeds"].tobytes() == result.embedding.embeds.data


async def test_a_foreign_record_under_an_id_is_a_miss(served: Any) -> None:
    (result,) = (await encode(served, picture_bytes(4))).results
    for record in ({"embeds": np.zeros(EMBED_DIM + 1, np.float32)}, {"x": b""}, {"embeds": b"bytes"}):
        served.server.resources.cache.put(embeds_key(result.embedding.embedding_id), record)
        (again,) = (await encode(served, picture_bytes(4))).results
        assert not again.cached
        assert np.allclose(values(again.embedding.embeds), values(result.embedding.embeds), rtol=1e-5)


async def test_the_same_picture_from_many_callers_at_once_is_encoded_once(served: Any) -> None:
    answers = await asyncio.gather(*(encode(served, picture_bytes(7, 300)) for _ in range(20)))
    assert len({answer.results[0].embedding.SerializeToString() for answer in answers}) == 1
    assert served.value("faceteer_batch_size_sum", batcher="encoder_images") == 1


async def test_the_same_picture_twice_in_one_call_is_encoded_once(served: Any) -> None:
    answer = await encode(served, *[picture_bytes(8)] * 6)
    assert len({result.embedding.embedding_id for result in answer.results}) == 1
    assert served.value("faceteer_batch_size_sum", batcher="encoder_images") == 1


async def test_pictures_of_different_calls_share_batches(served: Any) -> None:
    await asyncio.gather(*(encode(served, picture_bytes(seed)) for seed in range(64)))
    assert served.value("faceteer_batch_size_sum", batcher="encoder_images") == 64
    assert served.value("faceteer_batch_size_count", batcher="encoder_images") < 48


async def test_one_bad_picture_does_not_fail_its_neighbours(served: Any) -> None:
    good, bad, huge, last = (
        await encode(served, picture_bytes(1), b"not a picture", b"\x89PNG" + b"x" * 20_000_001, picture_bytes(2))
    ).results
    assert good.WhichOneof("result") == last.WhichOneof("result") == "embedding"
    for at, result, reason in ((1, bad, "UNREADABLE_IMAGE"), (2, huge, "IMAGE_TOO_LARGE")):
        failure = read_item(result.error)
        assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", reason)
        assert failure.fields == [f"images[{at}]"]
        assert failure.message.startswith(f"images[{at}]: ")


async def test_callers_who_share_a_bad_picture_each_learn_where_they_put_it(served: Any) -> None:
    answers = await asyncio.gather(encode(served, b"junk"), encode(served, picture_bytes(1), b"junk"))
    fields = [read_item(answer.results[-1].error).fields for answer in answers]
    assert fields == [["images[0]"], ["images[1]"]]


@pytest.mark.parametrize(
    ("method", "request_", "reason", "field"),
    [
        ("EncodeImages", IMAGES(), "INVALID_FIELD", "images"),
        ("EncodeImages", IMAGES(images=[b"x"] * 5), "BATCH_TOO_LARGE", "images"),
        ("EncodeImages", IMAGES(images=[b"x"], element_type=9), "INVALID_FIELD", "element_type"),
        ("EncodeTexts", TEXTS(), "INVALID_FIELD", "texts"),
        ("EncodeTexts", TEXTS(texts=["a"] * 5), "BATCH_TOO_LARGE", "texts"),
        ("EncodeTexts", TEXTS(texts=["a"], element_type=9), "INVALID_FIELD", "element_type"),
    ],
)
async def test_an_unusable_call_is_refused_by_field(
    serve: Serve, method: str, request_: Any, reason: str, field: str
) -> None:
    stub = (await serve(encoder_max_batch=4)).stub
    failure = await refused(getattr(stub, method)(request_))
    assert (failure.code, failure.reason, failure.fields) == ("INVALID_ARGUMENT", reason, [field])


async def test_empty_and_endless_texts_fail_alone(served: Any) -> None:
    answer = await served.stub.EncodeTexts(TEXTS(texts=["a boat", " ", "x" * 10_001, "snow", "a boat"]))
    kinds = [result.WhichOneof("result") for result in answer.results]
    assert kinds == ["embedding", "error", "error", "embedding", "embedding"]
    assert [read_item(answer.results[at].error).fields for at in (1, 2)] == [["texts[1]"], ["texts[2]"]]
    assert answer.results[0].embedding == answer.results[4].embedding
    again = await served.stub.EncodeTexts(TEXTS(texts=["snow"]))
    assert again.results[0].cached
    assert again.execution.cached


async def test_a_text_and_a_picture_of_the_same_bytes_are_two_things(served: Any) -> None:
    (text,) = (await served.stub.EncodeTexts(TEXTS(texts=["boat"]))).results
    (image,) = (await encode(served, b"boat")).results
    assert text.WhichOneof("result") == "embedding"
    assert image.WhichOneof("result") == "error"


async def stream(served: Any, pictures: dict[int, bytes]) -> dict[int, encoder_pb2.EncodeResult]:
    async def requests() -> AsyncIterator[encoder_pb2.StreamEncodeImagesRequest]:
        for number, data in pictures.items():
            yield encoder_pb2.StreamEncodeImagesRequest(sequence=number, image=data)

    return {answer.sequence: answer.result async for answer in served.stub.StreamEncodeImages(requests())}


async def test_a_stream_answers_every_picture_under_its_number(served: Any) -> None:
    pictures = {1000 + seed: picture_bytes(seed) for seed in range(150)} | {7: b"broken", 0: picture_bytes(3)}
    answers = await stream(served, pictures)
    assert answers.keys() == pictures.keys()
    failure = read_item(answers.pop(7).error)
    assert (failure.reason, failure.fields) == ("UNREADABLE_IMAGE", ["image"])
    assert answers[0].embedding == answers[1003].embedding
    (alone,) = (await encode(served, pictures[1100])).results
    assert answers[1100].embedding == alone.embedding
    assert served.value("faceteer_batch_size_count", batcher="encoder_images") < 120


async def test_an_empty_stream_ends_at_once(served: Any) -> None:
    assert await stream(served, {}) == {}


async def test_a_stream_longer_than_the_queue_waits_instead_of_failing(serve: Serve) -> None:
    served = await serve(max_queue=4, encoder_model_batch=8)
    one, other = await asyncio.gather(
        stream(served, {seed: picture_bytes(seed) for seed in range(40)}),
        stream(served, {seed: picture_bytes(100 + seed) for seed in range(40)}),
    )
    assert all(result.WhichOneof("result") == "embedding" for result in [*one.values(), *other.values()])


async def test_a_stream_whose_answers_nobody_reads_is_not_read_either(served: Any) -> None:
    total, sent = 40_000, 0
    pictures = [picture_bytes(seed) for seed in range(20)]

    async def requests() -> AsyncIterator[encoder_pb2.StreamEncodeImagesRequest]:
        nonlocal sent
        for number in range(total):
            yield encoder_pb2.StreamEncodeImagesRequest(sequence=number, image=pictures[number % 20])
            sent += 1

    # The transport itself holds some megabytes of requests and of answers, which are small; bounded, it holds less.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    async with grpc.aio.insecure_channel(served.server.address, options=options) as channel:
        call = type(served.stub)(channel).StreamEncodeImages(requests())
        await call.read()
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < total / 2
        call.cancel()


async def test_a_client_that_leaves_its_stream_leaves_nothing_behind(served: Any) -> None:
    async def endless() -> AsyncIterator[encoder_pb2.StreamEncodeImagesRequest]:
        number = 0
        while True:
            yield encoder_pb2.StreamEncodeImagesRequest(sequence=number, image=picture_bytes(number % 500, 200))
            number += 1

    call = served.stub.StreamEncodeImages(endless())
    for _ in range(5):
        await call.read()
    call.cancel()
    for _ in range(100):
        if served.value("faceteer_calls_in_flight") == 0:
            break
        await asyncio.sleep(0.05)
    assert served.value("faceteer_calls_in_flight") == 0
    assert (await encode(served, picture_bytes(900))).results[0].WhichOneof("result") == "embedding"


async def test_a_full_service_refuses_at_once_and_recovers(serve: Serve) -> None:
    served = await serve(max_queue=8, encoder_model_batch=2)
    calls = [encode(served, *(picture_bytes(100 * n + seed, 500) for seed in range(4))) for n in range(12)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert 0 < len(errors) < 12
    for error in errors:
        failure = read_error(error)
        assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert failure.retry_after is not None
        assert failure.retry_after > 0
    assert (await encode(served, picture_bytes(5))).results[0].WhichOneof("result") == "embedding"
    # What is cached needs no room.
    assert (await encode(served, picture_bytes(5))).execution.cached


async def test_a_call_larger_than_the_queue_is_taken_when_nothing_else_is_under_way(serve: Serve) -> None:
    served = await serve(max_queue=2)
    assert len((await encode(served, *(picture_bytes(seed) for seed in range(10)))).results) == 10


async def test_callers_who_go_away_do_not_hold_others_up(served: Any) -> None:
    calls = [served.stub.EncodeImages(IMAGES(images=[picture_bytes(seed, 300)])) for seed in range(30)]
    await asyncio.sleep(0.01)
    for call in calls[::2]:
        call.cancel()
    answers = await asyncio.gather(*calls[1::2])
    assert all(answer.results[0].WhichOneof("result") == "embedding" for answer in answers)


async def test_an_encoder_without_a_text_tower_serves_pictures_only(
    serve: Serve, encoder_bundle: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "pictures-only"
    shutil.copytree(encoder_bundle, directory)
    path = directory / "encoder" / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["model_cfg"]["text_cfg"]
    path.write_text(json.dumps(config))
    weights = load_file(directory / "encoder" / "open_clip_model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name.startswith("visual.")},
        directory / "encoder" / "open_clip_model.safetensors",
    )
    seal(directory)
    served, whole = await serve(directory), await serve()
    assert not (await served.stub.GetEncoder(encoder_pb2.GetEncoderRequest())).has_text_tower
    failure = await refused(served.stub.EncodeTexts(TEXTS(texts=["a boat"])))
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "NOT_IN_BUNDLE")
    one, other = (await encode(served, picture_bytes(1))).results, (await encode(whole, picture_bytes(1))).results
    assert np.allclose(values(one[0].embedding.embeds), values(other[0].embedding.embeds), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_is_close(serve: Serve, dtype: str) -> None:
    half, whole = await serve(encoder_dtype=dtype), await serve()
    a, b = [values((await encode(one, picture_bytes(3))).results[0].embedding.embeds) for one in (half, whole)]
    assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)
    assert (await half.stub.EncodeTexts(TEXTS(texts=["a boat"]))).results[0].WhichOneof("result") == "embedding"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    _write_encoder(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda weights: weights.pop("visual.proj"), "'visual.proj' is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "'extra' does not belong"),
        (
            lambda weights: weights.update({"visual.proj": torch.zeros(3, 3)}),
            r"'visual.proj' has shape \[3, 3\], but .* asks for \[32, 32\]",
        ),
        (lambda weights: weights["visual.proj"].fill_(torch.nan), "'visual.proj' holds NaN"),
    ],
    ids=["missing", "unknown", "misshapen", "nan"],
)
def test_weights_that_do_not_fit_are_refused(own: Path, fault: Callable[[Any], Any], words: str) -> None:
    weights = load_file(own / "open_clip_model.safetensors")
    fault(weights)
    save_file(weights, own / "open_clip_model.safetensors")
    with pytest.raises(BundleError, match=words):
        load_encoder(own)


def test_missing_and_broken_files_are_named(own: Path) -> None:
    (own / "open_clip_model.safetensors").write_bytes(b"junk")
    with pytest.raises(BundleError, match=r"open_clip_model\.safetensors: not a readable"):
        load_encoder(own)
    (own / "open_clip_model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"open_clip_model\.safetensors: missing"):
        load_encoder(own)
    (own / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(BundleError, match=r"open_clip_config\.json: not a usable configuration"):
        load_encoder(own)
    (own / "open_clip_config.json").unlink()
    with pytest.raises(BundleError, match=r"open_clip_config\.json: missing"):
        load_encoder(own)


async def hold(capacity: Capacity, until: asyncio.Event) -> None:
    async with capacity.waiting():
        await until.wait()


async def test_room_is_held_waited_for_and_given_back() -> None:
    capacity, until = Capacity(2), asyncio.Event()
    with capacity.holding(2):
        with pytest.raises(QueueFull), capacity.holding(1):
            pass
        with capacity.holding(0):
            waiting = [asyncio.create_task(hold(capacity, until)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        assert capacity.taken == 2
    await asyncio.sleep(0)
    assert capacity.taken == 2
    until.set()
    await asyncio.wait_for(asyncio.gather(*waiting[1:]), 1)
    assert capacity.taken == 0


async def test_one_call_may_hold_more_than_the_limit_only_when_nothing_is_under_way() -> None:
    capacity = Capacity(2)
    with capacity.holding(5):
        assert capacity.taken == 5
    with capacity.holding(1), capacity.holding(1), pytest.raises(QueueFull), capacity.holding(1):
        pass
    assert capacity.taken == 0


async def test_room_given_to_a_caller_who_left_goes_to_the_next() -> None:
    capacity, until = Capacity(1), asyncio.Event()
    with capacity.holding(1):
        first, second = (asyncio.create_task(hold(capacity, until)) for _ in range(2))
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert capacity.taken == 1
    until.set()
    await asyncio.wait_for(second, 1)


def test_a_refusal_estimates_when_the_items_under_way_will_be_done() -> None:
    capacity = Capacity(1)
    capacity.took(2.0)
    capacity.took(4.0)
    with capacity.holding(3), pytest.raises(QueueFull) as full, capacity.holding(1):
        pass
    assert full.value.retry_after_s == pytest.approx(3 * (0.9 * 2 + 0.1 * 4))
    with capacity.holding(1), pytest.raises(QueueFull) as full, capacity.holding(1):
        pass
    assert full.value.retry_after_s == pytest.approx(2.2)
    with Capacity(1).holding(1):
        pass


async def test_a_call_goes_down_from_the_servicer_to_the_model_through_few_files(serve: Serve) -> None:
    with files_entered("EncodeImages") as entered:
        await encode(await serve(), picture_bytes(1))
    ours = {file.removeprefix("faceteer_encoder/") for file in entered if file.startswith("faceteer_encoder/")}
    assert len(ours) <= 6, ours
    assert {"servicer.py", "application.py", "model.py"} <= ours

"""Inversion: the formula by hand, noise that draws the picture again, and the calls that bring it to users."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from faceteer.v1 import generator_pb2, tensor_pb2
from faceteer_generator.denoise import Denoiser
from faceteer_generator.inversion import Inversion, linear_step
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.requests import ImageSpec, ImageStart, NoiseStart
from faceteer_generator.schedulers import DdimTable
from PIL import Image
from rpc_errors import read_error
from tiny_bundle import EMBED_DIM, picture, picture_bytes
from unit.generator.generator_specs import embeds_of, image_spec
from unit.generator.small_kandinsky import write_small_kandinsky

POSTCARDS = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_a_ddim_step_is_linear_in_latents_and_output(prediction_type: str, set_alpha_to_one: bool) -> None:
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=set_alpha_to_one, steps_offset=1
    )
    scheduler.set_timesteps(7)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for timestep, row in zip(scheduler.timesteps, DdimTable.linear(scheduler).values.tolist(), strict=True):
        a, b = linear_step(prediction_type, *row)
        torch.testing.assert_close(a * x + b * output, scheduler.step(output, timestep, x).prev_sample)


def test_steps_of_a_model_that_predicts_the_sample_cannot_be_inverted() -> None:
    with pytest.raises(ValueError, match="cannot be inverted"):
        linear_step("sample", 0.5, 0.8, 1.0, 0.0)


def inverted(denoiser: Denoiser, asked: ImageSpec, iterations: int) -> Inversion:
    inversion = denoiser.begin_inversion(asked)
    inversion._iterations = iterations
    while not inversion.done:
        inversion.advance()
    return inversion


def error_of(denoiser: Denoiser, asked: ImageSpec, inversion: Inversion) -> float:
    """How far the latents drawn from the noise are from the picture's, relative."""
    assert isinstance(asked.start, ImageStart)
    fields = {name: getattr(asked, name) for name in asked.__dataclass_fields__}
    again = denoiser.begin(ImageSpec(**(fields | {"start": NoiseStart(inversion.noise, "noise")})))
    while not again.done:
        denoiser.step([again])
    true = denoiser.encode(asked.start.pixels)
    return float((again.latents - true).norm() / true.norm())


@pytest.fixture(scope="module")
def postcards() -> Denoiser:
    return Denoiser(load_decoder(POSTCARDS / "generator"))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_noise_of_a_postcard_draws_it_again_and_iterations_improve_it(postcards: Denoiser, guidance: float) -> None:
    from faceteer_encoder.model import load_encoder

    encoder, _ = load_encoder(POSTCARDS / "encoder")
    with Image.open(POSTCARDS / "examples" / "boat-day.png") as image:
        pixels = np.array(image.convert("RGB").resize((64, 64)))
    (embeds,) = encoder.encode_images([pixels])
    asked = image_spec(0, embeds=embeds, steps=15, guidance_scale=guidance, start=ImageStart.of(pixels))
    once, often = inverted(postcards, asked, 1), inverted(postcards, asked, 12)
    assert once.calls == 15 < often.calls <= 180
    errors = error_of(postcards, asked, once), error_of(postcards, asked, often)
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


def test_a_published_layout_is_inverted_though_its_scheduler_clips(tmp_path: Path) -> None:
    decoder = load_decoder(write_small_kandinsky(tmp_path / "generator"))
    assert isinstance(decoder, KandinskyDecoder)
    assert decoder.scheduler_config["clip_sample"]
    # Random weights change their mind over a step as no trained ones do.
    decoder.unet.conv_out.weight.mul_(0.1)
    denoiser = Denoiser(decoder)
    asked = image_spec(2, steps=20, guidance_scale=1.0, start=ImageStart.of(np.array(picture(3, 64))))
    errors = [error_of(denoiser, asked, inverted(denoiser, asked, iterations)) for iterations in (1, 8)]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 5


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(element_type=1, shape=array.shape, data=array.astype("<f4").tobytes())


SOURCE = tensor_pb2.EmbedsInput(embeds=tensor(embeds_of(1)))


def invert(image: bytes | None = None, **settings: Any) -> generator_pb2.InvertImageRequest:
    return generator_pb2.InvertImageRequest(
        image=picture_bytes(1) if image is None else image,
        input=SOURCE,
        settings=generator_pb2.GenerationSettings(**settings),
    )


def generate(start: generator_pb2.GenerationStart, **settings: Any) -> generator_pb2.GenerateRequest:
    chosen = generator_pb2.GenerationSettings(**({"seeds": [1], "guidance_scale": 1.0} | settings))
    return generator_pb2.GenerateRequest(input=SOURCE, settings=chosen, start=start)


async def images(serving: Any, message: generator_pb2.GenerateRequest) -> list[Any]:
    return [event.image async for event in serving.stub.Generate(message) if event.WhichOneof("event") == "image"]


def pixels_of(image: Any) -> np.ndarray:
    with Image.open(io.BytesIO(image.data)) as opened:
        return np.asarray(opened).astype(int)


async def test_noise_is_found_once_cached_and_draws_the_picture_again(serve: Any, decoder: KandinskyDecoder) -> None:
    serving = await serve()
    answers = await asyncio.gather(*(serving.stub.InvertImage(invert(steps=12)) for _ in range(3)))
    assert len({answer.noise_id for answer in answers}) == 1
    answer = answers[0]
    assert list(answer.noise.shape) == [4, 16, 16]
    assert answer.execution.compute_us > 0
    assert not answer.execution.cached
    again = await serving.stub.InvertImage(invert(steps=12))
    assert again.execution.cached
    assert again.noise == answer.noise
    for change in ({"guidance_scale": 2.0}, {"steps": 5}, {"width": 128}):
        other = await serving.stub.InvertImage(invert(**change))
        assert other.noise_id != answer.noise_id
    drawn = await images(
        serving, generate(generator_pb2.GenerationStart(noise_id=answer.noise_id), seeds=[5, 6], steps=12)
    )
    assert [image.seed for image in drawn] == [5, 6]
    assert drawn[0].data == drawn[1].data
    denoiser = Denoiser(decoder)
    (expected,) = denoiser.decode([denoiser.encode(np.array(picture(1)))])
    assert np.abs(pixels_of(drawn[0]) - expected.astype(int)).mean() < 1


async def test_a_picture_goes_on_being_drawn_while_another_is_inverted(serve: Any) -> None:
    serving = await serve()
    drawing_call = serving.stub.Generate(
        generator_pb2.GenerateRequest(input=SOURCE, settings=generator_pb2.GenerationSettings(steps=40, seeds=[1]))
    )
    inversion = asyncio.ensure_future(serving.stub.InvertImage(invert(steps=40)))
    steps_before = 0
    async for event in drawing_call:
        if event.WhichOneof("event") == "progress" and not inversion.done():
            steps_before += 1
    assert (await inversion).noise_id
    # Neither waits for the other to end: 40 steps and at least 40 calls take turns.
    assert steps_before > 15


async def test_an_image_start_comes_cached_and_by_its_own_strength(serve: Any) -> None:
    serving = await serve()

    def start(strength: float | None, number: int = 1) -> generator_pb2.GenerateRequest:
        image = generator_pb2.GenerationStart(image=picture_bytes(number), strength=strength)
        return generate(image, steps=10)

    events = [event async for event in serving.stub.Generate(start(0.5))]
    progress = [event.progress for event in events if event.WhichOneof("event") == "progress"]
    assert {one.steps for one in progress} == {5}
    first = next(event.image for event in events if event.WhichOneof("event") == "image")
    assert (await images(serving, start(0.5)))[0].cached
    for other in (start(0.6), start(None), start(0.5, 2)):
        (image,) = await images(serving, other)
        assert not image.cached
        assert image.data != first.data
    assert (await images(serving, start(0.7)))[0].cached  # The default.


@pytest.mark.parametrize(
    ("start", "settings", "field"),
    [
        ({"image": b"no picture"}, {}, "start.image"),
        ({"image": b""}, {}, "start.image"),
        ({"image": picture_bytes(1)[:200]}, {}, "start.image"),
        ({"image": picture_bytes(1), "strength": 0.0}, {}, "start.strength"),
        ({"image": picture_bytes(1), "strength": 1.5}, {}, "start.strength"),
        ({"image": picture_bytes(1), "strength": float("nan")}, {}, "start.strength"),
        ({"noise_id": "x", "strength": 0.5}, {}, "start.strength"),
        ({"noise_id": "x"}, {"scheduler": generator_pb2.SCHEDULER_LCM}, "settings.scheduler"),
        ({}, {}, "start"),
    ],
)
async def test_a_start_that_cannot_be_names_the_field(
    serve: Any, start: dict[str, Any], settings: dict[str, Any], field: str
) -> None:
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await images(serving, generate(generator_pb2.GenerationStart(**start), **settings))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert read_error(caught.value).fields == [field]


async def test_noise_for_other_settings_or_other_models_or_none_is_refused(serve: Any) -> None:
    serving = await serve()
    answer = await serving.stub.InvertImage(invert())
    revision, _, digest = answer.noise_id.rpartition("-")
    for noise_id, settings, reason in (
        (answer.noise_id, {"steps": 9}, "INVALID_FIELD"),
        (answer.noise_id, {"width": 128}, "INVALID_FIELD"),
        (f"{revision}-{'0' * 64}", {}, "NOISE_EXPIRED"),
        ("anything", {}, "NOISE_EXPIRED"),
        (f"{'f' * len(revision)}-{digest}", {}, "REVISION_MISMATCH"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await images(serving, generate(generator_pb2.GenerationStart(noise_id=noise_id), **settings))
        assert read_error(caught.value).reason == reason


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (invert(b"no picture"), "image"),
        (invert(width=100), "settings.width"),
        (invert(steps=1000), "settings.steps"),
        (generator_pb2.InvertImageRequest(image=picture_bytes(1)), "input"),
    ],
)
async def test_a_picture_that_cannot_be_inverted_names_the_field(serve: Any, message: Any, field: str) -> None:
    serving = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.InvertImage(message)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert read_error(caught.value).fields == [field]


async def test_pictures_beyond_the_limits_are_refused_undecoded(serve: Any) -> None:
    serving = await serve(generator_max_image_pixels=64 * 64 - 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.InvertImage(invert())
    assert read_error(caught.value).reason == "IMAGE_TOO_LARGE"


async def test_wild_embeds_fail_the_inversion_by_name(serve: Any) -> None:
    serving = await serve()
    message = invert()
    message.input.embeds.CopyFrom(tensor(np.full(EMBED_DIM, 3e38)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.stub.InvertImage(message)
    assert read_error(caught.value).fields == ["input"]

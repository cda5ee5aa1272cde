"""The generator on a GPU: the same pictures, compiled, offloaded and in half precision. Skips itself without one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline
from faceteer_generator.checkpoint import available_bytes, ensure_room
from faceteer_generator.denoise import Denoiser
from faceteer_generator.engine import Engine
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.prior import Imagining, load_prior
from faceteer_generator.prompts import Prompt
from faceteer_generator.requests import GenerationSettings, ImageSpec, ImageStart, NoiseStart
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.cache import Cache
from faceteer_runtime.metrics import Metrics
from unit.generator.generator_specs import image_spec
from unit.generator.small_kandinsky import write_small_kandinsky
from unit.generator.small_prior import write_small_prior
from unit.generator.small_sdxl import write_small_sdxl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_kandinsky(tmp_path_factory.mktemp("gpu") / "generator", clip_sample=False)


def drawn(directory: Path, *asked: ImageSpec, **options: Any) -> list[np.ndarray]:
    """Pixels of pictures drawn together."""
    decoder = load_decoder(directory, **({"device": "cuda", "dtype": "float32"} | options))
    denoiser = Denoiser(decoder)
    pictures = [denoiser.begin(one) for one in asked]
    while running := [picture for picture in pictures if not picture.done]:
        denoiser.step(running)
    assert not any(picture.error for picture in pictures)
    return denoiser.decode([picture.latents for picture in pictures])


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp", "lcm"])
def test_a_seed_is_the_same_picture_on_cpu_and_gpu(directory: Path, name: str) -> None:
    asked = image_spec(3, scheduler=name, steps=4, width=128)
    (here,), (there,) = drawn(directory, asked), drawn(directory, asked, device="cpu")
    assert mean_difference(here, there) < 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_loop_is_the_stock_pipelines_in_every_precision(directory: Path, dtype: str) -> None:
    decoder = load_decoder(directory, device="cuda", dtype=dtype)
    assert isinstance(decoder, KandinskyDecoder)
    asked = image_spec(3, scheduler="ddpm", steps=4, guidance_scale=4.0)
    denoiser = Denoiser(decoder)
    picture = denoiser.begin(asked)
    while not picture.done:
        denoiser.step([picture])
    scheduler = DDPMScheduler.from_config(decoder.scheduler_config)
    pipe = KandinskyV22Pipeline(unet=decoder.unet, scheduler=scheduler, movq=decoder.movq)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        torch.tensor(asked.embeds, dtype=decoder.dtype, device="cuda")[None],
        decoder.negative_embeds[None],
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="latent",
    ).images
    torch.testing.assert_close(picture.latents, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_draws_the_same_pictures(directory: Path, mode: str) -> None:
    asked = [image_spec(seed, steps=4) for seed in range(3)]
    for compiled, plain in zip(drawn(directory, *asked, compile=mode), drawn(directory, *asked), strict=True):
        assert mean_difference(compiled, plain) < 2


async def test_cuda_graphs_work_on_the_model_thread(directory: Path) -> None:
    # Graphs belong to the thread that recorded them; the service's first step is on the worker's.
    decoder = load_decoder(directory, device="cuda", dtype="float32", compile="reduce-overhead")
    worker = ModelWorker("generator")
    denoiser = Denoiser(decoder)
    picture = await worker.run(denoiser.begin, image_spec(1, steps=6))
    while not picture.done:
        await worker.run(denoiser.step, [picture])
    await asyncio.to_thread(worker.close)
    assert picture.error is None


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloaded_models_draw_the_same_picture_in_less_memory(directory: Path, how: str) -> None:
    asked = image_spec(1, steps=3)
    (whole,) = drawn(directory, asked)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    (offloaded,) = drawn(directory, asked, offload=how)
    assert mean_difference(whole, offloaded) < 2
    assert torch.cuda.memory_allocated() - before < 64 << 20


def test_a_picture_is_inverted_and_drawn_again(directory: Path) -> None:
    denoiser = Denoiser(load_decoder(directory, device="cuda", dtype="float32"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    inversion = denoiser.begin_inversion(image_spec(1, steps=10, guidance_scale=1.0, start=ImageStart.of(pixels)))
    while not inversion.done:
        inversion.advance()
    noise = NoiseStart(inversion.noise, "noise")
    again = denoiser.begin(image_spec(1, steps=10, guidance_scale=1.0, start=noise))
    while not again.done:
        denoiser.step([again])
    assert again.error is None


def test_sdxl_and_the_prior_run_there(tmp_path: Path) -> None:
    denoiser = Denoiser(load_decoder(write_small_sdxl(tmp_path / "sdxl"), kind="sdxl-ip-adapter", device="cuda"))
    picture = denoiser.begin(image_spec(1))
    while not picture.done:
        denoiser.step([picture])
    assert denoiser.decode([picture.latents])[0].shape == (64, 64, 3)
    embeds = []
    for device in ("cpu", "cuda"):
        prior = load_prior(
            write_small_prior(tmp_path / f"prior-{device}"), device=torch.device(device), dtype=torch.float32
        )
        imagining = Imagining(prior, Prompt("a cat", "", 1, 5, 4.0))
        while not imagining.done:
            imagining.advance()
        embeds.append(imagining.embeds())
    np.testing.assert_allclose(*embeds, rtol=1e-3, atol=1e-3)


def test_a_gpu_that_is_too_small_is_said_before_loading() -> None:
    device = torch.device("cuda")
    with pytest.raises(BundleError, match="FACETEER_GENERATOR_OFFLOAD"):
        ensure_room("weights", available_bytes(device) + 1, device)


async def test_the_engine_serves_from_it(directory: Path) -> None:
    decoder = load_decoder(directory, device="cuda")
    worker = ModelWorker("generator")
    engine = Engine(Denoiser(decoder), worker, Cache(1 << 20, Metrics()), max_batch=4, max_queue=4)
    try:
        settings = GenerationSettings(64, 64, 4, 2.0, (1, 2, 3), "ddim", "png", 0)
        specs = [(f"image {number}", image_spec(number)) for number in (1, 2, 3)]
        kinds = [type(event).__name__ async for event in engine.submit(settings, specs, {}).events()]
        assert kinds.count("Image") == 3
        assert kinds[-1] == "Finished"
    finally:
        await engine.close()
        await asyncio.to_thread(worker.close)

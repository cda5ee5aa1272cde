"""The denoising loop against diffusers' own pipeline and schedulers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, KandinskyV22Pipeline
from faceteer_generator.denoise import Denoiser, Denoising, ImageFailed, reduced
from faceteer_generator.kandinsky import KandinskyDecoder as Decoder
from faceteer_generator.requests import ImageSpec
from faceteer_generator.schedulers import CLASSES, DdimTable, ddim_step, estimate_clean, make_scheduler
from tiny_bundle import EMBED_DIM
from unit.generator.generator_specs import embeds_of, image_spec

NAMES = tuple(CLASSES)


@pytest.fixture(scope="module")
def pipeline(decoder: Decoder) -> KandinskyV22Pipeline:
    """diffusers' loop over the very same models, so that nothing but the loop can differ."""
    pipe = KandinskyV22Pipeline(unet=decoder.unet, scheduler=DDPMScheduler(), movq=decoder.movq)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(denoiser: Denoiser, *drawings: ImageSpec) -> list[Denoising]:
    """Draws all together, each leaving when it is done."""
    pictures = [denoiser.begin(one) for one in drawings]
    while running := [picture for picture in pictures if not picture.done]:
        denoiser.step(running)
    return pictures


def by_pipeline(pipeline: KandinskyV22Pipeline, scheduler: Any, asked: ImageSpec, output_type: str) -> Any:
    pipeline.scheduler = scheduler
    negative = torch.full((1, EMBED_DIM), 0.5) if asked.negative is None else torch.tensor(asked.negative)[None]
    return pipeline(
        torch.tensor(asked.embeds)[None],
        negative,
        height=asked.height,
        width=asked.width,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type=output_type,
    ).images


def stripped(name: str, config: dict[str, Any]) -> Any:
    """A scheduler the way a user of diffusers would make it."""
    return CLASSES[name].from_config({key: value for key, value in config.items() if key != "variance_type"})


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_one_picture_is_the_pipelines_bit_for_bit(
    decoder: Decoder, denoiser: Denoiser, pipeline: KandinskyV22Pipeline, name: str, guidance: float
) -> None:
    asked = image_spec(5, scheduler=name, guidance_scale=guidance, steps=5, width=128, seed=2**64 - 3)
    (picture,) = draw(denoiser, asked)
    latents = by_pipeline(pipeline, stripped(name, decoder.scheduler_config), asked, "latent")
    assert torch.equal(picture.latents, latents)
    (expected,) = by_pipeline(pipeline, stripped(name, decoder.scheduler_config), asked, "pil")
    (pixels,) = denoiser.decode([picture.latents])
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("name", NAMES)
def test_one_picture_is_that_of_a_pipeline_loaded_the_usual_way(
    generator_bundle: Path, decoder: Decoder, denoiser: Denoiser, name: str
) -> None:
    usual = KandinskyV22Pipeline.from_pretrained(generator_bundle / "generator")
    usual.set_progress_bar_config(disable=True)
    asked = image_spec(4, scheduler=name, guidance_scale=3.0, steps=6)
    (picture,) = draw(denoiser, asked)
    (expected,) = by_pipeline(usual, stripped(name, decoder.scheduler_config), asked, "pil")
    (pixels,) = denoiser.decode([picture.latents])
    # Another memory format, so other last bits.
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_a_requests_own_negative_is_the_pipelines_too(
    decoder: Decoder, denoiser: Denoiser, pipeline: KandinskyV22Pipeline
) -> None:
    asked = image_spec(5, negative=embeds_of(8), guidance_scale=3.0)
    (picture,) = draw(denoiser, asked)
    assert torch.equal(
        picture.latents, by_pipeline(pipeline, stripped("ddim", decoder.scheduler_config), asked, "latent")
    )


@pytest.fixture
def learned_variance(decoder: Decoder) -> Decoder:
    """The decoder as Kandinsky 2.2 itself is configured: DDPM, epsilon, a variance that the UNet predicts."""
    config = DDPMScheduler(
        variance_type="learned_range", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="epsilon"
    ).config
    return Decoder(decoder.unet, decoder.movq, dict(config), decoder.negative_embeds, decoder.device, decoder.dtype)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_learned_variance_is_used_by_ddpm_and_stripped_for_the_others(
    learned_variance: Decoder, pipeline: KandinskyV22Pipeline, name: str, guidance: float
) -> None:
    asked = image_spec(6, scheduler=name, guidance_scale=guidance, steps=5)
    (picture,) = draw(Denoiser(learned_variance), asked)
    config = learned_variance.scheduler_config
    scheduler = DDPMScheduler.from_config(config) if name == "ddpm" else stripped(name, config)
    assert picture.takes_variance == (name == "ddpm")
    assert torch.equal(picture.latents, by_pipeline(pipeline, scheduler, asked, "latent"))


def mixed() -> list[ImageSpec]:
    """Every scheduler, with and without guidance, two sizes, different steps, own and common negatives."""
    return [
        image_spec(
            seed,
            scheduler=NAMES[seed % 4],
            guidance_scale=(0.5, 3.0, 7.0)[seed % 3],
            steps=3 + seed % 4,
            width=128 if seed % 5 == 0 else 64,
            negative=embeds_of(seed + 50) if seed % 2 else None,
        )
        for seed in range(10)
    ]


def test_a_picture_is_the_same_whatever_shares_its_batch(denoiser: Denoiser) -> None:
    together = draw(denoiser, *mixed())
    for asked, picture in zip(mixed(), together, strict=True):
        (alone,) = draw(denoiser, asked)
        assert torch.allclose(picture.latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_joining_and_pausing_midway_changes_nothing(denoiser: Denoiser) -> None:
    first, second, third = (
        denoiser.begin(asked) for asked in (image_spec(1, steps=8), image_spec(2, steps=5), image_spec(3))
    )
    denoiser.step([first])
    denoiser.step([first, second])
    denoiser.step([third, second])
    while running := [picture for picture in (second, first, third) if not picture.done]:
        denoiser.step(running)
    for picture in (first, second, third):
        (alone,) = draw(denoiser, picture.spec)
        assert torch.allclose(picture.latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_pictures_decoded_together_are_those_decoded_alone(denoiser: Denoiser) -> None:
    pictures = draw(denoiser, *(image_spec(seed) for seed in range(5)))
    together = denoiser.decode([picture.latents for picture in pictures])
    for picture, pixels in zip(pictures, together, strict=True):
        (alone,) = denoiser.decode([picture.latents])
        assert np.abs(pixels.astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_batched_ddim_step_is_diffusers_own(prediction_type: str, spacing: str, set_alpha_to_one: bool) -> None:
    steps = (3, 7, 50)
    schedulers = []
    for count in steps:
        scheduler = DDIMScheduler(
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            set_alpha_to_one=set_alpha_to_one,
            clip_sample=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(count)
        schedulers.append(scheduler)
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.5, 0.999):
        outputs, latents = torch.randn(2, len(steps), 4, 8, 8, generator=generator).unbind()
        positions = [int(share * count) for count in steps]
        tables = [DdimTable.of(scheduler) for scheduler in schedulers]
        rows = torch.stack([table.values[p] for table, p in zip(tables, positions, strict=True) if table])
        ours = ddim_step(rows, prediction_type, outputs, latents)
        for index, (scheduler, position) in enumerate(zip(schedulers, positions, strict=True)):
            one = slice(index, index + 1)
            timestep = scheduler.timesteps[position]
            theirs = scheduler.step(outputs[one], timestep, latents[one])
            assert torch.equal(ours[one], theirs.prev_sample)
            clean = estimate_clean(scheduler, timestep, outputs[one], latents[one])
            assert torch.allclose(clean, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_a_clipping_ddim_is_left_to_diffusers() -> None:
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(5)
    assert DdimTable.of(scheduler) is None


def test_every_scheduler_keeps_the_bundles_noise_schedule(decoder: Decoder) -> None:
    for name in NAMES:
        scheduler = make_scheduler(name, decoder.scheduler_config, 4)
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert scheduler.config.timestep_spacing == "trailing"
        assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("steps", [60, 61, 62, 103, 122])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp"])
def test_no_number_of_steps_reads_the_noise_schedule_from_its_end(decoder: Decoder, name: str, steps: int) -> None:
    # With "trailing" spacing diffusers appends a timestep -1 at 61, 103 and 122 steps.
    scheduler = make_scheduler(name, decoder.scheduler_config, steps)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    assert int(scheduler.timesteps.min()) >= 0
    if name == "dpm_solver_pp":
        assert len(scheduler.sigmas) == steps + 1
        assert (scheduler.sigmas.diff() < 0).all()


def test_pictures_share_no_scheduler_state(denoiser: Denoiser) -> None:
    first, second = (denoiser.begin(image_spec(1, scheduler="dpm_solver_pp")) for _ in range(2))
    denoiser.step([first])
    assert second.scheduler.model_outputs == [None, None]
    assert second.scheduler.step_index is None


def test_a_preview_has_at_most_128_pixels_a_side() -> None:
    latents = torch.arange(4 * 64 * 32, dtype=torch.float32).view(1, 4, 64, 32)
    small = reduced(latents, 8)
    assert small.shape == (1, 4, 16, 8)
    assert torch.allclose(small[0, 0, 0, 0], latents[0, 0, :4, :4].mean())
    assert reduced(latents, 2) is latents
    assert reduced(torch.zeros(1, 4, 300, 10), 4).shape == (1, 4, 32, 4)


def test_one_picture_that_overflows_fails_alone(denoiser: Denoiser) -> None:
    wild = denoiser.begin(image_spec(1, embeds=np.full(EMBED_DIM, 3e38, dtype=np.float32)))
    good = denoiser.begin(image_spec(2))
    while not good.done:
        denoiser.step([good] if wild.error else [wild, good])
    assert isinstance(wild.error, ImageFailed)
    assert "seed 1" in str(wild.error)
    (alone,) = draw(denoiser, image_spec(2))
    assert good.error is None
    assert torch.allclose(good.latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_a_picture_that_breaks_the_whole_call_fails_alone(denoiser: Denoiser) -> None:
    broken, good = denoiser.begin(image_spec(1)), denoiser.begin(image_spec(2))
    broken.positive = broken.positive[:, :-1]
    denoiser.step([broken, good])
    assert broken.error is not None
    assert good.error is None
    assert good.position == 1


def test_the_estimate_for_a_preview_ends_at_the_picture(denoiser: Denoiser) -> None:
    for name in NAMES:
        picture = denoiser.begin(image_spec(3, scheduler=name, steps=6))
        estimates = []
        while not picture.done:
            denoiser.step([picture], [True])
            assert picture.clean is not None
            estimates.append(picture.clean)
        distances = [float((estimate - picture.latents).norm()) for estimate in estimates]
        assert distances[-1] == min(distances)
        # The last step of a deterministic scheduler is the estimate itself.
        if name in ("ddim", "dpm_solver_pp"):
            assert distances[-1] < 0.05 * float(picture.latents.norm())
    picture = denoiser.begin(image_spec(3))
    denoiser.step([picture], [False])
    assert picture.clean is None


def test_noise_belongs_to_the_picture(denoiser: Denoiser) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = embeds_of(1)
        frozen.setflags(write=False)
        first, again, other = (denoiser.begin(image_spec(seed, embeds=frozen)) for seed in (1, 1, 2))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)

"""Kandinsky 2.2 as it is published: the sizes of its models, and a small checkpoint in exactly its layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import KandinskyV22Img2ImgPipeline, KandinskyV22Pipeline, PriorTransformer, UNet2DConditionModel, VQModel
from faceteer_generator.checkpoint import check_against, modern_name, stored_tensors
from faceteer_generator.denoise import Denoiser, Denoising
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.requests import ImageSpec, ImageStart
from faceteer_generator.schedulers import CLASSES
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bundle import picture
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from unit.generator.generator_specs import embeds_of, image_spec
from unit.generator.small_kandinsky import published, write_small_kandinsky

NAMES = tuple(CLASSES)
# main's clip_sample is true by its copies, the first version's false; no version names a learned variance, but
# checkpoints fine-tuned from it do.
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "first version": {"clip_sample": False},
    "learned variance": {"clip_sample": False, "variance_type": "learned_range"},
}


@pytest.mark.parametrize(
    ("name", "cls", "parameters"),
    [
        ("unet", UNet2DConditionModel, 1_253_057_288),
        ("movq", VQModel, 67_832_495),
        ("prior", PriorTransformer, 1_026_225_920),
    ],
)
def test_models_of_the_published_configurations_have_the_published_sizes(name: str, cls: Any, parameters: int) -> None:
    with torch.device("meta"):
        model = cls.from_config(published(name))
    assert sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) == parameters


def test_the_priors_text_encoder_has_the_published_size() -> None:
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(published("prior_text_encoder")))
    assert sum(math.prod(tensor.shape) for tensor in model.parameters()) == 694_659_840


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {name: write_small_kandinsky(root / name.replace(" ", "-"), **VARIANTS[name]) for name in VARIANTS}


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> dict[str, KandinskyDecoder]:
    return {name: load_decoder(path) for name, path in checkpoints.items()}  # type: ignore[misc]


def stock(path: Path, decoder: KandinskyDecoder, name: str, cls: Any = KandinskyV22Pipeline) -> Any:
    """diffusers' pipeline, its scheduler exchanged the way diffusers documents it, over the very same models."""
    pipe = cls.from_pretrained(path, unet=decoder.unet, movq=decoder.movq)
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.scheduler.config)
    if name != "ddpm":
        config.pop("variance_type", None)
        pipe.scheduler = CLASSES[name].from_config(config)
    return pipe


def drawn(decoder: KandinskyDecoder, asked: ImageSpec) -> Denoising:
    denoiser = Denoiser(decoder)
    one = denoiser.begin(asked)
    while not one.done:
        denoiser.step([one])
    return one


def by_stock(pipe: Any, decoder: KandinskyDecoder, asked: ImageSpec, **options: Any) -> torch.Tensor:
    negative = decoder.negative_embeds if asked.negative is None else torch.tensor(asked.negative)
    sizes = {"width": asked.width, "height": asked.height}
    latents: torch.Tensor = pipe(
        image_embeds=torch.tensor(asked.embeds)[None],
        negative_image_embeds=negative[None],
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="latent",
        **(sizes | options),
    ).images
    return latents


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_layout_draws_as_the_stock_pipeline_does(
    checkpoints: dict[str, Path], loaded: dict[str, KandinskyDecoder], variant: str, name: str, guidance: float
) -> None:
    asked = image_spec(
        3, scheduler=name, guidance_scale=guidance, steps=4, width=192, height=128, negative=embeds_of(9)
    )
    pipe = stock(checkpoints[variant], loaded[variant], name)
    assert torch.equal(drawn(loaded[variant], asked).latents, by_stock(pipe, loaded[variant], asked))


@pytest.mark.parametrize("size", [(512, 512), (768, 512), (512, 768)])
def test_full_sizes_draw_as_the_stock_pipeline_does(
    checkpoints: dict[str, Path], loaded: dict[str, KandinskyDecoder], size: tuple[int, int]
) -> None:
    decoder = loaded["as published"]
    asked = image_spec(3, scheduler="ddpm", guidance_scale=4.0, steps=1, width=size[0], height=size[1])
    ours = drawn(decoder, asked).latents
    assert ours.shape == (1, 4, size[1] // 8, size[0] // 8)
    assert torch.equal(ours, by_stock(stock(checkpoints["as published"], decoder, "ddpm"), decoder, asked))


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_start_is_the_stock_image_to_image_pipelines(
    checkpoints: dict[str, Path], loaded: dict[str, KandinskyDecoder], name: str, strength: float
) -> None:
    decoder = loaded["learned variance"]
    pixels = np.array(picture(7, 192).crop((0, 30, 192, 158)))
    # As a float32 field of a request gives it.
    start = ImageStart.of(pixels, float(np.float32(strength)))
    asked = image_spec(3, scheduler=name, guidance_scale=4.0, steps=10, width=192, height=128, start=start)
    ours = drawn(decoder, asked)
    assert ours.position == asked.run_steps == round(10 * strength)
    pipe = stock(checkpoints["learned variance"], decoder, name, KandinskyV22Img2ImgPipeline)
    # The pipeline hands width and height to its image processor the wrong way round.
    swapped = {"width": asked.height, "height": asked.width}
    theirs = by_stock(pipe, decoder, asked, image=Image.fromarray(pixels), strength=strength, **swapped)
    assert torch.equal(ours.latents, theirs)


def test_attention_tensors_under_their_old_names_are_the_same_model(
    checkpoints: dict[str, Path], loaded: dict[str, KandinskyDecoder], tmp_path: Path
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    directory = write_small_kandinsky(tmp_path / "old")
    file = directory / "movq" / "diffusion_pytorch_model.safetensors"

    def renamed(name: str) -> str:
        for modern, before in old.items():
            name = name.replace(f".{modern}.", f".{before}.") if ".attentions." in name else name
        return name

    tensors = {renamed(name): tensor for name, tensor in load_file(file).items()}
    assert any(name.endswith("proj_attn.weight") for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    check_against(loaded["as published"].movq, stored_tensors(directory / "movq"), directory / "movq")
    again = load_decoder(directory)
    for name, tensor in loaded["as published"].movq.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(again.movq.state_dict()[name], tensor)  # type: ignore[attr-defined]
    assert modern_name("mid_block.attentions.0.query.bias") == "mid_block.attentions.0.to_q.bias"
    assert modern_name("encoder.conv_in.weight") == "encoder.conv_in.weight"

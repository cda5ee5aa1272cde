"""SDXL with the bigG IP-Adapter: the same loop over a second decoder, against diffusers' own pipeline."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from faceteer.v1 import generator_pb2, tensor_pb2
from faceteer_generator.denoise import Denoiser
from faceteer_generator.model import load_decoder
from faceteer_generator.requests import ImageSpec
from faceteer_generator.schedulers import CLASSES
from faceteer_generator.sdxl import SdxlDecoder, _adapter_shapes
from faceteer_runtime.bundle import BundleError, seal
from safetensors.torch import load_file, save_file
from tiny_bundle import EMBED_DIM, picture_bytes
from unit.generator.generator_specs import embeds_of, image_spec
from unit.generator.small_sdxl import PUBLISHED_UNET, write_small_sdxl

NAMES = tuple(CLASSES)


def test_the_adapter_for_the_published_unet_has_the_published_tensors() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(PUBLISHED_UNET)
    assert sum(math.prod(tensor.shape) for tensor in unet.parameters()) == 2_567_463_684
    shapes = _adapter_shapes(unet, {"image_proj.proj.weight": (8192, 1280)}, Path())
    assert len(shapes) == 144
    assert sum(map(math.prod, shapes.values())) == 351_285_248
    assert shapes["ip_adapter.1.to_k_ip.weight"] == (640, 2048)
    assert shapes["ip_adapter.9.to_v_ip.weight"] == (1280, 2048)
    positions = {int(name.split(".")[1]) for name in shapes if name.startswith("ip_adapter")}
    assert positions == set(range(1, 140, 2))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sdxl(tmp_path_factory.mktemp("sdxl") / "generator")


@pytest.fixture(scope="module")
def decoder(directory: Path) -> SdxlDecoder:
    loaded = load_decoder(directory, kind="sdxl-ip-adapter")
    assert isinstance(loaded, SdxlDecoder)
    return loaded


@pytest.fixture(scope="module")
def pipeline(directory: Path) -> StableDiffusionXLPipeline:
    """diffusers' own, loaded the usual way from the same files, with its own text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(directory / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(directory / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(directory / "tokenizer_2"),
        unet=UNet2DConditionModel.from_pretrained(directory / "unet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(directory / "scheduler"),
        add_watermarker=False,
    )
    pipe.load_ip_adapter(
        str(directory), subfolder="ip_adapter", weight_name="ip-adapter_sdxl.safetensors", image_encoder_folder=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_pipeline(pipeline: StableDiffusionXLPipeline, decoder: SdxlDecoder, asked: ImageSpec, output_type: str) -> Any:
    pipeline.scheduler = CLASSES[asked.scheduler].from_config(decoder.scheduler_config)
    embeds = torch.tensor(asked.embeds)[None, None]
    negative = torch.zeros_like(embeds) if asked.negative is None else torch.tensor(asked.negative)[None, None]
    return pipeline(
        prompt="",
        ip_adapter_image_embeds=[torch.cat([negative, embeds]) if asked.guided else embeds],
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type=output_type,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_one_picture_is_the_stock_pipelines(
    decoder: SdxlDecoder, pipeline: StableDiffusionXLPipeline, name: str, guidance: float
) -> None:
    asked = image_spec(5, scheduler=name, guidance_scale=guidance, steps=3, width=96, height=64)
    denoiser = Denoiser(decoder)
    ours = denoiser.begin(asked)
    while not ours.done:
        denoiser.step([ours])
    theirs = by_pipeline(pipeline, decoder, asked, "latent")
    torch.testing.assert_close(ours.latents, theirs, rtol=1e-4, atol=1e-4)
    if name != "ddim":
        return
    (pixels,) = denoiser.decode([ours.latents])
    (expected,) = by_pipeline(pipeline, decoder, asked, "pil")
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_embeds_matter_and_a_requests_own_negative_is_used(
    decoder: SdxlDecoder, pipeline: StableDiffusionXLPipeline
) -> None:
    denoiser = Denoiser(decoder)
    drawn = []
    for asked in (
        image_spec(5, guidance_scale=3.0, negative=embeds_of(8)),
        image_spec(5, guidance_scale=3.0),
        image_spec(5, guidance_scale=3.0, embeds=embeds_of(6)),
    ):
        one = denoiser.begin(asked)
        while not one.done:
            denoiser.step([one])
        torch.testing.assert_close(one.latents, by_pipeline(pipeline, decoder, asked, "latent"), rtol=1e-4, atol=1e-4)
        drawn.append(one.latents)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    assert not torch.allclose(drawn[1], drawn[2], atol=1e-3)


def test_pictures_drawn_together_are_those_drawn_alone(decoder: SdxlDecoder) -> None:
    denoiser = Denoiser(decoder)
    together = [denoiser.begin(image_spec(seed, guidance_scale=(1.0, 4.0)[seed % 2])) for seed in range(4)]
    while running := [one for one in together if not one.done]:
        denoiser.step(running)
    for one in together:
        alone = denoiser.begin(one.spec)
        while not alone.done:
            denoiser.step([alone])
        torch.testing.assert_close(one.latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_a_stored_empty_prompt_stands_for_the_text_encoders(
    directory: Path, decoder: SdxlDecoder, pipeline: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    ours = decoder.prompt_embeds, decoder.pooled_prompt_embeds
    theirs = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[2])
    copy = Path(shutil.copytree(directory, tmp_path / "generator"))
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(copy / part)
    with pytest.raises(BundleError, match=r"empty_prompt\.safetensors: must hold"):
        load_decoder(copy, kind="sdxl-ip-adapter")
    stored = {"prompt_embeds": ours[0], "pooled_prompt_embeds": ours[1]}
    save_file(stored, copy / "empty_prompt.safetensors")
    again = load_decoder(copy, kind="sdxl-ip-adapter")
    assert isinstance(again, SdxlDecoder)
    assert torch.equal(again.prompt_embeds, ours[0])


def change(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("ip_adapter.1.to_k_ip.weight", None, "'ip_adapter.1.to_k_ip.weight' is missing"),
        ("ip_adapter.99.to_k_ip.weight", torch.zeros(2, 2), "'ip_adapter.99.to_k_ip.weight' does not belong"),
        ("ip_adapter.1.to_v_ip.weight", torch.zeros(2, 2), r"'ip_adapter.1.to_v_ip.weight' has shape \[2, 2\]"),
        ("image_proj.norm.bias", torch.full((64,), float("nan")), "'image_proj.norm.bias' holds NaN"),
        ("image_proj.proj.weight", torch.zeros(7, 7), "must be"),
    ],
)
def test_an_adapter_for_something_else_is_refused(
    directory: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "generator"))
    change(copy / "ip_adapter" / "ip-adapter_sdxl.safetensors", name, tensor)
    with pytest.raises(BundleError, match=words) as caught:
        load_decoder(copy, kind="sdxl-ip-adapter")
    assert "ip-adapter_sdxl.safetensors" in str(caught.value)


async def test_the_same_service_serves_it(serve: Any, directory: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(directory, bundle / "generator")
    facts = {
        "kind": "sdxl-ip-adapter",
        "encoder_revision": "0123456789abcdef",
        "sizes": [[64, 64]],
        "steps": 4,
        "guidance_scale": 5.0,
        "scheduler": "dpm_solver_pp",
        "size_multiple": 32,
        "max_pixels": 128 * 128,
    }
    seal(bundle, {"name": "sdxl", "parts": {"generator": facts}})
    serving = await serve(bundle=bundle)
    about = await serving.stub.GetGenerator(generator_pb2.GetGeneratorRequest())
    assert (about.kind, about.embed_dim, about.reads_images) == ("sdxl-ip-adapter", EMBED_DIM, True)
    embeds = tensor_pb2.Tensor(element_type=1, shape=[EMBED_DIM], data=embeds_of(1).tobytes())
    source = tensor_pb2.EmbedsInput(embeds=embeds)
    settings = generator_pb2.GenerationSettings(width=96, height=64, seeds=[4])
    for start in (None, generator_pb2.GenerationStart(image=picture_bytes(1, 100))):
        message = generator_pb2.GenerateRequest(input=source, settings=settings, start=start)
        (image,) = [e.image async for e in serving.stub.Generate(message) if e.WhichOneof("event") == "image"]
        assert (image.width, image.height, image.seed) == (96, 64, 4)
    inverted = await serving.stub.InvertImage(
        generator_pb2.InvertImageRequest(image=picture_bytes(1, 100), input=source, settings=settings)
    )
    assert list(inverted.noise.shape) == [4, 8, 12]

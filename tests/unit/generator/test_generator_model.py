"""Loading a bundle's decoder, and every way in which one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faceteer_generator.model import load_decoder
from faceteer_runtime.bundle import BundleError
from safetensors.torch import load_file, save_file
from tiny_bundle import EMBED_DIM


@pytest.fixture
def copied(generator_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generator_bundle / "generator", tmp_path / "generator"))


def halve(directory: Path, name: str) -> None:
    for part in ("unet", "movq"):
        path = directory / part / "diffusion_pytorch_model.safetensors"
        tensors = {key: value.half() for key, value in load_file(path).items()}
        path.unlink()
        save_file(tensors, path.with_name(name), metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_half_precision_files_are_loaded_in_full_on_a_cpu(copied: Path, name: str) -> None:
    halve(copied, name)
    decoder = load_decoder(copied)
    assert decoder.unet.dtype == decoder.movq.dtype == decoder.negative_embeds.dtype == torch.float32
    assert (decoder.embed_dim, decoder.scale, decoder.channels) == (EMBED_DIM, 4, 4)
    assert decoder.precision == "cpu/float32"
    assert not decoder.unet.training
    assert load_decoder(copied, dtype="bfloat16").unet.dtype == torch.bfloat16


def test_latents_round_sizes_up_as_the_pipeline_does(copied: Path) -> None:
    decoder = load_decoder(copied)
    assert decoder.latents_shape(64, 64) == (1, 4, 16, 16)
    assert decoder.latents_shape(128, 65) == (1, 4, 20, 32)


def remove(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def garble(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(b"nonsense") and None  # type: ignore[func-returns-value]


def wrong_negative(directory: Path) -> None:
    save_file({"negative_image_embeds": torch.zeros(1, 7)}, directory / "negative_embeds.safetensors")


def nan_negative(directory: Path) -> None:
    negative = torch.full((1, EMBED_DIM), float("nan"))
    save_file({"negative_image_embeds": negative}, directory / "negative_embeds.safetensors")


def unknown_prediction(directory: Path) -> None:
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "flow"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("unet"), "unet: missing"),
        (remove("movq/config.json"), "movq: cannot be loaded"),
        (remove("movq/diffusion_pytorch_model.safetensors"), "movq/diffusion_pytorch_model.safetensors: missing"),
        (
            garble("unet/diffusion_pytorch_model.safetensors"),
            "unet/diffusion_pytorch_model.safetensors: not a readable",
        ),
        (garble("scheduler/scheduler_config.json"), "scheduler_config.json: cannot be loaded"),
        (remove("negative_embeds.safetensors"), "negative_embeds.safetensors: missing"),
        (wrong_negative, r"must be finite and of shape \[1, 32\]"),
        (nan_negative, "must be finite"),
        (unknown_prediction, "prediction_type must be one of"),
    ],
)
def test_a_broken_decoder_is_refused_in_one_sentence(copied: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(copied)
    with pytest.raises(BundleError, match=words) as caught:
        load_decoder(copied)
    assert "\n" not in str(caught.value)

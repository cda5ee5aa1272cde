"""CLIP in transformers' layout: the same embeddings as transformers' own model and processor, on real photographs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from faceteer_encoder import transformers_layout
from faceteer_encoder.model import load_encoder
from faceteer_encoder.preprocess import Preprocessor
from faceteer_runtime import memory
from faceteer_runtime.bundle import BundleError
from PIL import Image
from published_layout import PROCESSOR, write_image_encoder, write_text_encoder
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# Photographs that come with packages the tests install anyway: a temple, a flower, a portrait.
PHOTOGRAPHS = [
    files("sklearn") / "datasets" / "images" / "china.jpg",
    files("sklearn") / "datasets" / "images" / "flower.jpg",
    files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg",
]


def photograph(which: int, size: tuple[int, int] | None = None, turned: bool = False) -> bytes:
    """A photograph's own bytes; or cut to a size, or turned by a quarter, and saved without loss."""
    data = PHOTOGRAPHS[which].read_bytes()
    if size is None and not turned:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
    if size is not None:
        image = image.crop((0, 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


CASES = [photograph(0), photograph(1), photograph(2)]
CASES += [photograph(0, turned=True), photograph(2, turned=True)]
CASES += [
    photograph(0, size) for size in ((227, 224), (224, 227), (225, 225), (639, 425), (333, 401), (97, 131), (5, 300))
]


def theirs(data: bytes) -> np.ndarray:
    """transformers' pixels, by Pillow as the published pipelines had them (the torchvision one rounds otherwise)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(CLIPImageProcessorPil(**PROCESSOR)(image, return_tensors="np")["pixel_values"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    directory = tmp_path_factory.mktemp("published")
    return directory, write_image_encoder(directory), write_text_encoder(directory)


def test_pixels_are_those_of_transformers_own_processor(published: tuple[Path, Any, Any]) -> None:
    preprocessor = Preprocessor(transformers_layout.preprocess_cfg(published[0]), max_bytes=10**8, max_pixels=10**8)
    for data in CASES:
        ours = preprocessor.normalised([preprocessor.pixels(data)]).numpy()
        assert np.abs(ours - theirs(data)).max() < 1e-6


def test_image_embeddings_are_those_of_transformers_own_model(published: tuple[Path, Any, Any]) -> None:
    directory, vision, _ = published
    encoder, preprocessor = load_encoder(directory)
    ours = np.stack(encoder.encode_images([preprocessor.pixels(data) for data in CASES]))
    with torch.no_grad():
        expected = vision(torch.from_numpy(np.concatenate([theirs(data) for data in CASES]))).image_embeds.numpy()
    off = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert off.max() < 1e-4
    # Random weights, but not so random that every picture looks the same.
    assert np.linalg.norm(expected - expected.mean(0), axis=1).min() > 10 * off.max() * np.linalg.norm(expected)


def test_text_embeddings_are_those_of_transformers_own_model(published: tuple[Path, Any, Any]) -> None:
    directory, _, text = published
    encoder, _ = load_encoder(directory)
    words = ["a photo of snow", "night", "two of something, far away in the rain", "x " * 100]
    tokens = open_clip.SimpleTokenizer(context_length=77)(words)
    # transformers pads with the end of text where open_clip pads with zeros; nothing may depend on it.
    for row in tokens:
        row[int(row.argmax()) + 1 :] = 49407
    with torch.no_grad():
        expected = text(tokens).text_embeds.numpy()
    ours = np.stack(encoder.encode_texts(words))
    assert (np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_stays_close_to_float32(published: tuple[Path, Any, Any], dtype: str, tolerance: float) -> None:
    directory, vision, _ = published
    encoder, preprocessor = load_encoder(directory, dtype=dtype)
    ours = np.stack(encoder.encode_images([preprocessor.pixels(CASES[0])]))
    with torch.no_grad():
        expected = vision(torch.from_numpy(theirs(CASES[0]))).image_embeds.numpy()
    assert np.linalg.norm(ours - expected) < tolerance * np.linalg.norm(expected)


def test_without_a_text_encoder_only_pictures_are_encoded(tmp_path: Path) -> None:
    write_image_encoder(tmp_path, dtype=torch.float16)
    encoder, _ = load_encoder(tmp_path)
    assert not encoder.has_text_tower
    assert encoder.encode_images([np.zeros((224, 224, 3), np.uint8)])[0].shape == (32,)


def test_the_published_configuration_has_the_published_number_of_parameters(tmp_path: Path) -> None:
    config = {
        "hidden_act": "gelu", "hidden_size": 1664, "image_size": 224, "intermediate_size": 8192,
        "layer_norm_eps": 1e-05, "num_attention_heads": 16, "num_hidden_layers": 48, "patch_size": 14,
        "projection_dim": 1280,
    }  # fmt: skip
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(config))
    cfg = transformers_layout.model_cfg(tmp_path)
    from faceteer_encoder.model import _build

    with torch.device("meta"):
        assert sum(p.numel() for p in _build(cfg).parameters()) == 1_844_907_264
        text = {"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "max_position_embeddings": 77,
                "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280, "vocab_size": 49408,
                "layer_norm_eps": 1e-05}  # fmt: skip
        (tmp_path / "text_encoder").mkdir()
        (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(text))
        both = _build(transformers_layout.model_cfg(tmp_path))
        # The one more is the scale of training's logits.
        assert sum(p.numel() for p in both.parameters()) == 1_844_907_264 + 694_659_840 + 1
    assert cfg["vision_cfg"]["head_width"] == 104


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def fault(directory: Path) -> None:
        path = directory / "image_encoder" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return fault


def _config(**changes: Any) -> Callable[[Path], None]:
    def fault(directory: Path) -> None:
        path = directory / "image_encoder" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return fault


def _cut(directory: Path) -> None:
    path = directory / "image_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


LAYER = "vision_model.encoder.layers.1."


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_weights(lambda t: t.pop(f"{LAYER}mlp.fc1.bias")), rf"'{LAYER}mlp\.fc1\.bias' is missing"),
        (_weights(lambda t: t.pop(f"{LAYER}self_attn.k_proj.bias")), "self_attn.q_proj.bias' is missing"),
        (_weights(lambda t: t.update(more=torch.zeros(1))), "'more' does not belong"),
        (
            _weights(lambda t: t.update({"visual_projection.weight": torch.zeros(2, 2)})),
            "'visual_projection.weight' has",
        ),
        (
            _weights(lambda t: t["visual_projection.weight"].fill_(torch.inf)),
            "'visual_projection.weight' holds NaN or inf",
        ),
        (_config(hidden_act="relu"), "hidden_act 'relu' is not one of gelu, quick_gelu"),
        (_config(layer_norm_eps=1e-6), "layer_norm_eps must be 1e-5"),
        (_cut, "not a readable safetensors file .* pull it again"),
    ],
    ids=["missing", "missing-key", "extra", "misshapen", "infinite", "activation", "epsilon", "cut-short"],
)
def test_a_faulty_checkpoint_is_refused_in_the_files_own_words(
    tmp_path: Path, fault: Callable[[Path], None], words: str
) -> None:
    write_image_encoder(tmp_path)
    fault(tmp_path)
    with pytest.raises(BundleError, match=words):
        load_encoder(tmp_path)


def test_too_little_memory_is_said_before_anything_is_read(
    published: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.raises(BundleError, match=r"needs 0\.0 GiB of memory, .* use a smaller FACETEER_ENCODER_DTYPE"):
        load_encoder(published[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_error(published: tuple[Path, Any, Any]) -> None:
    with pytest.raises(BundleError, match="'cuda' was asked for, but this machine has no CUDA GPU"):
        load_encoder(published[0], device="cuda")

"""The encoder and the SAE on a GPU give what they give on the CPU. Skips itself where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_encoder.model import load_encoder
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import write_weights
from published_layout import write_image_encoder, write_text_encoder
from unit.sae.random_sae import ARCHITECTURES, embeddings, random_sae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 0.02), ("bfloat16", 0.05)])
def test_embeddings_are_the_cpus(dtype: str, tolerance: float, tmp_path: Path) -> None:
    write_image_encoder(tmp_path)
    write_text_encoder(tmp_path)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(3)]
    here, there = load_encoder(tmp_path)[0], load_encoder(tmp_path, device="cuda", dtype=dtype)[0]
    for a, b in zip(
        [*here.encode_images(pixels), *here.encode_texts(["snow"])],
        [*there.encode_images(pixels), *there.encode_texts(["snow"])],
        strict=True,
    ):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(a)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_the_cpus_to_the_bit(architecture: str, dtype: str, tmp_path: Path) -> None:
    pair = random_sae(architecture, seed=2, d_in=64, d_sae=2000, k=20)
    write_weights(tmp_path, pair.in_memory, dtype)
    here, there = SparseAutoencoder.load(tmp_path), SparseAutoencoder.load(tmp_path, "cuda")
    x = embeddings(1, 9, 64)
    for a, b in zip(here.encode(x), there.encode(x), strict=True):
        assert a.top_indices.tolist() == b.top_indices.tolist()
        assert a.top_acts.tolist() == b.top_acts.tolist()

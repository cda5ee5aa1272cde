"""Bundles as other people's checkpoints come: configurations and weights of several habits load to the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faceteer_encoder.model import load_encoder
from safetensors.torch import load_file, save_file
from tiny_bundle import _write_encoder, picture_bytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    _write_encoder(tmp_path / "encoder")
    return tmp_path / "encoder"


def change_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "open_clip_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def embeds(directory: Path) -> np.ndarray:
    """Of a picture and of a text."""
    encoder, preprocessor = load_encoder(directory)
    (seen,) = encoder.encode_images([preprocessor.pixels(picture_bytes(1))])
    (read,) = encoder.encode_texts(["a boat"])
    return np.stack([seen, read])


@pytest.mark.parametrize("given", [None, 224, [96, 96]], ids=["absent", "another", "another pair"])
def test_pictures_are_made_of_the_models_own_size_as_in_open_clip(directory: Path, given: Any) -> None:
    expected = embeds(directory)
    change_config(directory, lambda config: config["preprocess_cfg"].pop("size"))
    if given is not None:
        change_config(directory, lambda config: config["preprocess_cfg"].update(size=given))
    assert np.array_equal(embeds(directory), expected)


@pytest.mark.parametrize("announced", [True, False])
def test_a_bias_of_the_logits_changes_no_embedding(directory: Path, announced: bool) -> None:
    expected = embeds(directory)
    change_weights(directory, lambda weights: weights.update(logit_bias=torch.tensor(-10.0)))
    if announced:
        change_config(directory, lambda config: config["model_cfg"].update(init_logit_bias=-10))
    assert np.array_equal(embeds(directory), expected)


def test_weights_stored_in_half_precision_are_computed_with_in_full(directory: Path) -> None:
    whole = embeds(directory)
    change_weights(directory, lambda weights: weights.update({n: t.half() for n, t in weights.items()}))
    stored = embeds(directory)
    change_weights(directory, lambda weights: weights.update({n: t.float() for n, t in weights.items()}))
    assert np.array_equal(stored, embeds(directory))
    assert 0 < np.linalg.norm(stored - whole) < 0.01 * np.linalg.norm(whole)

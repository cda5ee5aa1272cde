"""Writes an SAE for serving: layout rows, whole or not at all.

Knows nothing of where the weights come from; :mod:`faceteer_sae.weights` reads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from faceteer_sae.rows import BLOCK, quantised
from faceteer_sae.weights import CONFIG, SCREEN, WEIGHTS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def write_rows(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: str, *, screen: bool = True
) -> None:
    """Writes cfg.json and sae_weights.safetensors in layout rows, which services read from the file's own pages.

    Args:
        directory: made if it is not there.
        config: cfg.json; layout and dtype are filled in.
        tensors: W_enc [d_in, d_sae] or W_enc_rows [d_sae, d_in], b_enc, W_dec, b_dec, and thresholds; any float type.
        dtype: of the two matrices in the file: float32, float16, bfloat16 or int8 (nearest of 255 levels, row by row).
            Biases and thresholds stay float32, whose memory nobody will miss.
        screen: whether to add an int8 copy of the encoder for screening; with int8 it is the encoder itself.

    Raises:
        ValueError: a value does not fit the type asked for, or is not finite.
    """
    encoder = tensors["W_enc_rows"] if "W_enc_rows" in tensors else tensors["W_enc"].T
    written = {name: tensor.float().contiguous() for name, tensor in tensors.items() if not name.startswith("W_")}
    for name, matrix in (("W_enc_rows", encoder), ("W_dec", tensors["W_dec"])):
        written |= _matrix(name, matrix, dtype)
    if screen and dtype != "int8":
        written |= _matrix(SCREEN, encoder, "int8")
    if written["W_dec"].data_ptr() == written["W_enc_rows"].data_ptr():
        written["W_dec"] = written["W_dec"].clone()  # tied weights: a safetensors file holds each on its own
    for name, tensor in written.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite in {dtype}; take a wider type")
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"{WEIGHTS}.part"
    save_file(written, part)
    part.replace(directory / WEIGHTS)
    card = {**config, "layout": "rows", "dtype": dtype}
    draft = directory / f"{CONFIG}.part"
    draft.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    draft.replace(directory / CONFIG)


def _matrix(name: str, rows: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if dtype != "int8":
        return {name: rows.to(DTYPES[dtype]).contiguous()}
    values, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        values[start : start + BLOCK], scales[start : start + BLOCK] = quantised(rows[start : start + BLOCK])
    return {name: values, f"{name}_scales": scales}

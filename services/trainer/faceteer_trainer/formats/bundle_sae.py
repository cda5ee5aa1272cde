"""A bundle's SAE (docs/bundles.md) as one between two formats. Knows the layout through faceteer_sae alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import BundleError
from faceteer_sae.rows import Rows
from faceteer_sae.weights import decoder_rows, encoder_rows, load_config, load_weights
from faceteer_sae.writing import write_rows

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.plain import PlainSae


def read(directory: Path) -> PlainSae:
    """The SAE in a bundle's sae/ or in a folder that train-sae wrote."""
    try:
        config = load_config(directory)
        weights = load_weights(directory, config)
    except BundleError as error:
        raise JobError(str(error)) from None
    threshold = weights.get("threshold", weights.get("topk_threshold"))
    return PlainSae(
        config.architecture,
        _whole(encoder_rows(weights)),
        weights["b_enc"],
        _whole(decoder_rows(weights)),
        weights["b_dec"],
        config.apply_b_dec_to_input,
        config.k,
        threshold,
        config.metadata,
    )


def write(sae: PlainSae, directory: Path, dtype: str = "float16") -> Path:
    """Writes it for serving; an int8 copy of the encoder comes along where it is large enough to matter."""
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "metadata": dict(sae.metadata),
    }
    if sae.k:
        config["k"] = sae.k
    tensors = {"W_enc_rows": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold" if sae.architecture == "jumprelu" else "topk_threshold"] = sae.threshold
    try:
        write_rows(directory, config, tensors, dtype, screen=sae.d_sae >= 16_384)
    except ValueError as error:
        raise JobError(f"{directory}: {error}") from None
    except OSError as error:
        raise JobError(f"{directory}: cannot be written ({error.strerror})") from None
    return directory


def _whole(rows: Rows) -> torch.Tensor:
    return rows.values if rows.scales is None else torch.cat(list(rows.blocks()))

"""SAELens 6: cfg.json and sae_weights.safetensors.

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; jumprelu: threshold [d_sae];
    a batchtopk training checkpoint: topk_threshold []

A topk or batchtopk with rescale_acts_by_decoder_norm selects by ``pre ||d_i||`` and decodes with unit vectors, which is
the same as moving the norms into the encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.files import read_json, read_safetensors
from faceteer_trainer.formats.plain import PlainSae, take

# The version whose files these are; readers treat files that name none as older than 6.
VERSION = "6.18.0"
_FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
_MORE = {"standard": (), "topk": (), "jumprelu": ("threshold",), "batchtopk": ("topk_threshold",)}


def read(directory: Path) -> PlainSae:
    """The SAE in a directory."""
    path = directory / "cfg.json"
    cfg = read_json(path)
    architecture = cfg.get("architecture")
    if architecture not in _MORE:
        raise JobError(f"{path}: architecture {architecture!r} is not one of {', '.join(_MORE)}")
    if (normalised := cfg.get("normalize_activations", "none")) != "none":
        raise JobError(
            f"{path}: normalize_activations is {normalised!r}; fold it into the weights first "
            "(fold_activation_norm_scaling_factor in SAELens)"
        )
    if (reshaped := cfg.get("reshape_activations", "none")) != "none":
        raise JobError(f"{path}: reshape_activations is {reshaped!r}; an embedding has one dimension")
    weights = directory / "sae_weights.safetensors"
    W_enc, b_enc, W_dec, b_dec, *more = take(read_safetensors(weights), weights, *_FOUR, *_MORE[architecture])
    sae = PlainSae(
        architecture,
        W_enc.T,
        b_enc,
        W_dec,
        b_dec,
        bool(cfg.get("apply_b_dec_to_input", True)),
        round(cfg.get("k", 100)) if "topk" in architecture else 0,
        more[0] if more else None,
        cfg.get("metadata") or {},
    ).checked(weights)
    return sae.unit_rows() if cfg.get("rescale_acts_by_decoder_norm", False) else sae


def write(sae: PlainSae, directory: Path) -> Path:
    """What SAELens reads: batchtopk as the jumprelu that it is once it is trained."""
    architecture, threshold = sae.architecture, sae.threshold
    if architecture == "batchtopk":
        assert threshold is not None
        architecture, threshold = "jumprelu", threshold.float().clamp_min(0).expand(sae.d_sae)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, "sae_lens_version": VERSION, "sae_lens_training_version": None},
    }
    if architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    tensors = {
        "W_enc": sae.W_enc.T.float().contiguous(),
        "b_enc": sae.b_enc.float(),
        "W_dec": sae.W_dec.float().contiguous(),
        "b_dec": sae.b_dec.float(),
    }
    if threshold is not None:
        tensors["threshold"] = threshold.float().contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone()  # tied weights share memory, which a safetensors file cannot say
    part = directory / "sae_weights.part"
    save_file(tensors, part)
    part.replace(directory / "sae_weights.safetensors")
    (directory / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    return directory

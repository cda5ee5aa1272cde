"""sparsify: cfg.json and sae.safetensors in a hookpoint's folder.

encoder.weight [L, d_in], encoder.bias [L], W_dec [L, d_in], b_dec [d_in]
the k largest of relu((x - b_dec) E^T + bias), W_dec^T f + b_dec
"""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.files import whole_file, write_json
from faceteer_sae.weights import SaeWeights
from safetensors.torch import save_file

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats.conversions import checked, take, whole_number, with_input_shift
from faceteer_trainer.formats.files import read_json, read_safetensors

_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def read(path: Path) -> SaeWeights:
    """The sparse coder in a folder, or of the path of its sae.safetensors."""
    directory = path if path.is_dir() or not path.exists() else path.parent
    path = directory / "cfg.json"
    cfg = read_json(path)
    if cfg.get("activation", "topk") != "topk":
        raise JobError(f"{path}: activation {cfg['activation']!r} is not served; topk is")
    for name in ("skip_connection", "transcode"):
        if cfg.get(name, False):
            raise JobError(f"{path}: a sparse coder with {name} is no autoencoder of embeddings")
    weights = directory / "sae.safetensors"
    W, b, D, shift = take(read_safetensors(weights), weights, *_NAMES)
    return checked(SaeWeights("topk", W, b, D, shift, True, whole_number(cfg.get("k", 32), path, "k")), weights)


def write(sae: SaeWeights, directory: Path) -> Path:
    """A folder that sparsify reads; it supports topk only."""
    if sae.architecture != "topk":
        raise JobError(f"sparsify has no {sae.architecture}; it supports topk only")
    sae = with_input_shift(sae, True)
    norms = sae.W_dec.float().norm(dim=1)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, round(sae.d_sae / sae.d_in)),
        "normalize_decoder": bool((norms - 1).abs().max() < 1e-3),
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    tensors = dict(zip(_NAMES, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), strict=True))
    directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / "sae.safetensors") as part:
        save_file({name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}, part)
    write_json(directory / "cfg.json", cfg)
    return directory

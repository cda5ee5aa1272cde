"""Reads an SAE from disk and believes nothing: every fault is one sentence that names the file.

Knows nothing of how the weights are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import BundleError
from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Rows looked at together when checking: bounds the memory that a check takes.
_CHUNK = 8192


@dataclass(frozen=True)
class SaeConfig:
    """What cfg.json (SAELens' keys) says.

    Attributes:
        architecture: one of :data:`ARCHITECTURES`.
        d_in: length of an embedding.
        d_sae: number of features.
        k: of topk and batchtopk, 0 otherwise. A training's mean for batchtopk, rounded.
        apply_b_dec_to_input: whether b_pre is b_dec; it is zero otherwise.
        metadata: whatever else the training said.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]


def load_config(directory: Path) -> SaeConfig:
    """Reads and checks cfg.json.

    Raises:
        BundleError: missing, not JSON, an architecture or an option that is not served.
    """
    path = directory / CONFIG
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(cfg, dict):
        raise BundleError(f"{path}: must be a JSON object")
    architecture = cfg.get("architecture")
    if architecture not in ARCHITECTURES:
        raise BundleError(f"{path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    sizes: dict[str, int] = {"k": 0}
    for name in ("d_in", "d_sae", *(("k",) if "topk" in architecture else ())):
        value = cfg.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 1:
            raise BundleError(f"{path}: {name!r} must be a number of at least 1, not {value!r}")
        sizes[name] = round(value)
    if sizes["k"] > sizes["d_sae"]:
        raise BundleError(f"{path}: k {sizes['k']} is more than the {sizes['d_sae']} features")
    if cfg.get("normalize_activations", "none") != "none":
        raise BundleError(f"{path}: normalize_activations must be 'none'; fold the normalisation into the weights")
    if cfg.get("rescale_acts_by_decoder_norm", False):
        raise BundleError(f"{path}: rescale_acts_by_decoder_norm is not served; fold the norms into W_enc and W_dec")
    metadata = cfg.get("metadata")
    return SaeConfig(
        architecture,
        sizes["d_in"],
        sizes["d_sae"],
        sizes["k"],
        bool(cfg.get("apply_b_dec_to_input", True)),
        metadata if isinstance(metadata, dict) else {},
    )


def load_weights(directory: Path, config: SaeConfig) -> dict[str, torch.Tensor]:
    """Reads and checks sae_weights.safetensors: the tensors by name, in the file's own shapes and dtypes, on the CPU.

    Raises:
        BundleError: a tensor is missing, unknown, misshapen, not floating point, or holds NaN or infinities.
    """
    path = directory / WEIGHTS
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, config.d_in),
        "b_dec": (config.d_in,),
    }
    if config.architecture == "jumprelu":
        shapes["threshold"] = (config.d_sae,)
    elif config.architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            present = set(file.keys())
            for name in shapes:
                if name not in present:
                    raise BundleError(f"{path}: {name!r} is missing ({config.architecture} needs {', '.join(shapes)})")
            if extra := sorted(present - set(shapes)):
                raise BundleError(f"{path}: {extra[0]!r} does not belong to architecture {config.architecture}")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError:
        raise BundleError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise BundleError(
                f"{path}: {name!r} has shape {list(tensor.shape)}, but {CONFIG} asks for {list(shapes[name])}"
            )
        if tensor.dtype not in _FLOATS:
            raise BundleError(f"{path}: {name!r} is {tensor.dtype}, not float32, float16 or bfloat16")
        if not all(bool(torch.isfinite(rows).all()) for rows in chunks(tensor)):
            raise BundleError(f"{path}: {name!r} holds NaN or infinite values")
    return tensors


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor a few thousand rows at a time."""
    if tensor.dim() == 0:
        yield tensor
    else:
        for start in range(0, len(tensor), _CHUNK):
            yield tensor[start : start + _CHUNK]

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

from faceteer_sae.rows import Rows

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUTS = ("saelens", "rows")
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
# In layout rows: the encoder once more, in int8 (:func:`faceteer_sae.rows.quantised`), for screening.
SCREEN = "W_enc_screen"
# What the two matrices are called in each layout.
_MATRICES = {"saelens": ("W_enc", "W_dec"), "rows": ("W_enc_rows", "W_dec")}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Rows looked at together when checking: bounds the memory that a check takes.
_CHUNK = 1024


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
        layout: "saelens", with W_enc as [d_in, d_sae], or "rows": W_enc_rows [d_sae, d_in], which is served from the
            file's own pages.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]
    layout: str = "saelens"


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
    layout = cfg.get("layout", "saelens")
    if layout not in LAYOUTS:
        raise BundleError(f"{path}: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    metadata = cfg.get("metadata")
    return SaeConfig(
        architecture,
        sizes["d_in"],
        sizes["d_sae"],
        sizes["k"],
        bool(cfg.get("apply_b_dec_to_input", True)),
        metadata if isinstance(metadata, dict) else {},
        layout,
    )


def load_weights(directory: Path, config: SaeConfig) -> dict[str, torch.Tensor]:
    """Reads and checks sae_weights.safetensors: the tensors by name, in the file's own shapes and dtypes, on the CPU.

    The tensors lie on the file's own pages, which all processes that read it share, until someone writes to them.

    Raises:
        BundleError: a tensor is missing, unknown, misshapen, of a type that is not served, or holds NaN or infinities.
    """
    path = directory / WEIGHTS
    shapes = _shapes(config)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            present = set(file.keys())
            for matrix in _MATRICES[config.layout]:
                if matrix in present and file.get_slice(matrix).get_dtype() == "I8":
                    shapes[f"{matrix}_scales"] = (config.d_sae,)
            if config.layout == "rows" and SCREEN in present:
                shapes |= {SCREEN: (config.d_sae, config.d_in), f"{SCREEN}_scales": (config.d_sae,)}
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
        if tensor.dtype == torch.int8 and f"{name}_scales" in shapes:
            continue
        if tensor.dtype not in _FLOATS:
            rows = ", or int8 in layout rows" if config.layout == "saelens" else " or int8"
            raise BundleError(f"{path}: {name!r} is {tensor.dtype}, not float32, float16, bfloat16{rows}")
        if not all(bool(torch.isfinite(rows).all()) for rows in chunks(tensor)):
            raise BundleError(f"{path}: {name!r} holds NaN or infinite values")
    return tensors


def _shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """What the file must hold, int8's scales apart."""
    encoder, decoder = _MATRICES[config.layout]
    as_rows = (config.d_sae, config.d_in)
    shapes: dict[str, tuple[int, ...]] = {
        encoder: as_rows if config.layout == "rows" else as_rows[::-1],
        "b_enc": (config.d_sae,),
        decoder: as_rows,
        "b_dec": (config.d_in,),
    }
    if config.architecture == "jumprelu":
        shapes["threshold"] = (config.d_sae,)
    elif config.architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    return shapes


def encoder_rows(weights: dict[str, torch.Tensor]) -> Rows:
    """The encoder as [d_sae, d_in]: as it lies in layout rows, turned round in memory otherwise."""
    if "W_enc" in weights:
        return Rows(weights["W_enc"].T.contiguous())
    return _rows(weights, "W_enc_rows")


def decoder_rows(weights: dict[str, torch.Tensor]) -> Rows:
    """The decoder, [d_sae, d_in]."""
    return _rows(weights, "W_dec")


def screen_rows(weights: dict[str, torch.Tensor]) -> Rows | None:
    """The file's own int8 copy of the encoder, if it has one."""
    return _rows(weights, SCREEN) if SCREEN in weights else None


def _rows(weights: dict[str, torch.Tensor], name: str) -> Rows:
    scales = weights.get(f"{name}_scales")
    return Rows(weights[name].contiguous(), None if scales is None else scales.float().numpy())


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor a few thousand rows at a time."""
    if tensor.dim() == 0:
        yield tensor
    else:
        for start in range(0, len(tensor), _CHUNK):
            yield tensor[start : start + _CHUNK]

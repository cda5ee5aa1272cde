"""The one reader and writer of an SAE's cfg.json and sae_weights.safetensors (docs/bundles.md).

Reading trusts nothing: every fault is one sentence that names the file.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.files import whole_file, write_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from faceteer_sae.rows import BLOCK, Rows, quantised

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUTS = ("saelens", "rows")
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
# In layout rows: a second copy of the encoder, in int8 (:func:`faceteer_sae.rows.quantised`), for screening.
SCREEN = "W_enc_screen"
# Names of the two matrices in each layout.
_MATRICES = {"saelens": ("W_enc", "W_dec"), "rows": ("W_enc_rows", "W_dec")}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Rows looked at together when checking: bounds the memory that a check takes.
_CHUNK = 1024
# From this many features on reading the encoder takes longer than what screening in int8 costs besides.
_SCREEN_FROM = 16_384


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


@dataclass(frozen=True)
class SaeWeights:
    """An SAE in memory, between files: ``f = act(W_enc (x - b_pre) + b_enc)``, ``x_hat = W_dec f + b_dec``.

    Attributes:
        architecture: one of :data:`ARCHITECTURES`.
        W_enc, W_dec: [d_sae, d_in], rows are features; any float type.
        b_enc: [d_sae].
        b_dec: [d_in].
        apply_b_dec_to_input: whether b_pre is b_dec; it is zero otherwise.
        k: of topk and batchtopk; 0 otherwise.
        threshold: [] of batchtopk, [d_sae] of jumprelu, None otherwise.
        metadata: what cfg.json says besides.
    """

    architecture: str
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    apply_b_dec_to_input: bool
    k: int = 0
    threshold: torch.Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """The length of an embedding."""
        return int(self.W_enc.shape[1])

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return int(self.W_enc.shape[0])


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


def read_weights(directory: Path) -> SaeWeights:
    """The SAE in a directory, whichever its layout; int8 rows come as float32.

    Raises:
        BundleError: as :func:`load_config` and :func:`load_weights`.
    """
    config = load_config(directory)
    tensors = load_weights(directory, config)
    return SaeWeights(
        config.architecture,
        encoder_rows(tensors).whole(),
        tensors["b_enc"],
        decoder_rows(tensors).whole(),
        tensors["b_dec"],
        config.apply_b_dec_to_input,
        config.k,
        tensors.get("threshold", tensors.get("topk_threshold")),
        config.metadata,
    )


def write_weights(
    directory: Path, sae: SaeWeights, dtype: str = "float16", *, layout: str = "rows", screen: bool | None = None
) -> None:
    """Writes sae_weights.safetensors and then cfg.json, each whole or not at all.

    Args:
        directory: made if it is not there.
        sae: what to write.
        dtype: of the two matrices in the file: float32, float16, bfloat16 or, in layout rows, int8 (nearest of 255
            levels, row by row). Biases and thresholds stay float32: they take next to no space.
        layout: "rows", which services read from the file's own pages, or "saelens", which SAELens reads too.
        screen: in layout rows, whether to add an int8 copy of the encoder for screening; None: where there are enough
            features for it to make a difference. With int8 it is the encoder itself.

    Raises:
        BundleError: a value does not fit the type asked for, or is not finite.
        OSError: the files cannot be written.
    """
    encoder, decoder = _MATRICES[layout]
    written = {"b_enc": sae.b_enc.float().contiguous(), "b_dec": sae.b_dec.float().contiguous()}
    if sae.threshold is not None:
        name = "threshold" if sae.architecture == "jumprelu" else "topk_threshold"
        written[name] = sae.threshold.float().contiguous()
    written |= _matrix(encoder, sae.W_enc if layout == "rows" else sae.W_enc.T, dtype)
    written |= _matrix(decoder, sae.W_dec, dtype)
    if screen is None:
        screen = sae.d_sae >= _SCREEN_FROM
    if screen and layout == "rows" and dtype != "int8":
        written |= _matrix(SCREEN, sae.W_enc, "int8")
    if written[decoder].data_ptr() == written[encoder].data_ptr():
        written[decoder] = written[decoder].clone()  # tied weights: a safetensors file holds each on its own
    for name, tensor in written.items():
        if tensor.is_floating_point() and not all(bool(torch.isfinite(rows).all()) for rows in chunks(tensor)):
            raise BundleError(f"{directory}: {name} holds values that are not finite in {dtype}; take a wider type")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / WEIGHTS
    try:
        with whole_file(path) as part:
            save_file(written, part)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    card = {
        "architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, **({"k": sae.k} if sae.k else {}),
        "dtype": dtype, **({"layout": layout} if layout != "saelens" else {}),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input, "normalize_activations": "none",
        "metadata": dict(sae.metadata),
    }  # fmt: skip
    write_json(directory / CONFIG, card)


def update_metadata(directory: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to cfg.json's metadata; those of the same name are replaced.

    Raises:
        BundleError: there is no cfg.json to be served.
        OSError: it cannot be written.
    """
    metadata = {**load_config(directory).metadata, **facts}
    card = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    write_json(directory / CONFIG, {**card, "metadata": metadata})


def _matrix(name: str, rows: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if dtype != "int8":
        return {name: rows.to(DTYPES[dtype]).contiguous()}
    values, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        values[start : start + BLOCK], scales[start : start + BLOCK] = quantised(rows[start : start + BLOCK])
    return {name: values, f"{name}_scales": scales}


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
    """The encoder as [d_sae, d_in]: as stored in layout rows, transposed in memory otherwise."""
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

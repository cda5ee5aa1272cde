"""Reads weights from disk and trusts nothing: names, shapes and sizes are checked before a byte of them is loaded.

diffusers' own loading leaves out tensors it does not know and makes random
ones where some are missing, with a log line; here either is one :class:`BundleError` that names file and tensor.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.memory import available_memory, gibibytes
from safetensors import safe_open

STEM = "diffusion_pytorch_model"
# Room beside the weights, measured at full size in bfloat16 at 512 pixels: 2.5 GiB of weights, 3.6 GiB at the largest
# moment, which is MoVQ's decoding (benchmarks/full_size_generator.py).
HEADROOM = 1.45
_LARGEST_HEADER = 100 << 20
# Tensors read before their file is closed again.
_AT_ONCE = 32
# What attention blocks called their tensors until diffusers 0.17; the published MoVQ may still do so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)\Z")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, its name in it, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


def stored_tensors(directory: Path, stem: str = STEM) -> dict[str, StoredTensor]:
    """The headers of a part's safetensors files, by the names that today's diffusers uses.

    Reads ``<stem>.safetensors``, the shards of ``<stem>.safetensors.index.json``, or the ``.fp16`` variant where
    there is nothing else.

    Raises:
        BundleError: no such file, no safetensors file, or one that is cut off.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(directory, stem):
        for name, shape in read_header(file).items():
            found[modern_name(name)] = StoredTensor(file, name, shape)
    return found


def modern_name(name: str) -> str:
    """The name that today's diffusers gives to a tensor."""
    old = _OLD_NAME.match(name)
    return f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else name


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file.

    Raises:
        BundleError: missing, no safetensors file, or cut off.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
    except FileNotFoundError:
        raise BundleError(f"{file}: missing; pull the bundle again") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file}: not a readable safetensors file ({error}); pull the bundle again") from None
    promised = 8 + length + max(ends, default=0)
    if size < promised:
        raise BundleError(f"{file}: cut off at {size} of {promised} bytes; pull the bundle again")
    return shapes


def check_against(model: Any, stored: dict[str, StoredTensor], directory: Path) -> None:
    """Compares the files' headers with a model built from the configuration beside them.

    Raises:
        BundleError: a tensor is missing, unknown or misshapen.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = next(iter(stored.values())).file if stored else directory
    if lacking := sorted(wanted.keys() - stored.keys()):
        raise BundleError(
            f"{file}: tensor {lacking[0]!r} is missing ({len(lacking)} in all), which {directory / 'config.json'}"
            " asks for; pull the bundle again"
        )
    if extra := sorted(stored.keys() - wanted.keys()):
        raise BundleError(
            f"{stored[extra[0]].file}: tensor {stored[extra[0]].name!r} does not belong to the model of"
            f" {directory / 'config.json'} ({len(extra)} in all)"
        )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise BundleError(
                f"{stored[name].file}: tensor {stored[name].name!r} has shape {list(stored[name].shape)}, but"
                f" {directory / 'config.json'} asks for {list(shape)}"
            )


def fill(model: Any, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device | str) -> None:
    """Gives a model on the meta device its weights, one tensor at a time, in ``dtype`` on ``device``.

    Raises:
        BundleError: a tensor holds NaN or infinite values, or values that ``dtype`` cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in {entry.file for entry in stored.values()}:
        names = [name for name, entry in stored.items() if entry.file == file]
        for first in range(0, len(names), _AT_ONCE):
            # Reopened for every few: pages of the file that were read count as this process's until it is closed.
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in names[first : first + _AT_ONCE]:
                    tensors[name] = _checked(opened.get_tensor(stored[name].name), stored[name], dtype).to(device)
    model.load_state_dict(tensors, strict=True, assign=True)


def _checked(tensor: torch.Tensor, entry: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    # The sum is not finite if a single value is not, and takes no memory; it may overflow by itself, so look closer.
    if not is_finite(tensor):
        raise BundleError(f"{entry.file}: tensor {entry.name!r} holds NaN or infinite values")
    converted = tensor.to(dtype)
    if converted.dtype == torch.float16 and not is_finite(converted):
        raise BundleError(f"{entry.file}: tensor {entry.name!r} holds values beyond float16; choose bfloat16")
    # A copy, because the file's pages may be changed or go away under a running server.
    return converted.clone() if converted.data_ptr() == tensor.data_ptr() else converted


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; takes no memory unless the sum overflows."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def weights_bytes(stored: Iterable[StoredTensor], dtype: torch.dtype) -> int:
    """Bytes that the tensors take in ``dtype``."""
    return sum(math.prod(entry.shape) for entry in stored) * dtype.itemsize


def ensure_room(what: str, needed: int, device: torch.device, *, available: int | None = None) -> None:
    """Refuses to begin what cannot end well: a process killed for memory leaves no sentence behind.

    Args:
        what: is to be loaded, for the sentence.
        needed: bytes of weights.
        device: where they go.
        available: bytes; by default what the machine has to spare now.

    Raises:
        BundleError: the weights and the working memory do not fit.
    """
    wanted = int(needed * HEADROOM)
    spare = available_bytes(device) if available is None else available
    if wanted > spare:
        where = "this machine has" if device.type == "cpu" else f"{device} has"
        raise BundleError(
            f"{what}: needs {gibibytes(wanted)} of memory ({gibibytes(needed)} of weights and room to work), but "
            f"{where} {gibibytes(spare)} to spare; use a smaller FACETEER_GENERATOR_DTYPE"
            + ("" if device.type == "cpu" else ", or FACETEER_GENERATOR_OFFLOAD=model or sequential")
            + ", or free memory"
        )


def available_bytes(device: torch.device) -> int:
    """Bytes that can be had on the device now: the GPU's own figure, or the kernel's and the control group's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def _files(directory: Path, stem: str) -> list[Path]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{index}: not a readable index ({error}); pull the bundle again") from None
        return [directory / Path(str(name)).name for name in names]
    half = directory / f"{stem}.fp16.safetensors"
    return [half if half.exists() else single]

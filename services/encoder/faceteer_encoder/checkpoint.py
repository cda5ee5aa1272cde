"""Reads a safetensors file and checks everything: each fault is one sentence that names the file and the tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from faceteer_runtime.bundle import BundleError
from safetensors import SafetensorError, safe_open
from torch import nn


def numbers_in(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header; 0 where there is none that can be read."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        # Loading will say what is wrong.
        return 0


def load_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All tensors by name, floating ones in ``dtype``; those already in it stay on the file's own pages.

    Raises:
        BundleError: missing, cut short, no safetensors file; a tensor holds NaN or infinite values.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: _checked(path, name, file.get_tensor(name), dtype) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BundleError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}); pull it again") from None
    return tensors


def fill(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path, config: str, name_in_file: Callable[[str], str]
) -> None:
    """Gives a model on the meta device its weights, without a copy; strict.

    ``name_in_file`` tells what the file calls one of the model's tensors.

    Raises:
        BundleError: a tensor is missing, unknown or misshapen, by ``config``, the name of the file that says so.
    """
    wanted = model.state_dict()
    if lacking := sorted(wanted.keys() - tensors.keys()):
        raise BundleError(
            f"{path}: {name_in_file(lacking[0])!r} is missing ({len(lacking)} in all); {config} asks for it"
        )
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise BundleError(
            f"{path}: {name_in_file(extra[0])!r} does not belong to the model of {config} ({len(extra)} in all)"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise BundleError(
                f"{path}: {name_in_file(name)!r} has shape {list(tensors[name].shape)}, but {config} asks for"
                f" {list(tensor.shape)}"
            )
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def _checked(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    # The sum is not finite if a single value is not, and takes no memory; it may overflow by itself, so look closer.
    if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
        raise BundleError(f"{path}: {name!r} holds NaN or infinite values")
    return tensor if dtype is None else tensor.to(dtype)

"""Reads other projects' files and trusts nothing in them; no code in a pickle is ever run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from faceteer_trainer.errors import JobError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises JobError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(found, dict):
        raise JobError(f"{path}: must be a JSON object")
    return found


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, on the file's own pages. Raises JobError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise JobError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise JobError(f"{path}: not a readable safetensors file ({error})") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """A state dict that torch.save wrote, mapped where it can be. Raises JobError where it holds more than tensors."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before torch 1.6 cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise JobError(f"{path}: missing") from None
    except pickle.UnpicklingError:
        raise JobError(f"{path}: holds more than tensors; it was not loaded, because that could run code") from None
    except Exception as error:
        # A file that is no pickle can make the unpickler raise almost anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise JobError(f"{path}: not a file of torch.save ({reason})") from None
    if not isinstance(found, dict):
        raise JobError(f"{path}: must hold a state dict, not {type(found).__name__}")
    return found

"""Activations and reconstructions by the packages whose file formats we read; run as a program of its own.

    python originals.py PACKAGES JOBS.json EMBEDS.npy OUT.npz

JOBS are [name, format, folder] each; OUT gets NAME/acts and NAME/output. PACKAGES holds sae-lens, dictionary-learning
and eai-sparsify without what they depend on, most of which is for language models. Modules that they would import are
replaced by empty ones, which is enough to load a file and run its forward pass; none of their own code is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

# What they import at their top and never call here.
MISSING = (
    "transformer_lens", "datasets", "nnsight", "wandb", "babe", "plotly", "nltk", "trl", "natsort",
    "schedulefree", "dataclasses_json", "tenacity", "zstandard", "einops", "bitsandbytes", "peft",
)  # fmt: skip


class HookPoint(torch.nn.Module):
    """transformer_lens' hook: without hooks, the identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class HookedRootModule(torch.nn.Module):
    """transformer_lens' base of modules with hooks."""

    def setup(self) -> None:
        """Gives hooks their names."""


REAL = {"HookPoint": HookPoint, "HookedRootModule": HookedRootModule}


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules whose every name is a mock."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in MISSING:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def anything(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in REAL:
                return REAL[name]
            return type(name, (), {"__init__": lambda self, *a, **k: None}) if name[0].isupper() else MagicMock()

        module.__getattr__ = anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def run(kind: str, folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [n, d_sae] and reconstructions [n, d_in] by the original package."""
    if kind == "saelens":
        from sae_lens import SAE

        sae = SAE.load_from_disk(folder, device="cpu")
        acts = sae.encode(x)
        return acts.to_dense() if acts.is_sparse else acts, sae.decode(acts)
    if kind == "dictionary-learning":
        from dictionary_learning import dictionary as classes

        name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
        more = {"normalize_decoder": False} if name == "AutoEncoder" else {}
        made = getattr(classes, name) if hasattr(classes, name) else None
        if made is None:
            from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

            made = next(getattr(m, name) for m in (top_k, batch_top_k, matryoshka_batch_top_k) if hasattr(m, name))
        sae = made.from_pretrained(str(folder / "ae.pt"), **more)
        acts = sae.encode(x)
        return acts, sae.decode(acts)
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder, device="cpu")
    found = coder.encode(x)
    dense = torch.zeros(len(x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)
    return dense, dense @ coder.W_dec + coder.b_dec


def main() -> None:
    packages, jobs, embeds, out = sys.argv[1:]
    sys.path.insert(0, packages)
    sys.meta_path.append(Empty())
    x, found = torch.from_numpy(np.load(embeds)), {}
    with torch.no_grad():
        for name, kind, folder in json.loads(Path(jobs).read_text()):
            acts, output = run(kind, Path(folder), x)
            found |= {f"{name}/acts": acts.numpy(), f"{name}/output": output.numpy()}
    np.savez(out, **found)


if __name__ == "__main__":
    main()

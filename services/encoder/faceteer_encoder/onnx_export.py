"""Writes an encoder's image tower as an ONNX file, and compares it with torch before anyone relies on it.

Needs onnx and onnxscript (the trainer's extra ``onnx``); the service needs neither.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_runtime.bundle import BundleError
from torch import nn

from faceteer_encoder.model import load_encoder
from faceteer_encoder.onnx_engine import REVISION_KEY, OnnxVisual

OPSET = 20
# Largest difference from torch, relative to the embeddings' largest value.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}


def export_visual(
    encoder_directory: Path, target: Path, *, encoder_revision: str, dtype: str = "float32"
) -> tuple[Path, float]:
    """Writes ``target`` (and, from 2 GB on, its weights beside it) with a batch of any size; whole or not at all.

    Returns:
        The path, and the largest difference from torch, relative to the largest value, over batches of 1 and 3.

    Raises:
        BundleError: the encoder cannot be read, or the export differs from torch by more than :data:`TOLERANCE`.
    """
    encoder, preprocessor = load_encoder(encoder_directory, dtype=dtype)
    number_type: torch.dtype = getattr(torch, dtype)
    visual: Any = _Unpooled(encoder.visual)
    example = torch.randn(2, 3, *preprocessor.size, generator=torch.Generator().manual_seed(0)).to(number_type)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as draft, warnings.catch_warnings():
        # The exporter's warnings concern deprecated calls within torch, not our code.
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            visual,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["image_embeds"],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[REVISION_KEY] = encoder_revision
        # Weights of two gigabytes and more do not fit into the file itself.
        beside = sum(p.numel() * p.element_size() for p in visual.parameters()) > 1_500_000_000
        part = Path(draft) / target.name
        program.save(str(part), external_data=beside)
        worst = _difference(part, visual, preprocessor.size, encoder_revision, number_type)
        if not worst <= TOLERANCE[dtype]:
            raise BundleError(f"{target}: the export differs from torch by {worst:.2g}; it was not kept")
        for file in sorted(Path(draft).iterdir(), key=lambda file: file == part):
            file.replace(target.parent / file.name)
    return target, worst


class _Unpooled(nn.Module):
    """The tower alone: embeddings and nothing else."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = self.visual(pixels)
        return embeds


def _difference(path: Path, visual: nn.Module, size: tuple[int, int], revision: str, number_type: torch.dtype) -> float:
    session = OnnxVisual(path, encoder_revision=revision)
    worst = 0.0
    for count in (1, 3):
        pixels = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = visual(pixels.to(number_type)).float().numpy()
        worst = max(worst, float(np.abs(session(pixels.numpy()) - expected).max() / np.abs(expected).max()))
    return worst

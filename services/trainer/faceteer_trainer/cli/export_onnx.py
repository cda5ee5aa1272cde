"""`faceteer_trainer export-onnx --bundle DIR`: the image encoder for ONNX Runtime, where its service looks for it."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from faceteer_encoder.onnx_engine import DEFAULT_PATH
from faceteer_encoder.onnx_export import TOLERANCE, export_visual
from faceteer_runtime.bundle import Bundle

from faceteer_trainer.errors import JobError
from faceteer_trainer.files import writing

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="whose encoder is exported")
    parser.add_argument("--out", type=Path, help=f"the file; {DEFAULT_PATH} in the bundle by default")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of its weights and arithmetic")


def run(arguments: argparse.Namespace) -> None:
    """Export, compare with torch, and say where the file is and how to serve it."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"{', '.join(missing)}: not installed; install faceteer-trainer[onnx]")
    target = arguments.out or arguments.bundle / DEFAULT_PATH
    encoder = Bundle.open(arguments.bundle).part("encoder")
    with writing(target):
        path, worst = export_visual(
            arguments.bundle / "encoder", target, encoder_revision=encoder.revision, dtype=arguments.dtype
        )
    print(f"{path}: differs from torch by at most {worst:.1e} of the largest value")
    elsewhere = f" FACETEER_ENCODER_ONNX_PATH={path}" if arguments.out else ""
    print(f"serve it with FACETEER_ENCODER_ENGINE=onnx{elsewhere}")

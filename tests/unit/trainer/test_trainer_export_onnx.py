"""The job that writes an encoder for ONNX Runtime."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import onnxruntime
import pytest
from faceteer_encoder.onnx_engine import DEFAULT_PATH, OnnxVisual
from faceteer_runtime.bundle import Bundle, verify
from faceteer_trainer.__main__ import main

POSTCARDS = Path(__file__).resolve().parents[3] / "deploy" / "bundles" / "postcards"


def test_the_exported_encoder_lies_where_its_service_looks_and_the_bundle_stays_whole(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    main(["export-onnx", "--bundle", str(bundle)])
    assert "serve it with FACETEER_ENCODER_ENGINE=onnx\n" in capsys.readouterr().out
    OnnxVisual(bundle / DEFAULT_PATH, encoder_revision=Bundle.open(bundle).part("encoder").revision)
    verify(bundle)


def test_another_place_and_half_precision_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "half.onnx"
    # Not the tiny bundle: ONNX Runtime 1.31 crashes on its float16 tower, on CPUs.
    main(["export-onnx", "--bundle", str(POSTCARDS), "--out", str(target), "--dtype", "float16"])
    assert f"FACETEER_ENCODER_ENGINE=onnx FACETEER_ENCODER_ONNX_PATH={target}" in capsys.readouterr().out
    assert onnxruntime.InferenceSession(target).get_inputs()[0].type == "tensor(float16)"
    assert not (POSTCARDS / DEFAULT_PATH).exists()


def test_no_bundle_and_no_exporter_are_told_in_one_line(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["export-onnx", "--bundle", str(tmp_path)])
    assert "bundle.json" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SystemExit, match="1"):
        main(["export-onnx", "--bundle", str(tiny_bundle)])
    assert capsys.readouterr().err == "error: onnxscript: not installed; install faceteer-trainer[onnx]\n"

"""The image tower by ONNX Runtime: torch's embeddings, chosen by a setting, and never quietly on the wrong device."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from faceteer.v1 import encoder_pb2
from faceteer_encoder.model import load_encoder
from faceteer_encoder.onnx_engine import DEFAULT_PATH, OnnxVisual
from faceteer_encoder.onnx_export import export_visual
from faceteer_runtime.bundle import Bundle, BundleError
from published_layout import write_image_encoder
from tiny_bundle import picture_bytes
from unit.encoder.conftest import Serve


@pytest.fixture(scope="module")
def exported(encoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with its tower exported, where a service looks for it."""
    bundle = tmp_path_factory.mktemp("onnx") / "tiny"
    shutil.copytree(encoder_bundle, bundle)
    revision = Bundle.open(bundle).part("encoder").revision
    path, worst = export_visual(bundle / "encoder", bundle / DEFAULT_PATH, encoder_revision=revision)
    assert path == bundle / DEFAULT_PATH
    assert worst < 1e-3
    assert [file.name for file in path.parent.iterdir()] == ["encoder.onnx"]
    return bundle


def test_embeddings_are_torchs_in_batches_of_any_size(exported: Path) -> None:
    revision = Bundle.open(exported).part("encoder").revision
    torchs, preprocessor = load_encoder(exported / "encoder")
    onnxs, _ = load_encoder(exported / "encoder")
    onnxs.use_onnx(OnnxVisual(exported / DEFAULT_PATH, encoder_revision=revision))
    assert (torchs.precision, onnxs.precision) == ("torch/float32", "onnx/float32")
    for count in (1, 2, 7):
        pixels = [preprocessor.pixels(picture_bytes(seed)) for seed in range(count)]
        a, b = np.stack(torchs.encode_images(pixels)), np.stack(onnxs.encode_images(pixels))
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()
    # Texts stay torch's.
    assert np.array_equal(torchs.encode_texts(["snow"])[0], onnxs.encode_texts(["snow"])[0])


async def test_the_setting_chooses_it_and_the_cache_keeps_both_apart(exported: Path, serve: Serve) -> None:
    answers = []
    for engine in ("torch", "onnx"):
        served = await serve(exported, encoder_engine=engine)
        request = encoder_pb2.EncodeImagesRequest(images=[picture_bytes(1)])
        answers.append((await served.stub.EncodeImages(request)).results[0].embedding)
    a, b = (np.frombuffer(answer.embeds.data, "<f4") for answer in answers)
    assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()
    assert answers[0].embedding_id != answers[1].embedding_id
    assert answers[0].embedding_id.partition("-")[0] == answers[1].embedding_id.partition("-")[0]


def test_a_tower_in_transformers_layout_is_exported_too(tmp_path: Path) -> None:
    write_image_encoder(tmp_path / "encoder")
    _, worst = export_visual(tmp_path / "encoder", tmp_path / "encoder.onnx", encoder_revision="r")
    assert worst < 1e-3


def test_a_file_of_another_encoder_a_broken_one_and_none_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"exported from encoder revision \w+, but the bundle has other; export it"):
        OnnxVisual(exported / DEFAULT_PATH, encoder_revision="other")
    with pytest.raises(
        BundleError, match=r"encoder\.onnx: missing; make it with `python -m faceteer_trainer export-onnx`"
    ):
        OnnxVisual(tmp_path / "encoder.onnx", encoder_revision="r")
    (tmp_path / "encoder.onnx").write_bytes((exported / DEFAULT_PATH).read_bytes()[:5000])
    with pytest.raises(BundleError, match="cannot be loaded by ONNX Runtime"):
        OnnxVisual(tmp_path / "encoder.onnx", encoder_revision="r")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this one has CUDA")
def test_a_gpu_that_is_asked_for_is_never_quietly_replaced_by_the_cpu(exported: Path) -> None:
    with pytest.raises(BundleError, match=r"offers only .*CPUExecutionProvider; uninstall onnxruntime and install"):
        OnnxVisual(exported / DEFAULT_PATH, encoder_revision="r", device="cuda")


class Refuses:
    """An ONNX Runtime that has CUDA in its list and drops it when a session opens, as it does without cuDNN."""

    def __init__(self, usable: set[str]) -> None:
        self.asked: list[list[str]] = []
        self.usable = usable

    def open(self, _runtime: object, _path: Path, _options: object, providers: list[str]) -> object:
        self.asked.append(providers)
        # TensorRT's missing libraries take CUDA with them.
        lost = providers[0] == "TensorrtExecutionProvider" and providers[0] not in self.usable
        kept = ["CPUExecutionProvider"] if lost else [name for name in providers if name in self.usable]
        outer = self

        class Session:
            def get_providers(self) -> list[str]:
                return kept

            def get_modelmeta(self) -> object:
                return type("Meta", (), {"custom_metadata_map": {"faceteer_encoder_revision": "r"}})

            def get_inputs(self) -> list[object]:
                assert outer
                return [type("Input", (), {"type": "tensor(float)", "name": "pixels"})]

        return Session()


@pytest.mark.parametrize(
    ("usable", "got"),
    [
        ({"TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"}, "TensorrtExecutionProvider"),
        ({"CUDAExecutionProvider", "CPUExecutionProvider"}, "CUDAExecutionProvider"),
        ({"CPUExecutionProvider"}, None),
    ],
    ids=["tensorrt", "cuda", "neither"],
)
def test_on_a_gpu_tensorrt_is_tried_then_cuda_and_then_it_refuses(
    exported: Path, monkeypatch: pytest.MonkeyPatch, usable: set[str], got: str | None
) -> None:
    everything = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    runtime = Refuses(usable)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    monkeypatch.setattr(OnnxVisual, "_open", staticmethod(runtime.open))
    if got is None:
        with pytest.raises(BundleError, match="ONNX Runtime cannot use the GPU"):
            OnnxVisual(exported / DEFAULT_PATH, encoder_revision="r", device="cuda")
        assert [asked[0] for asked in runtime.asked] == everything[:2]
    else:
        assert OnnxVisual(exported / DEFAULT_PATH, encoder_revision="r", device="cuda").providers[0] == got

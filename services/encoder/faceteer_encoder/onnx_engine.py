"""The image tower run by ONNX Runtime instead of torch.

Normalised pixels in, embeddings out. On a GPU it runs there or not at all: ONNX
Runtime's own way of falling back to the CPU with a line in a log would serve at a hundredth of the speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from faceteer_runtime.bundle import BundleError

# Relative to the bundle. Outside its parts: the tower is the same, so nothing that was made with it becomes invalid.
DEFAULT_PATH = Path("onnx") / "encoder.onnx"
REVISION_KEY = "faceteer_encoder_revision"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class OnnxVisual:
    """``image_embeds`` of an exported tower.

    Attributes:
        providers: those that run it, first choice first.
        dtype: of the exported weights and arithmetic, "float32" or "float16".
    """

    def __init__(self, path: Path, *, encoder_revision: str, device: str = "cpu", threads: int = 1) -> None:
        """Opens a file that `python -m faceteer_trainer export-onnx` wrote.

        Args:
            path: the file; its weights may be in a second file beside it.
            encoder_revision: of the bundle's encoder; the file must have been made from it.
            device: "cpu", or "cuda" (TensorRT where it is installed, else CUDA).
            threads: of the CPU's arithmetic.

        Raises:
            BundleError: the package or the file is missing, broken or of another encoder, or the GPU cannot be used.
        """
        try:
            import onnxruntime  # optional
        except ImportError:
            raise BundleError(
                "ONNX Runtime is not installed; install faceteer-encoder[onnx], or [onnx-gpu] for a GPU (never both), "
                "or set FACETEER_ENCODER_ENGINE=torch"
            ) from None
        if not path.is_file():
            raise BundleError(f"{path}: missing; make it with `python -m faceteer_trainer export-onnx`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        wanted = [CPU]
        if device.startswith("cuda"):
            wanted = self._gpu_providers(onnxruntime.get_available_providers())
        self._session = self._open(onnxruntime, path, options, wanted)
        if wanted[0] == TENSORRT and TENSORRT not in self._session.get_providers():
            # Without TensorRT's libraries ONNX Runtime may drop CUDA too.
            self._session = self._open(onnxruntime, path, options, [CUDA, CPU])
        self.providers: list[str] = self._session.get_providers()
        if device.startswith("cuda") and not {CUDA, TENSORRT} & set(self.providers):
            raise BundleError(
                f"device {device!r} was asked for, but ONNX Runtime cannot use the GPU (it offers "
                f"{', '.join(self.providers)}); mend CUDA and cuDNN, or set FACETEER_DEVICE=cpu"
            )
        made_from = self._session.get_modelmeta().custom_metadata_map.get(REVISION_KEY)
        if made_from != encoder_revision:
            raise BundleError(
                f"{path}: exported from encoder revision {made_from}, but the bundle has {encoder_revision}; "
                "export it again"
            )
        (self._input,) = self._session.get_inputs()
        self.dtype = "float16" if self._input.type == "tensor(float16)" else "float32"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings, float32 [n, embed_dim], of normalised pixels, float32 [n, 3, height, width]."""
        (embeds,) = self._session.run(None, {self._input.name: pixels.astype(self.dtype, copy=False)})
        found: np.ndarray = np.asarray(embeds, np.float32)
        return found

    @staticmethod
    def _gpu_providers(available: list[str]) -> list[str]:
        if CUDA not in available:
            raise BundleError(
                f"a GPU was asked for, but the ONNX Runtime installed here offers only {', '.join(available)}; "
                "uninstall onnxruntime and install faceteer-encoder[onnx-gpu] (beside each other the last installed "
                "wins), or set FACETEER_DEVICE=cpu"
            )
        return [TENSORRT, CUDA, CPU] if TENSORRT in available else [CUDA, CPU]

    @staticmethod
    def _open(onnxruntime: Any, path: Path, options: Any, providers: list[str]) -> Any:
        try:
            return onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:
            # ONNX Runtime's own exceptions have no common parent but Exception.
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BundleError(f"{path}: cannot be loaded by ONNX Runtime ({reason})") from None

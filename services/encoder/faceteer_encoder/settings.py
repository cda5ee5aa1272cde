"""Settings of the encoder service, beside those that all services share.

``encoder_`` begins every name, so that one process can read all services' settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class EncoderSettings(ServiceSettings):
    """Limits and number type of EncoderService; GetEncoder publishes the limits."""

    encoder_max_batch: int = Field(64, ge=1, description="Most pictures or texts in one encoder call.")
    encoder_model_batch: int = Field(
        16, ge=1, description="Most pictures or texts, of whichever calls, in one pass of the encoder."
    )
    encoder_max_image_bytes: int = Field(20_000_000, ge=1, description="Most bytes in one picture.")
    # Pillow itself refuses more than 178,956,970 pixels.
    encoder_max_image_pixels: int = Field(
        50_000_000, ge=1, le=170_000_000, description="Most pixels in one picture, by its header."
    )
    encoder_decode_threads: int = Field(
        2, ge=1, description="Threads that decode pictures; each may hold one decoded picture in memory."
    )
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Number type of the encoder's weights and arithmetic."
    )
    encoder_engine: Literal["torch", "onnx"] = Field(
        "torch",
        description="What runs the image tower; onnx needs a file that `python -m faceteer_trainer export-onnx` wrote.",
    )
    encoder_onnx_path: Path | None = Field(None, description="That file; onnx/encoder.onnx in the bundle by default.")

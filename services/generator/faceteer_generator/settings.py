"""The generator's own settings. A request's defaults (size, steps, guidance) are in the bundle."""

from __future__ import annotations

from typing import Literal

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class GeneratorSettings(ServiceSettings):
    """Settings of ``python -m faceteer_generator``; the all-in-one process reads them too."""

    listen: str = Field("127.0.0.1:50053", description="Address and port to serve on; port 0 picks a free one.")
    generator_max_batch: int = Field(16, ge=1, description="Most pictures denoised together in one step.")
    generator_max_queue: int = Field(
        64,
        ge=1,
        description="Most pictures, inversions and prompts that wait for a place; more are refused at once.",
    )
    generator_max_steps: int = Field(200, ge=1, description="Most denoising steps that a request may ask for.")
    generator_max_seeds: int = Field(16, ge=1, description="Most seeds, and so pictures, in one request.")
    generator_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the models; auto is float32 on a CPU and float16 elsewhere."
    )
    generator_compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = Field(
        "off",
        description="Compile the denoising model with torch.compile in this mode; the last two record CUDA graphs."
        " The first picture of every size and number of rows takes minutes.",
    )
    generator_offload: Literal["none", "model", "sequential"] = Field(
        "none", description="For small GPUs: keep idle models, or all but one layer, in host memory."
    )
    generator_max_image_bytes: int = Field(20_000_000, ge=1, description="Most bytes in a picture to start from.")
    generator_max_image_pixels: int = Field(
        50_000_000, ge=1, description="Most pixels in a picture to start from; more are refused undecoded."
    )

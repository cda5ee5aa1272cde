"""Kandinsky 2.2's decoder at full size with random weights: our loop against the stock pipeline, seconds and memory.

Random weights draw noise, but the arithmetic, its time and its memory are the real ones. The
configurations are the published ones (tests/unit/generator/published). Weights are made in bfloat16 from the start, so
that the largest moment is a step and not the loading.

Usage: ``OMP_NUM_THREADS=2 nice -n 10 python benchmarks/full_size_generator.py --json full_size_generator.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
from faceteer_generator.denoise import Denoiser
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.requests import ImageSpec

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "unit" / "generator" / "published"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def config_of(name: str) -> dict[str, Any]:
    """One of the published configurations."""
    return dict(json.loads((PUBLISHED / f"kandinsky_{name}.json").read_text()))


def random_model(cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """The model with random weights, made in ``dtype`` on ``device`` without a float32 copy."""
    with torch.device("meta"):
        model = cls.from_config(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            # Variance of one over what is summed, so that numbers stay in range through all the layers.
            tensor.normal_(0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
        elif name.endswith("weight"):
            tensor.fill_(1)
        else:
            tensor.zero_()
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def peak_gib() -> float:
    """The most memory this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dtype, device = _DTYPES[arguments.dtype], arguments.device
    unet, unet_s = timed(lambda: random_model(UNet2DConditionModel, config_of("unet"), dtype, device))
    movq, _ = timed(lambda: random_model(VQModel, config_of("movq"), dtype, device))
    scheduler_config = config_of("scheduler")
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((2, unet.config.encoder_hid_dim)).astype(np.float32)
    negative = torch.tensor(embeds[1], dtype=dtype, device=device)
    decoder = KandinskyDecoder(unet, movq, scheduler_config, negative, torch.device(device), dtype)
    asked = ImageSpec(embeds[0], None, arguments.size, arguments.size, arguments.steps, 4.0, "ddpm", 1)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "dtype": arguments.dtype,
        "size": arguments.size,
        "steps": arguments.steps,
        "parameters": {"unet": count(unet), "movq": count(movq)},
        "make_unet_s": round(unet_s, 1),
        "after_loading_gib": round(peak_gib(), 2),
    }
    denoiser = Denoiser(decoder)
    picture = denoiser.begin(asked)
    steps = []
    while not picture.done:
        steps.append(timed(lambda: denoiser.step([picture]))[1])
    if picture.error is not None:
        raise SystemExit(f"our loop: {picture.error}")
    report |= {"our_steps_s": [round(s, 2) for s in steps], "after_our_steps_gib": round(peak_gib(), 2)}
    print(json.dumps(report), flush=True)

    pipe = KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler.from_config(scheduler_config), movq=movq)
    stamps: list[float] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stamps.append(time.perf_counter())
        return {}

    started = time.perf_counter()
    theirs = pipe(
        image_embeds=torch.tensor(embeds[:1], dtype=dtype, device=device),
        negative_image_embeds=negative[None],
        width=arguments.size,
        height=arguments.size,
        num_inference_steps=arguments.steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        callback_on_step_end=note,
    ).images
    stock = [end - start for start, end in zip([started, *stamps], stamps, strict=False)]
    difference = (picture.latents.float() - theirs.float()).abs()
    report |= {
        "stock_steps_s": [round(s, 2) for s in stock],
        "same_bits": bool(torch.equal(picture.latents, theirs)),
        "largest_difference": float(difference.max()),
        "latents_deviation": float(theirs.float().std()),
        "finite": bool(torch.isfinite(theirs).all()),
    }
    print(json.dumps(report), flush=True)
    if arguments.decode:
        pixels, decode_s = timed(lambda: denoiser.decode([picture.latents]))
        report |= {"decode_s": round(decode_s, 1), "pixels": list(pixels[0].shape)}
    report["peak_gib"] = round(peak_gib(), 2)
    if device.startswith("cuda"):
        report["peak_device_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return report


def count(model: Any) -> int:
    """Numbers in a model's state."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="leave MoVQ's decoding out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    report = measure(arguments)
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if arguments.json:
        part = arguments.json.with_suffix(".part")
        part.write_text(text)
        part.replace(arguments.json)


if __name__ == "__main__":
    main()

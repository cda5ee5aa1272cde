"""Everything at the size of the original work, with random weights: checked, timed, weighed. Made for a GPU.

    python benchmarks/full_size.py --device cuda --json full-size.json          every part, one table
    python benchmarks/full_size.py --device cpu --parts encoder --batches 1      what one part takes without a GPU

CLIP ViT-bigG-14 (1.84 B parameters), an SAE of 163,840 features, Kandinsky 2.2's decoder (1.25 B) at 512 px against the
stock pipeline. Random weights say nothing about pictures, but arithmetic, time and memory are the real ones. Each part
runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARTS = ("encoder", "sae", "generator")
BIGG = {
    "embed_dim": 1280,
    "vision_cfg": {
        "image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 8192 / 1664, "patch_size": 14,
    },
}  # fmt: skip
D_SAE, D_IN, K = 163_840, 1280, 32
_PARAMETERS = 1_844_907_264


def median_seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """The median time of a call after a first one, on a GPU until it is done."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def memory(device: str) -> dict[str, float]:
    """The most this process has had, in GB: of the machine, and of the GPU."""
    found = {"peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)}
    if device.startswith("cuda"):
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def random_clip(dtype: torch.dtype, device: str) -> torch.nn.Module:
    """ViT-bigG-14's image tower with random weights, made in ``dtype`` on ``device``."""
    # Inside the part: what another part imports would count in this one's memory.
    from faceteer_encoder.model import _build

    with torch.device("meta"):
        model = _build(BIGG)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "ln_" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0, 1 / math.sqrt(tensor.shape[-1]), generator=generator)
    return model


def measure_encoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second by batch size; and that half precision gives float32's embeddings, on a GPU."""
    # Inside the part: what another part imports would count in this one's memory.
    from faceteer_encoder.model import ClipEncoder
    from faceteer_encoder.preprocess import Preprocessor

    dtype = torch.bfloat16 if arguments.device == "cpu" else torch.float16
    preprocess = {"size": 224, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    preprocessor = Preprocessor(preprocess, max_bytes=10**8, max_pixels=10**8)
    model = random_clip(dtype, arguments.device)
    assert sum(parameter.numel() for parameter in model.parameters()) == _PARAMETERS
    encoder = ClipEncoder(model, preprocessor, None, 1280, arguments.device, dtype)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(max(arguments.batches))]
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "images_per_second": {}}
    for batch in arguments.batches:
        seconds = median_seconds(lambda n=batch: encoder.encode_images(pixels[:n]), arguments.device, arguments.repeats)
        found["images_per_second"][batch] = round(batch / seconds, 2)
    found |= memory(arguments.device)
    if arguments.device != "cpu":
        whole = ClipEncoder(random_clip(torch.float32, arguments.device), preprocessor, None, 1280, arguments.device)
        half, full = np.stack(encoder.encode_images(pixels[:4])), np.stack(whole.encode_images(pixels[:4]))
        off = np.linalg.norm(half - full, axis=1) / np.linalg.norm(full, axis=1)
        found["relative_difference_from_float32"] = float(off.max())
    return found


def measure_sae(arguments: argparse.Namespace) -> dict[str, Any]:
    """One encode at batch 1 and 64 from the file's own pages; and that a GPU finds the CPU's features."""
    # Inside the part: what another part imports would count in this one's memory.
    from faceteer_sae.model import SparseAutoencoder
    from faceteer_sae.weights import SaeWeights, write_weights

    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    x = np.random.default_rng(0).standard_normal((64, D_IN)).astype(np.float32)
    x *= 40 / np.linalg.norm(x, axis=1, keepdims=True)
    weights = SaeWeights("topk", rows, torch.zeros(D_SAE), rows, torch.zeros(D_IN), False, K)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        write_weights(Path(home), weights, "float16")
        del weights, rows
        found["file_gb"] = round((Path(home) / "sae_weights.safetensors").stat().st_size / 1e9, 2)
        sae = SparseAutoencoder.load(Path(home), arguments.device)
        for batch in (1, 64):
            seconds = median_seconds(lambda n=batch: sae.encode(x[:n]), arguments.device, arguments.repeats)
            found[f"encode_ms_batch_{batch}"] = round(seconds * 1000, 2)
        if arguments.device != "cpu":
            other = SparseAutoencoder.load(Path(home), "cpu")
            same = [
                a.top_indices.tolist() == b.top_indices.tolist() and np.array_equal(a.top_acts, b.top_acts)
                for a, b in zip(sae.encode(x[:8]), other.encode(x[:8]), strict=True)
            ]
            found["same_features_as_the_cpu"] = all(same)
        found |= memory(arguments.device)
    return found


def measure_generator(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step, a whole picture and the first preview at 512 px, batch by batch, beside the stock pipeline."""
    # Inside the part: what another part imports would count in this one's memory.
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
    from faceteer_generator.denoise import Denoiser
    from faceteer_generator.kandinsky import KandinskyDecoder
    from faceteer_generator.requests import ImageSpec
    from full_size_generator import config_of, random_model

    device, size, steps = arguments.device, arguments.size, arguments.steps
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    unet = random_model(UNet2DConditionModel, config_of("unet"), dtype, device)
    movq = random_model(VQModel, config_of("movq"), dtype, device)
    embeds = np.random.default_rng(1).standard_normal((2, 1280)).astype(np.float32)
    negative = torch.tensor(embeds[1], dtype=dtype, device=device)
    decoder = KandinskyDecoder(unet, movq, config_of("scheduler"), negative, torch.device(device), dtype)
    denoiser = Denoiser(decoder)
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler.from_config(config_of("scheduler")), movq=movq)
    pipe.set_progress_bar_config(disable=True)

    def ours(batch: int) -> tuple[list[Any], float]:
        pictures = [
            denoiser.begin(ImageSpec(embeds[0], None, size, size, steps, 4.0, "ddpm", seed)) for seed in range(batch)
        ]
        first = 0.0
        began = time.perf_counter()
        while not pictures[0].done:
            denoiser.step(pictures, [True] * batch if not first else [])
            if not first:
                denoiser.preview([pictures[0].clean])
                first = time.perf_counter() - began
        return pictures, first

    def stock(batch: int) -> Any:
        return pipe(
            image_embeds=torch.tensor(embeds[:1], dtype=dtype, device=device).repeat(batch, 1),
            negative_image_embeds=negative[None].repeat(batch, 1),
            width=size, height=size, num_inference_steps=steps, guidance_scale=4.0, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        ).images  # fmt: skip

    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "size": size, "steps": steps, "batches": {}}
    for batch in arguments.batches:
        if batch > 8:
            continue
        pictures, preview = ours(batch)
        seconds = median_seconds(lambda n=batch: ours(n), device, arguments.repeats)
        theirs = median_seconds(lambda n=batch: stock(n), device, arguments.repeats)
        latents = [picture.latents for picture in pictures]
        drawn = median_seconds(lambda some=latents: denoiser.decode(some), device, 1)
        difference = max(
            float((a.float() - b.float()).abs().max()) for a, b in zip(latents, stock(batch).split(1), strict=True)
        )
        found["batches"][batch] = {
            "step_ms": round(1000 * seconds / steps, 1),
            "stock_step_ms": round(1000 * theirs / steps, 1),
            "decode_s": round(drawn, 2),
            "picture_s_at_50_steps": round((50 * seconds / steps + drawn) / batch, 2),
            "first_preview_s": round(preview, 2),
            "largest_difference_from_stock": difference,
        }
    return found | memory(device)


MEASURES = {"encoder": measure_encoder, "sae": measure_sae, "generator": measure_generator}


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [f"# {report['device']}, {report['date']}", ""]
    for part in PARTS:
        for key, value in report.get(part, {}).items():
            if isinstance(value, dict):
                lines += [f"{part:10} {key} {name}: {figure}" for name, figure in value.items()]
            else:
                lines.append(f"{part:10} {key}: {value}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps that are timed")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA GPU; measure one part on the CPU with --device cpu --parts encoder")
    if arguments.one:
        print(json.dumps(MEASURES[arguments.one](arguments)))
        return
    cuda = arguments.device.startswith("cuda")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {arguments.threads} threads",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }
    for part in arguments.parts:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", part]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report[part] = json.loads(ran.stdout.splitlines()[-1])
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

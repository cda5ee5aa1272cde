"""Train a bundle's generator on, for sharper subjects: fresh scenes, with weight on what is a subject.

Three steps, each resumed and skipped as `build` does: the autoencoder, with latents held where they were; the UNet on
the new latents; the decoding half on latents as that UNet draws them. Encoder, SAE and library stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, VQModel
from faceteer_trainer.budget import Budget
from faceteer_trainer.errors import JobError
from safetensors.torch import load_file, save_file

from faceteer_postcards.bundle import load_bundle, seal_bundle, write_generator
from faceteer_postcards.corpus import scene_seed
from faceteer_postcards.movq import Batch, RefineMovq, refine_movq, to_tensor
from faceteer_postcards.render import render_with_mask
from faceteer_postcards.training import autocast, step_rng
from faceteer_postcards.unet import Latents, RefineUnet, draw_from, refine_unet
from faceteer_postcards.world import Scene, sample_codes

# Seeds of corpora, apart from those of building and of the evaluation: fresh pictures, cached latents, drawn latents.
_MOVQ, _UNET, _DRAWN = 1000, 50, 70
STEPS = ("movq", "unet", "decoder")


@dataclass(frozen=True)
class Plan:
    """What each step may spend, in minutes of one core, and on how many scenes."""

    budgets: Mapping[str, Budget] = field(
        default_factory=lambda: {
            "movq": Budget(minutes=70), "unet": Budget(minutes=90), "decoder": Budget(minutes=30),
        }
    )  # fmt: skip
    scenes: int = 24_576  # whose latents the UNet learns from
    drawn: int = 2048  # latents that it draws for the decoding half
    movq: RefineMovq = field(default_factory=RefineMovq)
    unet: RefineUnet = field(default_factory=RefineUnet)


def fresh_pictures(seed: int, start: int, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pictures [count, 64, 64, 3] from `start` on in an endless corpus, and masks of their subjects [count, 64, 64]."""
    codes = sample_codes(count, seed * 1_000_003 + start)
    drawn = [render_with_mask(Scene.from_codes(row, scene_seed(seed, start + i))) for i, row in enumerate(codes)]
    return np.stack([picture for picture, _ in drawn]), np.stack([mask for _, mask in drawn])


class Refinement:
    """The steps over one working directory, which belongs to one bundle."""

    def __init__(self, source: Path, work: Path, plan: Plan | None = None, seed: int = 0, device: str = "cpu") -> None:
        self.source, self.work, self.plan, self.seed, self.device = source, work, plan or Plan(), seed, device
        self.bundle = load_bundle(source)
        work.mkdir(parents=True, exist_ok=True)

    def movq(self) -> VQModel:
        """Both halves of the autoencoder, on pictures that it has never seen."""
        final = self.work / "movq"
        if not final.exists():

            def batches(step: int, size: int) -> Batch:
                return Batch(*fresh_pictures(_MOVQ + self.seed, step * size, size))

            refine_movq(
                self.bundle.movq, batches, self.work / "movq-run", self.plan.budgets["movq"], self.plan.movq,
                self.seed, self.device,
            ).save_pretrained(final)  # fmt: skip
        return VQModel.from_pretrained(final).eval()

    def unet(self) -> UNet2DConditionModel:
        """The UNet, on the latents of the refined autoencoder; needs `movq`."""
        final = self.work / "unet"
        if not final.exists():
            cache = self._cache()
            embeds = cache["embeds"]

            def draw(size: int, generator: torch.Generator) -> Latents:
                rows = torch.randint(len(embeds), (size,), generator=generator)
                return Latents(cache["latents"][rows].float(), embeds[rows], cache["cells"][rows].float() / 255)

            refine_unet(
                self.bundle.unet, draw, self.bundle.negative, embeds.std(0), self.work / "unet-run",
                self.plan.budgets["unet"], self.plan.unet, self.seed, self.device,
            ).save_pretrained(final)  # fmt: skip
        return UNet2DConditionModel.from_pretrained(final).eval()

    def decoder(self) -> VQModel:
        """The decoding half, half of each batch on latents that the refined UNet drew; needs `movq` and `unet`."""
        final = self.work / "decoder"
        if not final.exists():
            drawn = self._drawn()
            settings = replace(self.plan.movq, encoder=False, peak_rate=self.plan.movq.peak_rate / 2)

            def batches(step: int, size: int) -> Batch:
                pictures, masks = fresh_pictures(_MOVQ + self.seed + 1, step * size, size)
                rows = step_rng(self.seed, step).integers(0, len(drawn["latents"]), size // 2)
                pictures[: len(rows)] = drawn["pictures"][rows].numpy()
                masks[: len(rows)] = drawn["masks"][rows].float().numpy()
                return Batch(pictures, masks, drawn["latents"][rows].float())

            refine_movq(
                self.movq(), batches, self.work / "decoder-run", self.plan.budgets["decoder"], settings, self.seed,
                self.device,
            ).save_pretrained(final)  # fmt: skip
        return VQModel.from_pretrained(final).eval()

    @torch.no_grad()
    def _cache(self) -> dict[str, torch.Tensor]:
        """Latents f16, embeddings f32 and subject cells u8 of the scenes that the UNet learns from."""
        path = self.work / "latents.safetensors"
        if not path.exists():
            movq, encoder = self.movq().to(self.device), self.bundle.encoder.to(self.device)
            parts: dict[str, list[torch.Tensor]] = {"latents": [], "embeds": [], "cells": []}
            for start in range(0, self.plan.scenes, 64):
                pictures, masks = fresh_pictures(_UNET + self.seed, start, min(64, self.plan.scenes - start))
                images = to_tensor(pictures, self.device)
                with autocast(torch.device(self.device)):
                    parts["latents"].append(movq.encode(images).latents.half().cpu())
                parts["embeds"].append(encoder.encode_image(images).float().cpu())
                share = F.avg_pool2d(torch.from_numpy(masks)[:, None], 4)[:, 0]
                parts["cells"].append((255 * share).round().to(torch.uint8))
            save_file({name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, path)
        return load_file(path)

    @torch.no_grad()
    def _drawn(self) -> dict[str, torch.Tensor]:
        """Latents f16 that the UNet drew on from noised ones, and what they should show: pictures u8, masks f16."""
        path = self.work / "drawn.safetensors"
        if not path.exists():
            movq, unet = self.movq(), self.unet()
            parts: dict[str, list[torch.Tensor]] = {"latents": [], "pictures": [], "masks": []}
            for start in range(0, self.plan.drawn, 32):
                pictures, masks = fresh_pictures(_DRAWN + self.seed, start, min(32, self.plan.drawn - start))
                images = to_tensor(pictures)
                # From early timesteps on, so that it decides shapes itself, but not which scene it is.
                time = int(np.random.default_rng((self.seed, start)).integers(350, 850))
                latents = movq.encode(images).latents
                embeds = self.bundle.encoder.to("cpu").encode_image(images)
                parts["latents"].append(draw_from(unet, latents, embeds, self.bundle.negative, time, start).half())
                parts["pictures"].append(torch.from_numpy(pictures))
                parts["masks"].append(torch.from_numpy(masks).half())
            save_file({name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, path)
        return load_file(path)

    def write(self, out: Path) -> Path:
        """The bundle with the refined generator, sealed; with the decoding half of `movq` where `decoder` was not run.

        The library's icons are still those that the old generator drew; `draw-icons` draws them anew.
        """
        movq = self.decoder() if (self.work / "decoder").exists() else self.movq()
        unet = self.unet()
        with_new = out.with_name(out.name + ".part")
        shutil.rmtree(with_new, ignore_errors=True)
        shutil.copytree(self.source, with_new)
        write_generator(unet, movq, self.bundle.negative, with_new / "generator")
        seal_bundle(with_new, self.bundle.negative.shape[1])
        shutil.rmtree(out, ignore_errors=True)
        with_new.rename(out)
        return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="whose generator is trained on; it stays as it is")
    parser.add_argument("--step", choices=(*STEPS, "write"), help="only this one; all of them, and write, by default")
    parser.add_argument("--out", type=Path, help="where the bundle with the new generator goes (the whole, write)")
    parser.add_argument("--work", type=Path, default=Path("runs/refine"), help="caches, checkpoints and logs")
    parser.add_argument("--minutes", type=float, help="a step's budget, instead of 70 (movq), 90 (unet), 30 (decoder)")
    parser.add_argument("--compile", action="store_true", help="by Inductor: slow to start, then 1.7 times as fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Run the step, or all of them."""
    torch.set_num_threads(1)  # two threads on a busy machine are slower than one
    plan = Plan(movq=RefineMovq(compiled=arguments.compile), unet=RefineUnet(compiled=arguments.compile))
    if arguments.minutes is not None:
        if arguments.step not in STEPS:
            raise JobError("--minutes is one step's budget; name it with --step")
        plan = replace(plan, budgets={**plan.budgets, arguments.step: Budget(minutes=arguments.minutes)})
    if arguments.step in (None, "write"):
        if arguments.out is None:
            raise JobError("give --out, where the bundle with the new generator goes")
        if arguments.out.resolve() == arguments.bundle.resolve():
            raise JobError("--out is --bundle; give another folder, so that the old generator is kept")
    refinement = Refinement(arguments.bundle, arguments.work, plan, arguments.seed, arguments.device)
    for step in (arguments.step,) if arguments.step in STEPS else () if arguments.step else STEPS:
        print(f"== {step}", flush=True)
        getattr(refinement, step)()
    print(refinement.write(arguments.out) if arguments.step in (None, "write") else refinement.work / arguments.step)

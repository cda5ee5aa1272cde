"""Put the trained parts together as a bundle in docs/bundles.md's layout, and take one apart again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from faceteer_runtime import bundle as bundle_format
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics, load_statistics
from faceteer_trainer.sae.autoencoder import Autoencoder
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from faceteer_postcards.clip import load_encoder
from faceteer_postcards.unet import build_scheduler

STEPS = 25
GUIDANCE = 2.0
DESCRIPTION = "Small pictures that this project draws itself, with known ground truth: the embedded default."


@dataclass(frozen=True)
class LoadedBundle:
    """Every model of a bundle, in float32 and eval mode."""

    encoder: open_clip.CLIP
    tokenizer: SimpleTokenizer
    sae: Autoencoder
    served_sae: SparseAutoencoder  # the same as the SAE service runs it
    statistics: FeatureStatistics
    unet: UNet2DConditionModel
    movq: VQModel
    scheduler: DDIMScheduler
    negative: torch.Tensor  # [1, d]
    steps: int
    guidance: float


@torch.no_grad()
def negative_embeds(encoder: open_clip.CLIP) -> torch.Tensor:
    """The embedding [1, d] of pixels that are all zero after preprocessing: a mean-grey picture."""
    size = encoder.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    device = next(encoder.parameters()).device
    embeds: torch.Tensor = encoder.encode_image(torch.zeros(1, 3, height, width, device=device))
    return embeds.float().cpu()


def write_generator(unet: UNet2DConditionModel, movq: VQModel, negative: torch.Tensor, directory: Path) -> None:
    """Write generator/ as KandinskyV22Pipeline saves itself, in float16. The models given are left as they are."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, model in (("unet", unet), ("movq", movq)):
        kind = type(model)
        half = kind.from_config(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(directory / name)
        config = json.loads((directory / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it lay on the machine that made it
        (directory / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_scheduler().save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "KandinskyV22Pipeline",
        "_diffusers_version": "0.42.1",
        "movq": ["diffusers", "VQModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    save_file({"negative_image_embeds": negative.float()}, directory / "negative_embeds.safetensors")


def seal_bundle(directory: Path, embed_dim: int) -> None:
    """Write bundle.json: digests, revisions, licences."""
    parts = {
        "encoder": {"kind": "open_clip", "embed_dim": embed_dim},
        "sae": {"kind": "sae"},
        "generator": {"kind": "kandinsky-2-2", "sizes": [[64, 64]], "steps": STEPS, "guidance_scale": GUIDANCE,
                      "scheduler": "ddim"},
        "library": {"kind": "sqlite"},
    }  # fmt: skip
    present = {name: facts for name, facts in parts.items() if (directory / name).is_dir()}
    manifest = {"name": "postcards", "description": DESCRIPTION, "parts": present,
                "licences": dict.fromkeys(present, "Apache-2.0")}  # fmt: skip
    bundle_format.seal(directory, manifest)


def load_bundle(directory: Path, device: str = "cpu") -> LoadedBundle:
    """Every model of a bundle on `device`."""
    encoder, tokenizer = load_encoder(directory / "encoder")
    generator = directory / "generator"
    facts = bundle_format.Bundle.open(directory).part("generator").facts
    sae = Autoencoder.load(directory / "sae")
    statistics = load_statistics(directory / "sae", sae.d_in, sae.d_sae)
    if statistics is None:
        raise bundle_format.BundleError(f"{directory / 'sae'}: has no statistics of its features")
    return LoadedBundle(
        encoder.to(device),
        tokenizer,
        sae,
        SparseAutoencoder.load(directory / "sae"),
        statistics,
        UNet2DConditionModel.from_pretrained(generator / "unet", torch_dtype=torch.float32).to(device).eval(),
        VQModel.from_pretrained(generator / "movq", torch_dtype=torch.float32).to(device).eval(),
        DDIMScheduler.from_pretrained(generator / "scheduler"),
        load_file(generator / "negative_embeds.safetensors")["negative_image_embeds"].to(device),
        facts["steps"],
        facts["guidance_scale"],
    )

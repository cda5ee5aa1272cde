"""A random checkpoint in Kandinsky 2.2's published layout: its configurations as they stand, with fewer channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, VQModel
from safetensors.torch import save_file
from tiny_bundle import EMBED_DIM

PUBLISHED = Path(__file__).parent / "published"
# What is shrunk; block types, head counts, channels of latents and everything else are the published ones.
SMALL_UNET = {
    "block_out_channels": [32, 64, 64, 96],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "encoder_hid_dim": EMBED_DIM,
}
SMALL_MOVQ = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "num_vq_embeddings": 16}


def published(name: str) -> dict[str, Any]:
    """One of the published configurations."""
    return dict(json.loads((PUBLISHED / f"kandinsky_{name}.json").read_text()))


def write_small_kandinsky(directory: Path, **scheduler: Any) -> Path:
    """Writes unet/, movq/, scheduler/ and model_index.json as published, and our negative_embeds.safetensors.

    ``scheduler`` overrides keys of the published scheduler_config.json.
    """
    torch.manual_seed(4)
    configs = {"unet": published("unet") | SMALL_UNET, "movq": published("movq") | SMALL_MOVQ}
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "movq": VQModel.from_config(configs["movq"]),
    }
    for name, model in models.items():
        part = directory / name
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(configs[name], indent=2))
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (directory / "scheduler").mkdir()
    config = published("scheduler") | scheduler
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    index = {
        "_class_name": "KandinskyV22Pipeline",
        "_diffusers_version": "0.17.0.dev0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "movq": ["diffusers", "VQModel"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    negative = torch.randn(1, EMBED_DIM, generator=torch.Generator().manual_seed(5))
    save_file({"negative_image_embeds": negative}, directory / "negative_embeds.safetensors")
    return directory

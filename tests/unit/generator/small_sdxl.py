"""A random SDXL with a bigG IP-Adapter: the published layouts with fewer channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tiny_bundle import EMBED_DIM
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from unit.generator.small_prior import _write_tokenizer

# SDXL base 1.0's UNet, as its model card's configuration gives it.
PUBLISHED_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "sample_size": 128,
}
SMALL_UNET = PUBLISHED_UNET | {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TOKENS = 4


def write_small_sdxl(directory: Path) -> Path:
    """Writes unet/, vae/, scheduler/, both text encoders with tokenizers, and ip_adapter/."""
    torch.manual_seed(8)
    unet = UNet2DConditionModel.from_config(SMALL_UNET)
    for name, model, config in (
        ("unet", unet, SMALL_UNET),
        ("vae", AutoencoderKL.from_config(SMALL_VAE), SMALL_VAE),
    ):
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text(json.dumps(config))
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, directory / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    for suffix, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        vocabulary = _write_tokenizer(directory / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
        )
        cls(config).save_pretrained(directory / f"text_encoder{suffix}")
    (directory / "ip_adapter").mkdir()
    save_file(_adapter(unet), directory / "ip_adapter" / "ip-adapter_sdxl.safetensors")
    return directory


def _adapter(unet: Any) -> dict[str, torch.Tensor]:
    width = SMALL_UNET["cross_attention_dim"]
    tensors = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, EMBED_DIM) / EMBED_DIM**0.5,
        "image_proj.proj.bias": torch.randn(TOKENS * width) / 10,
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for position, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for kind in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{position}.{kind}.weight"] = torch.randn(hidden, width) / width**0.5
    # The published file is in half precision.
    return {name: tensor.half() for name, tensor in tensors.items()}

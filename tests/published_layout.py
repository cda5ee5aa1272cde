"""Small random checkpoints in the layouts in which others publish: transformers' CLIP of Kandinsky 2.2's prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

# As Kandinsky 2.2's prior publishes it.
PROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def write_image_encoder(directory: Path, *, embed_dim: int = 32, dtype: torch.dtype = torch.float32, **changes: Any
                        ) -> CLIPVisionModelWithProjection:  # fmt: skip
    """Writes image_encoder/ and image_processor/; returns transformers' model, in float32."""
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=104, num_hidden_layers=3, num_attention_heads=3, image_size=224,
        patch_size=56, projection_dim=embed_dim, hidden_act="gelu", **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(config).eval()
    _spread(model)
    _write(directory / "image_encoder", model, config.to_dict(), dtype, "vision_model")
    (directory / "image_processor").mkdir()
    (directory / "image_processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def write_text_encoder(directory: Path, *, embed_dim: int = 32, dtype: torch.dtype = torch.float32
                       ) -> CLIPTextModelWithProjection:  # fmt: skip
    """Writes text_encoder/; returns transformers' model, in float32."""
    config = CLIPTextConfig(
        hidden_size=40, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, projection_dim=embed_dim,
        hidden_act="gelu", vocab_size=49408, max_position_embeddings=77, eos_token_id=2, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = CLIPTextModelWithProjection(config).eval()
    _spread(model)
    _write(directory / "text_encoder", model, config.to_dict(), dtype, "text_model")
    return model


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Random weights large enough that every one of them matters to the output."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


def _write(directory: Path, model: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype, inner: str) -> None:
    directory.mkdir(parents=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}
    # Old versions of transformers saved this beside the weights.
    tensors[f"{inner}.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, default=str))

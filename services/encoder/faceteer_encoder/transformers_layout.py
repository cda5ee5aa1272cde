"""CLIP as transformers saves it (Kandinsky 2.2's image_encoder and text_encoder), in open_clip's terms.

    image_encoder/   config.json, model.safetensors: CLIPVisionModelWithProjection
    image_processor/ preprocessor_config.json
    text_encoder/    config.json, model.safetensors: CLIPTextModelWithProjection; optional

The two libraries hold the same numbers under other names; open_clip keeps query,
key and value as one matrix, and its projections the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import BundleError

IMAGE, TEXT, PROCESSOR = "image_encoder", "text_encoder", "image_processor"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_ACTIVATIONS = {"gelu": False, "quick_gelu": True}
# transformers' name of what is around the layers -> open_clip's.
_VISION = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_LANGUAGE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BACK = {
    **{ours: theirs for theirs, ours in _VISION.items()},
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "attn.in_proj_weight": "self_attn.q_proj.weight",
    "attn.in_proj_bias": "self_attn.q_proj.bias",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Numbers of positions, which old versions of transformers saved though they are always 0, 1, 2 ...
_NO_WEIGHTS = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")


def model_cfg(directory: Path) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of the configurations in ``directory``.

    Raises:
        BundleError: one is missing, or says what open_clip's model cannot be.
    """
    vision = _read(directory / IMAGE / CONFIG)
    heads, width = vision["num_attention_heads"], vision["hidden_size"]
    cfg: dict[str, Any] = {
        "embed_dim": vision["projection_dim"],
        "quick_gelu": _ACTIVATIONS[vision["hidden_act"]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": width,
            "head_width": width // heads,
            "mlp_ratio": vision["intermediate_size"] / width,
            "patch_size": vision["patch_size"],
        },
    }
    if (directory / TEXT).is_dir():
        text = _read(directory / TEXT / CONFIG)
        if text["projection_dim"] != cfg["embed_dim"] or text["hidden_act"] != vision["hidden_act"]:
            raise BundleError(f"{directory / TEXT / CONFIG}: does not go with {IMAGE}'s projection_dim and hidden_act")
        cfg["text_cfg"] = {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        }
    return cfg


def preprocess_cfg(directory: Path) -> dict[str, Any]:
    """Our ``preprocess_cfg`` of image_processor/preprocessor_config.json.

    Raises:
        BundleError: missing, or asks for what CLIP's processor does not do.
    """
    path = directory / PROCESSOR / "preprocessor_config.json"
    given = _read(path, required=())
    size, crop = (_edge(given.get(name, 224)) for name in ("size", "crop_size"))
    steps = ("do_resize", "do_center_crop", "do_normalize")
    if size != crop or given.get("resample", 3) not in _RESAMPLING or not all(given.get(step, True) for step in steps):
        raise BundleError(f"{path}: only resizing the shorter edge, cropping the middle and normalising is served")
    return {
        "size": size,
        "mean": given["image_mean"],
        "std": given["image_std"],
        "interpolation": _RESAMPLING[given.get("resample", 3)],
        "resize_mode": "shortest",
        # transformers cuts the odd pixel off the far side; torchvision rounds, and is one off for 640 x 427.
        "crop_rounding": "down",
    }


def to_open_clip(image: Mapping[str, torch.Tensor], text: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """A state dict of open_clip.CLIP (or of its visual tower alone, under ``visual.``) from transformers' tensors.

    Names that are not known here pass through, so that whoever fills the model sees and refuses them.
    """
    tensors = _tower(image, "vision_model.encoder.layers.", "visual.transformer.resblocks.", _VISION)
    if "visual_projection.weight" in tensors:
        tensors["visual.proj"] = tensors.pop("visual_projection.weight").T
    if text is not None:
        tensors |= _tower(text, "text_model.encoder.layers.", "transformer.resblocks.", _LANGUAGE)
        if "text_projection.weight" in tensors:
            tensors["text_projection"] = tensors.pop("text_projection.weight").T
        # Scales logits in training; no embedding depends on it.
        tensors["logit_scale"] = torch.tensor(0.0)
    return tensors


def name_in_file(name: str) -> str:
    """transformers' name of one of open_clip's tensors; of a joined query, key and value, the query's."""
    for ours, theirs in _BACK.items():
        name = name.replace(ours, theirs)
    return name


def _tower(
    given: Mapping[str, torch.Tensor], layers: str, resblocks: str, around: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in given.items():
        if name in _NO_WEIGHTS:
            continue
        if not name.startswith(layers):
            found[around.get(name, name)] = tensor
            continue
        number, _, rest = name.removeprefix(layers).partition(".")
        module, _, kind = rest.rpartition(".")
        if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            apart.setdefault(f"{resblocks}{number}.attn.in_proj_{kind}", {})[module[-6]] = tensor
        else:
            found[f"{resblocks}{number}.{_LAYER.get(module, module)}.{kind}"] = tensor
    for name, parts in apart.items():
        if parts.keys() == {"q", "k", "v"}:
            found[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return found


def _read(path: Path, required: tuple[str, ...] = ("hidden_act", "num_attention_heads")) -> dict[str, Any]:
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in required:
            given[name]
        if required and given["hidden_act"] not in _ACTIVATIONS:
            raise BundleError(f"{path}: hidden_act {given['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}")
        if required and abs(given.get("layer_norm_eps", 1e-5) - 1e-5) > 1e-12:
            raise BundleError(f"{path}: layer_norm_eps must be 1e-5, not {given['layer_norm_eps']}")
    except FileNotFoundError:
        raise BundleError(f"{path}: missing") from None
    except KeyError as error:
        raise BundleError(f"{path}: {error} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: not readable JSON ({error})") from None
    return given


def _edge(size: Any) -> int:
    """224 of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size)

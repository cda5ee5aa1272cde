"""A random text prior in the layout of Kandinsky 2.2's published one, its configurations with fewer channels."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import PriorTransformer
from safetensors.torch import save_file
from tiny_bundle import EMBED_DIM
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from unit.generator.small_kandinsky import published

START, END = "<|startoftext|>", "<|endoftext|>"


def write_small_prior(directory: Path) -> Path:
    """Writes prior/, scheduler/, text_encoder/ and tokenizer/; the prior's clip_mean and clip_std are not trivial."""
    torch.manual_seed(6)
    vocabulary = _write_tokenizer(directory / "tokenizer")
    configs = {
        "prior": published("prior") | {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2},
        "text_encoder": published("prior_text_encoder")
        | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
        "scheduler": published("prior_scheduler"),
    }
    configs["prior"]["embedding_dim"] = configs["text_encoder"]["projection_dim"] = EMBED_DIM
    configs["text_encoder"]["vocab_size"] = vocabulary
    prior = PriorTransformer.from_config(configs["prior"])
    with torch.no_grad():
        prior.clip_mean.normal_(0, 0.3)
        prior.clip_std.uniform_(0.5, 2.0)
    text_encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder"]))
    for name in ("prior", "text_encoder", "scheduler"):
        (directory / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (directory / name / file).write_text(json.dumps(configs[name], indent=2))
    save_file(dict(prior.state_dict()), directory / "prior" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    tensors = {name: tensor.contiguous() for name, tensor in text_encoder.state_dict().items()}
    # The published file holds this buffer too, which today's class makes for itself.
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, directory / "text_encoder" / "model.safetensors", {"format": "pt"})
    return directory


def _write_tokenizer(directory: Path) -> int:
    """CLIP's tokenizer files with letters and a few merges; the number of tokens."""
    directory.mkdir(parents=True)
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)

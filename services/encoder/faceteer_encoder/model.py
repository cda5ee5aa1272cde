"""The CLIP model: pixels and texts to embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.memory import require_memory
from open_clip.model import _build_vision_tower
from torch import nn

from faceteer_encoder import transformers_layout
from faceteer_encoder.checkpoint import fill, load_tensors, numbers_in
from faceteer_encoder.onnx_engine import OnnxVisual
from faceteer_encoder.preprocess import Preprocessor

# Room beside the weights, measured at full size in bfloat16: 3.7 GB of weights, 4.5 GB at the largest moment.
_HEADROOM = 1.25
# Of a word of several tokens: fewer letters a token than this, and the tower cannot have learnt the word.
_LETTERS_A_TOKEN = 3
CONFIG, WEIGHTS, MERGES = "open_clip_config.json", "open_clip_model.safetensors", "bpe_simple_vocab.txt.gz"


class ClipEncoder:
    """``image_embeds`` and ``text_embeds``: the towers' raw projections, neither normalised nor centred.

    Attributes:
        embed_dim: length of an embedding.
        context_length: tokens in a text, 0 without a text tower.
        has_text_tower: whether texts can be encoded.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: Preprocessor,
        tokenizer: open_clip.SimpleTokenizer | None,
        embed_dim: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._model = model.to(self._device, dtype).eval().requires_grad_(False)
        self._preprocessor = preprocessor
        self._tokenizer = tokenizer
        self._onnx: OnnxVisual | None = None
        self.embed_dim = embed_dim
        self.has_text_tower = tokenizer is not None
        self.context_length: int = tokenizer.context_length if tokenizer is not None else 0

    def encode_images(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Embeddings, float32 [embed_dim] each, of pictures, uint8 [height, width, 3] each (see Preprocessor)."""
        batch = self._preprocessor.normalised(list(pixels))
        if self._onnx is not None:
            return list(self._onnx(batch.numpy()))
        with torch.inference_mode():
            return _rows(self.visual(batch.to(self._device, self._dtype)))

    @property
    def visual(self) -> Any:
        """The image tower, torch's."""
        return self._model.visual

    @property
    def precision(self) -> str:
        """What runs the image tower, for cache keys: "torch/float32", "onnx/float16"."""
        if self._onnx is not None:
            return f"onnx/{self._onnx.dtype}"
        return f"torch/{str(self._dtype).removeprefix('torch.')}"

    def use_onnx(self, visual: OnnxVisual) -> None:
        """Lets ONNX Runtime run the image tower from now on, and frees torch's."""
        self._onnx = visual
        del self._model.visual

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Embeddings, float32 [embed_dim] each; texts of more than context_length tokens are cut."""
        if self._tokenizer is None:
            raise ValueError("this encoder has no text tower")
        model: Any = self._model
        with torch.inference_mode():
            return _rows(model.encode_text(self._tokenizer(list(texts)).to(self._device)))

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """Words that the text tower was hardly trained on, told by its tokenizer.

        Byte pairs are merged by how often they stood together in the captions: a common word is one token, a rarer one
        two or three of several letters, and one that the captions never held falls into single letters.
        """
        if self._tokenizer is None:
            return ()
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
        return tuple(word for word in words if not _is_known(self._tokenizer, word))


def load_encoder(
    directory: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    max_image_bytes: int = 20_000_000,
    max_image_pixels: int = 50_000_000,
) -> tuple[ClipEncoder, Preprocessor]:
    """Reads open_clip_config.json, the weights, and the tokenizer's merges where the bundle brings its own.

    A configuration without ``text_cfg`` makes an encoder of pictures only.

    Raises:
        BundleError: one sentence on what is wrong with which file.
    """
    target = _target(device)
    number_type: torch.dtype = getattr(torch, dtype)
    path = directory / CONFIG
    try:
        if _is_transformers(directory):
            path = directory / transformers_layout.IMAGE / transformers_layout.CONFIG
            model_cfg = transformers_layout.model_cfg(directory)
            preprocess_cfg = transformers_layout.preprocess_cfg(directory)
        else:
            config = json.loads(path.read_text(encoding="utf-8"))
            model_cfg, preprocess_cfg = dict(config["model_cfg"]), dict(config["preprocess_cfg"])
        embed_dim = int(model_cfg["embed_dim"])
        model = _load_weights(model_cfg, directory, number_type)
        visual: Any = model.visual
        # The model's own size, as in open_clip: many configurations name none, and another would not fit the model.
        preprocess_cfg["size"] = getattr(visual, "image_size", preprocess_cfg.get("size", 224))
        preprocessor = Preprocessor(preprocess_cfg, max_bytes=max_image_bytes, max_pixels=max_image_pixels)
    except FileNotFoundError:
        raise BundleError(f"{path}: missing") from None
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise BundleError(f"{path}: not a usable configuration ({type(error).__name__}: {error})") from None
    tokenizer = None
    if "text_cfg" in model_cfg:
        merges = directory / MERGES
        own = {"bpe_path": str(merges)} if merges.exists() else {}
        tokenizer = open_clip.SimpleTokenizer(
            **own, context_length=int(model_cfg["text_cfg"].get("context_length", 77))
        )
        vocabulary = int(model_cfg["text_cfg"].get("vocab_size", 49408))
        if tokenizer.vocab_size > vocabulary:
            raise BundleError(f"{merges}: {tokenizer.vocab_size} tokens, but {CONFIG} has room for {vocabulary}")
    return ClipEncoder(model, preprocessor, tokenizer, embed_dim, str(target), number_type), preprocessor


def _load_weights(model_cfg: dict[str, Any], directory: Path, dtype: torch.dtype) -> nn.Module:
    """The towers with their weights; strict: a missing, unknown, misshapen or NaN tensor is an error."""
    parts = (transformers_layout.IMAGE, transformers_layout.TEXT) if _is_transformers(directory) else (".",)
    files = [file for part in parts for file in (directory / part).glob("*.safetensors")]
    needed = sum(numbers_in(file) for file in files) * dtype.itemsize
    require_memory(str(directory), int(needed * _HEADROOM), "use a smaller FACETEER_ENCODER_DTYPE")
    # On the meta device first: random initialisation of a large model takes longer than reading it, and as much memory.
    with torch.device("meta"):
        model = _build(model_cfg)
    if _is_transformers(directory):
        path = directory / transformers_layout.IMAGE / transformers_layout.WEIGHTS
        config = transformers_layout.CONFIG
        name_in_file: Callable[[str], str] = transformers_layout.name_in_file
        text = None
        if "text_cfg" in model_cfg:
            text = load_tensors(directory / transformers_layout.TEXT / transformers_layout.WEIGHTS, dtype)
        weights = transformers_layout.to_open_clip(load_tensors(path, dtype), text)
    else:
        path, config, name_in_file = directory / WEIGHTS, CONFIG, str
        weights = load_tensors(path, dtype)
    if "logit_bias" not in model.state_dict():
        # What training adds to the logits; no embedding depends on it, and not every configuration announces it.
        weights.pop("logit_bias", None)
    fill(model, weights, path, config, name_in_file)
    if isinstance(model, open_clip.CLIP) and model.attn_mask is not None:
        # Not among the weights: what keeps a token from looking ahead.
        length = model.context_length
        model.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu_(1), persistent=False)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model = _build(model_cfg)
        model.load_state_dict(weights, strict=True)
    return model


def _is_transformers(directory: Path) -> bool:
    return (directory / transformers_layout.IMAGE).is_dir()


def _target(device: str) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device {device!r} was asked for, but this machine has no CUDA GPU; set FACETEER_DEVICE=cpu")
    return target


def _build(model_cfg: dict[str, Any]) -> nn.Module:
    if "text_cfg" in model_cfg:
        clip: nn.Module = open_clip.CLIP(**model_cfg)
        return clip
    towers = nn.Module()
    towers.visual = _build_vision_tower(
        model_cfg["embed_dim"], model_cfg["vision_cfg"], bool(model_cfg.get("quick_gelu", False))
    )
    return towers


def _is_known(tokenizer: open_clip.SimpleTokenizer, word: str) -> bool:
    """Whether a word is one token, or a few of at least two letters each and three on average."""
    pieces = [tokenizer.decoder[token].removesuffix("</w>") for token in tokenizer.encode(word)]
    if len(pieces) <= 1:
        return True
    return min(map(len, pieces)) >= 2 and sum(map(len, pieces)) >= _LETTERS_A_TOKEN * len(pieces)


def _rows(embeds: torch.Tensor) -> list[np.ndarray]:
    return list(embeds.float().cpu().numpy())

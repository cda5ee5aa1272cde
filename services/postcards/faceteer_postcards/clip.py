"""Train the encoder: a small open_clip.CLIP (ModifiedResNet and a text transformer) on postcards and captions.

We know which captions are true of which pictures. So every caption of a batch, whether it names one factor or all,
counts as a positive for *every* picture it is true of (a sigmoid loss, after SigLIP, Zhai et al. 2023), captions that
name one value compete within their factor, and the raw embedding of a picture is drawn towards the sum of the raw
embeddings of its one-value captions, which keeps it additive: the geometry that editing by directions relies on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from faceteer_trainer.budget import Budget
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from faceteer_postcards.captions import CONTEXT_LENGTH, caption, describe, is_true, value_claims, write_vocabulary
from faceteer_postcards.corpus import Corpus
from faceteer_postcards.movq import to_tensor
from faceteer_postcards.training import Ema, Run, autocast, learning_rate, set_rate, step_rng
from faceteer_postcards.world import FACTOR_NAMES, FACTORS, VALUES


@dataclass(frozen=True)
class ClipSettings:
    """Sizes and weights; the defaults are the shipped ones."""

    embed_dim: int = 64
    vision_layers: tuple[int, ...] = (1, 1, 2, 1)
    vision_width: int = 24
    text_width: int = 96
    text_layers: int = 2
    batch: int = 96
    full_captions: int = 48
    short_captions: int = 48
    peak_rate: float = 1.5e-3
    within_factor: float = 1.0  # weight of the competition within a factor
    additive: float = 0.5  # weight of the pull towards the sum of one-value captions
    norm: float = 7.3  # the raw embedding's norm is drawn here, gently
    geometry: float = 1.0  # weight of `geometry_loss` ...
    geometry_from: float = 0.6  # ... once this share of the budget is used


def model_config(settings: ClipSettings, vocabulary: int) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {"image_size": 64, "layers": list(settings.vision_layers), "width": settings.vision_width,
                       "head_width": 32},
        "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": settings.text_width,
                     "heads": 4, "layers": settings.text_layers},
    }  # fmt: skip


PREPROCESS = {"size": [64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
              "interpolation": "bicubic", "resize_mode": "shortest"}  # fmt: skip


class CaptionLoss(nn.Module):
    """A scale and a bias for each number of factors that a caption names; used in training only.

    A caption of one factor cannot be as close to a picture as one of all eight: hence a threshold for each length.
    """

    def __init__(self) -> None:
        super().__init__()
        factors = len(FACTOR_NAMES)
        self.scale = nn.Parameter(torch.full((factors + 1,), 10.0).log())
        self.bias = nn.Parameter(-10.0 * torch.linspace(0, 1, factors + 1).sqrt())

    def forward(
        self, images: torch.Tensor, texts: torch.Tensor, lengths: torch.Tensor, truth: torch.Tensor
    ) -> torch.Tensor:
        """images [b, d], texts [t, d] of norm 1, lengths [t] named factors, truth bool [b, t] -> scalar."""
        logits = self.scale[lengths].exp() * (images @ texts.T) + self.bias[lengths]
        losses = F.softplus(torch.where(truth, -logits, logits))
        positives = truth.float()
        # every caption counts alike: its positives as much as its negatives
        one = (losses * positives).sum(0) / positives.sum(0).clamp_min(1)
        other = (losses * (1 - positives)).sum(0) / (1 - positives).sum(0).clamp_min(1)
        return (one + 2 * other).mean()


def _batch_captions(
    codes: npt.NDArray[np.uint8], settings: ClipSettings, rng: np.random.Generator
) -> tuple[list[str], npt.NDArray[np.int8]]:
    """All 38 one-value captions first, then short and full captions of the batch's pictures."""
    chosen = [caption(claims, rng) for claims in value_claims()]
    for row in range(settings.short_captions):
        chosen.append(describe(codes[row % len(codes)], rng, least=2))
    for row in range(settings.full_captions):
        chosen.append(describe(codes[-1 - row % len(codes)], rng))
    return [c.text for c in chosen], np.stack([c.claims for c in chosen])


_SLICES = np.cumsum([0, *(len(values) for values in FACTORS.values())]).tolist()


def value_gram(norm: float) -> torch.Tensor:
    """How one-value captions should lie to one another, as inner products [38, 38].

    The values of a factor are the corners of a regular simplex about the origin, factors are orthogonal, and any two
    values of any factor are equally far apart; the sum of eight of them, one a factor, has this norm. Eight values
    then span seven dimensions, so each can have a direction of its own; left alone, they crowd into three or four.
    """
    sizes = [len(values) for values in FACTORS.values()]
    squared_side = norm**2 / sum((k - 1) / (2 * k) for k in sizes)
    blocks = [squared_side / 2 * (torch.eye(k) - 1 / k) for k in sizes]
    gram: torch.Tensor = torch.block_diag(*blocks)
    return gram


def geometry_loss(texts: torch.Tensor, norm: float) -> torch.Tensor:
    """How far the inner products of one-value captions' raw embeddings [38, d] are from `value_gram`, relatively."""
    wanted = value_gram(norm).to(texts.device)
    return (texts @ texts.T - wanted).square().sum() / wanted.square().sum()


def clip_loss(
    head: CaptionLoss,
    images: torch.Tensor,
    texts: torch.Tensor,
    claims: npt.NDArray[np.int8],
    codes: npt.NDArray[np.uint8],
    settings: ClipSettings,
    progress: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The whole loss for raw embeddings images [b, d] and texts [t, d]; the first 38 texts name one value each."""
    unit_images, unit_texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    device = images.device
    truth = torch.from_numpy(is_true(claims, codes)).to(device)
    lengths = torch.from_numpy((claims >= 0).sum(1)).to(device)
    contrast = head(unit_images, unit_texts, lengths, truth)
    labels = torch.from_numpy(codes.astype(np.int64)).to(device)
    scores = 20.0 * unit_images @ unit_texts[: len(VALUES)].T
    within = torch.stack([
        F.cross_entropy(scores[:, start:stop], labels[:, i])
        for i, (start, stop) in enumerate(pairwise(_SLICES))
    ]).mean()  # fmt: skip
    offsets = torch.tensor(_SLICES[:-1], device=device)
    total = texts[: len(VALUES)][labels + offsets].sum(1)
    size = settings.norm**2
    additive = (images - total).square().sum(-1).mean() / size
    norm = (images.norm(dim=-1) / settings.norm - 1).square().mean()
    loss = contrast + settings.within_factor * within + settings.additive * additive + 0.2 * norm
    geometry = geometry_loss(texts[: len(VALUES)], settings.norm)
    if progress >= settings.geometry_from:
        # from here on the sum is where pictures belong, so the pull towards it is stronger too
        loss = loss + settings.geometry * geometry + 3 * settings.additive * additive
    parts = {"contrast": contrast, "within": within, "additive": additive, "geometry": geometry}
    return loss, {name: part.item() for name, part in parts.items()}


@torch.no_grad()
def embed_pictures(model: open_clip.CLIP, pictures: npt.NDArray[np.uint8], batch: int = 128) -> torch.Tensor:
    """Raw image embeddings float32 [n, d] of uint8 pictures [n, 64, 64, 3]."""
    device = next(model.parameters()).device
    parts = [
        model.encode_image(to_tensor(pictures[start : start + batch], device)).float().cpu()
        for start in range(0, len(pictures), batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def value_directions(model: open_clip.CLIP, tokenizer: SimpleTokenizer, draws: int = 8) -> torch.Tensor:
    """The mean unit text embedding of `draws` one-value captions for each value: [38, d]."""
    rng = np.random.default_rng(0)
    texts = [caption(claims, rng).text for _ in range(draws) for claims in value_claims()]
    units = F.normalize(model.encode_text(tokenizer(texts)).float(), dim=-1)
    return units.reshape(draws, len(VALUES), -1).mean(0)


def zero_shot(embeds: torch.Tensor, directions: torch.Tensor, codes: npt.NDArray[np.uint8]) -> dict[str, float]:
    """The share of pictures whose nearest one-value caption, within each factor, is the true one."""
    scores = F.normalize(embeds, dim=-1) @ F.normalize(directions, dim=-1).T
    return {
        name: float((scores[:, _SLICES[i] : _SLICES[i + 1]].argmax(-1).numpy() == codes[:, i]).mean())
        for i, name in enumerate(FACTOR_NAMES)
    }


def train_clip(
    corpus: Corpus,
    held_out: Corpus,
    directory: Path,
    budget: Budget,
    settings: ClipSettings | None = None,
    seed: int = 0,
    device: str = "cpu",
    log_every: int = 50,
) -> open_clip.CLIP:
    """Train, and write the bundle's encoder part into `directory`/encoder; returns the averaged model."""
    settings = settings or ClipSettings()
    out = directory / "encoder"
    out.mkdir(parents=True, exist_ok=True)
    config = model_config(settings, write_vocabulary(out / "bpe_simple_vocab.txt.gz"))
    tokenizer = SimpleTokenizer(str(out / "bpe_simple_vocab.txt.gz"), context_length=CONTEXT_LENGTH)
    torch.manual_seed(seed)
    on = torch.device(device)
    model = open_clip.CLIP(**config).to(on).train()
    head = CaptionLoss().to(on)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters()}, {"params": head.parameters(), "scale": 5.0, "weight_decay": 0.0}],
        settings.peak_rate, betas=(0.9, 0.98), weight_decay=0.02,
    )  # fmt: skip
    ema = Ema(model, 0.995)
    run = Run(directory, "clip", budget, {"model": model, "head": head, "optimizer": optimizer, "ema": ema})
    for step in run.steps():
        rng = step_rng(seed, step)
        rows = np.sort(rng.integers(0, len(corpus), settings.batch))
        codes = corpus.codes[rows]
        texts, claims = _batch_captions(codes, settings, rng)
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress))
        with autocast(on):
            images = model.encode_image(to_tensor(corpus.pictures[rows], on)).float()
            words = model.encode_text(tokenizer(texts).to(on)).float()
        loss, parts = clip_loss(head, images, words, claims, codes, settings, run.progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        if step % log_every == 0:
            figures = {}
            if step % (4 * log_every) == 0:
                figures = check_clip(ema, config, tokenizer, held_out)
            run.log(loss=loss.item(), norm=images.norm(dim=-1).mean().item(), **parts, **figures)
    averaged = open_clip.CLIP(**config).eval()
    averaged.load_state_dict({name: weight.cpu() for name, weight in ema.weights.items()})
    run.log(**check_clip(ema, config, tokenizer, held_out, 2000))
    save_encoder(averaged, config, out)
    return averaged


def check_clip(
    ema: Ema, config: dict[str, Any], tokenizer: SimpleTokenizer, held_out: Corpus, count: int = 400
) -> dict[str, float]:
    """Zero-shot accuracy by factor on held-out pictures."""
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict({name: weight.cpu() for name, weight in ema.weights.items()})
    embeds = embed_pictures(model, held_out.pictures[:count])
    return zero_shot(embeds, value_directions(model, tokenizer), held_out.codes[:count])


def save_encoder(model: open_clip.CLIP, config: dict[str, Any], directory: Path) -> None:
    """Write open_clip_config.json and the float16 weights beside the vocabulary."""
    card = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (directory / "open_clip_config.json").write_text(json.dumps(card, indent=2) + "\n")
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, directory / "open_clip_model.safetensors")


def load_encoder(directory: Path) -> tuple[open_clip.CLIP, SimpleTokenizer]:
    """The encoder of a bundle, from its `encoder` directory, in float32."""
    config = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(directory / "open_clip_model.safetensors"))
    return model.float(), SimpleTokenizer(
        str(directory / "bpe_simple_vocab.txt.gz"), context_length=config["text_cfg"]["context_length"]
    )

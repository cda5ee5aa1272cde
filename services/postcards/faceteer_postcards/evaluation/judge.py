"""The judge: a small classifier of every factor, trained on renders only.

It has never seen CLIP, the SAE or a generated picture, so it can be trusted to say what a picture shows. In training
half of its renders are blurred or noisy a little, for the decoder's pictures are never as crisp as drawn ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from faceteer_trainer.budget import Budget
from torch import nn

from faceteer_postcards.corpus import Corpus
from faceteer_postcards.movq import to_tensor
from faceteer_postcards.training import Run, autocast, learning_rate, set_rate, step_generator, step_rng
from faceteer_postcards.world import FACTOR_NAMES, FACTORS


@dataclass(frozen=True)
class JudgeSettings:
    """A plain convolutional net."""

    width: int = 32
    batch: int = 64
    peak_rate: float = 2e-3


class Judge(nn.Module):
    """Pictures [b, 3, 64, 64] in -1..1 -> one row of logits a factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for wide, stride in ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (6, 2)):
            after = wide * width
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.trunk = nn.Sequential(*layers)
        self.features = nn.Linear(before * 16, 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in FACTORS.items()})

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """The layer below the heads [b, 256]."""
        described: torch.Tensor = self.features(self.trunk(images).flatten(1))
        return described.relu()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        described = self.describe(images)
        return [head(described) for head in self.heads.values()]


def _roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures with a slight blur, half with slight noise (both for a quarter)."""
    count = len(images)
    blurred: torch.Tensor = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    strength, chosen = torch.rand(2, 2, count, 1, 1, 1, generator=generator).unbind()
    share, noise = (strength * (chosen < 0.5) * torch.tensor([0.8, 0.12]).view(2, 1, 1, 1, 1)).unbind()
    return images + share * (blurred - images) + noise * torch.randn(images.shape, generator=generator)


def train_judge(
    corpus: Corpus, directory: Path, budget: Budget, settings: JudgeSettings | None = None, seed: int = 0
) -> Judge:
    """Train on a corpus of renders that nothing else was trained on."""
    settings = settings or JudgeSettings()
    torch.manual_seed(seed)
    judge = Judge(settings.width)
    optimizer = torch.optim.AdamW(judge.parameters(), settings.peak_rate, weight_decay=0.01)
    run = Run(directory, "judge", budget, {"model": judge, "optimizer": optimizer})
    for step in run.steps():
        rows = np.sort(step_rng(seed, step).integers(0, len(corpus), settings.batch))
        images = _roughen(to_tensor(corpus.pictures[rows]), step_generator(seed, step))
        labels = torch.from_numpy(corpus.codes[rows].astype(np.int64))
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress))
        with autocast(torch.device("cpu")):
            logits = judge(images)
        loss = torch.stack([F.cross_entropy(row.float(), labels[:, i]) for i, row in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            run.log(loss=loss.item())
    return judge.eval()


@torch.no_grad()
def judge_pictures(judge: Judge, pictures: npt.NDArray[np.uint8], batch: int = 128) -> npt.NDArray[np.uint8]:
    """What uint8 pictures [n, 64, 64, 3] show: factors' indices [n, 8]."""
    parts = []
    for start in range(0, len(pictures), batch):
        logits = judge(to_tensor(pictures[start : start + batch]))
        parts.append(torch.stack([row.argmax(-1) for row in logits], -1).numpy().astype(np.uint8))
    return np.concatenate(parts) if parts else np.zeros((0, len(FACTOR_NAMES)), np.uint8)


def accuracy_by_factor(judged: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8]) -> dict[str, float]:
    """The share judged right, for each factor."""
    return {name: float((judged[:, i] == truth[:, i]).mean()) for i, name in enumerate(FACTOR_NAMES)}

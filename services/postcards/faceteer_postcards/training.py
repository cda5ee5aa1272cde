"""What every trainer here shares: a budget, a learning rate that follows it, checkpoints that resume, a log.

A run's batches depend on (seed, step) alone and never on a generator's hidden state, so a run that was killed and
resumed gives the same weights as one that was not, if its budget is in steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_runtime.files import whole_file
from faceteer_trainer.budget import Budget
from faceteer_trainer.progress import Progress
from torch import nn


def learning_rate(peak: float, step: int, progress: float, warmup_steps: int = 100) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine that reaches zero as the budget ends."""
    return peak * min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random generator of one step."""
    return np.random.default_rng((seed, step))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def autocast(device: torch.device, enabled: bool = True) -> AbstractContextManager[Any]:
    """bfloat16 autocast: about twice as fast in convolutions, on CPUs with AVX512-BF16 and on GPUs alike."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


class Ema:
    """An exponential moving average of a model's weights, shorter at the start of a run."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        floating = [name for name, p in state.items() if p.is_floating_point()]
        torch._foreach_lerp_([self.weights[n] for n in floating], [state[n] for n in floating], 1 - decay)


class Run:
    """One training run: its loop, its checkpoint, its log (one JSON object a line)."""

    def __init__(
        self,
        directory: Path,
        name: str,
        budget: Budget,
        state: dict[str, Any],
        save_every: float = 60,
        agree: Callable[[float], float] | None = None,
        leader: bool = True,
    ) -> None:
        """`state` maps names to things with state_dict and load_state_dict, or to an `Ema`.

        Of several processes that train together only the `leader` saves and logs, and `agree` turns each one's
        elapsed seconds into a figure that all of them share, so that they stop at the same step.
        """
        self.directory, self.name, self.budget, self.save_every = directory, name, budget, save_every
        self.parts, self.agree, self.leader = state, agree, leader
        self.checkpoint = directory / f"{name}.ckpt"
        self.step, self.elapsed = 0, 0.0
        directory.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.step, self.elapsed = saved["step"], saved["elapsed"]
            for key, part in self.parts.items():
                if isinstance(part, Ema):
                    part.weights = saved[key]
                else:
                    part.load_state_dict(saved[key])

    @property
    def progress(self) -> float:
        """The share of the budget used so far."""
        return self.budget.progress(self.step, self.elapsed)

    def steps(self, stop_after: int | None = None) -> Iterator[int]:
        """Yield step after step until the budget is used up, saving a checkpoint every minute and at the end.

        `stop_after` ends the loop early at that step as a kill would, but with a checkpoint.
        """
        started, before, saved = time.monotonic(), self.elapsed, time.monotonic()
        with Progress() as report:
            while self.progress < 1.0 and self.step != stop_after:
                yield self.step
                self.step += 1
                elapsed = before + time.monotonic() - started
                self.elapsed = self.agree(elapsed) if self.agree else elapsed
                if self.leader:
                    report(self.name, self.step if self.budget.steps else self.progress, self.budget.steps or 1.0)
                if time.monotonic() - saved > self.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        if not self.leader:
            return
        parts = {key: p.weights if isinstance(p, Ema) else p.state_dict() for key, p in self.parts.items()}
        with whole_file(self.checkpoint) as part:
            torch.save({"step": self.step, "elapsed": self.elapsed, **parts}, part)

    def log(self, **figures: float | str | dict[str, float]) -> None:
        """Add a line to the run's log, and show it."""
        if not self.leader:
            return
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        line = json.dumps({"step": self.step, "minutes": round(self.elapsed / 60, 2), **rounded})
        with (self.directory / f"{self.name}.log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(f"{self.name} {line}", flush=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; a group's own `scale` multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)

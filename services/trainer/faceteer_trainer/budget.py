"""How long a training runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps (reproducible), or of minutes on this machine (a promise kept)."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("a budget is either steps or minutes")

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the budget that is used up, 0..1; `elapsed` in seconds, over all resumed parts of a run."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None
        return min(elapsed / (60 * self.minutes), 1.0)

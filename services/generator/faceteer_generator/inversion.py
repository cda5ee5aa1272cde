"""DDIM inversion: an image's clean latents back to the noise from which DDIM draws it again.

Each :meth:`Inversion.advance` is one call of the decoder.

A DDIM step is y = A x + B m(x, t) with the coefficients of :func:`linear_step`; to invert it is to solve for x, the
noisier of the two. The usual inversion takes m(y, t) for m(x, t) (Song et al., Denoising Diffusion Implicit Models,
2021, section 4.3), which is off by what the model changes over a step, and the errors add up. x is a fixed point of
g(x) = (y - B m(x, t)) / A, so the same formula again with the x just found comes closer each time (Pan et al., AIDI,
2023; Garibi et al., ReNoise, 2024). Anderson mixing of the last few iterates (Walker and Ni, 2011) gets there in fewer
of them, and of all iterates the one with the smallest residual is kept, for a large step of a wild model need not
converge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from faceteer_generator.decoder import Decoder
from faceteer_generator.requests import ImageSpec

# Prediction types whose steps can be inverted.
INVERTIBLE = ("epsilon", "v_prediction")
# Fixed-point iterations a step at most, and the relative change at which a step counts as solved.
MOST_ITERATIONS = 12
TOLERANCE = 1e-4
# Differences of iterates that are mixed.
_DEPTH = 3


class InversionFailed(Exception):
    """The numbers left the range of floating point."""


class Inversion:
    """The state of one inversion between two calls of the decoder.

    Args:
        decoder: is called.
        spec: embeds, negative and guidance of the image as it is; its start and seed are ignored.
        coefficients: [steps, 4], the :class:`~faceteer_generator.schedulers.DdimTable` of the steps to invert.
        timesteps: [steps], falling.
        latents: [1, c, h, w], clean.
        iterations: most fixed-point iterations a step; 1 is the usual inversion.
        tolerance: relative change of the latents below which a step counts as solved.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: ImageSpec,
        coefficients: torch.Tensor,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        *,
        iterations: int = MOST_ITERATIONS,
        tolerance: float = TOLERANCE,
    ) -> None:
        self._decoder, self._guidance = decoder, spec.guidance_scale
        self._coefficients, self._timesteps = coefficients, timesteps
        self._iterations, self._tolerance = iterations, tolerance
        size: dict[str, Any] = {"width": spec.width, "height": spec.height}
        self._conditions = [decoder.condition(spec.embeds, negative=False, **size)]
        if spec.guided:
            self._conditions.insert(0, decoder.condition(spec.negative, negative=True, **size))
        # The step under way, from the last one of a drawing to its first.
        self._step = len(timesteps) - 1
        self._iteration = 0
        # In float32 whatever the models' precision: rounding would add up over the steps.
        self._cleaner = latents.float()
        self._guess = self._cleaner
        self._best = (float("inf"), self._cleaner)
        self._guesses: list[torch.Tensor] = []
        self._residuals: list[torch.Tensor] = []
        self.calls = 0

    @property
    def done(self) -> bool:
        """Whether ``noise`` is complete."""
        return self._step < 0

    @property
    def calls_left(self) -> int:
        """Calls still to be made, at as many a step as so far."""
        left = self._step + 1
        solved = len(self._timesteps) - left
        return left * max(1, round(self.calls / solved)) if solved else left

    @property
    def noise(self) -> np.ndarray:
        """What has been found so far, float32 [c, h, w]."""
        return np.asarray(self._cleaner[0].cpu().numpy(), dtype=np.float32)

    @torch.inference_mode()
    def advance(self) -> None:
        """One call of the decoder.

        Raises:
            InversionFailed: the latents overflowed.
        """
        output = self._predict()
        sqrt_a, sqrt_b, sqrt_a_previous, sqrt_b_previous = self._coefficients[self._step].tolist()
        a, b = linear_step(self._decoder.prediction_type, sqrt_a, sqrt_b, sqrt_a_previous, sqrt_b_previous)
        solution = (self._cleaner - b * output) / a
        self.calls += 1
        self._iteration += 1
        residual = solution - self._guess
        change = float(residual.norm() / solution.norm().clamp_min(1e-12))
        if not np.isfinite(change):
            raise InversionFailed(f"the latents overflowed at step {self._step + 1}")
        if change < self._best[0]:
            self._best = (change, solution)
        if self._iteration >= self._iterations or change < self._tolerance:
            self._next_step()
        else:
            self._guess = self._mixed(solution, residual)

    def _next_step(self) -> None:
        self._cleaner = self._guess = self._best[1]
        self._best = (float("inf"), self._cleaner)
        self._guesses, self._residuals = [], []
        self._step -= 1
        self._iteration = 0

    def _mixed(self, solution: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The next guess: the combination of the last ones whose residual, were g linear, would be smallest."""
        self._guesses = [*self._guesses, self._guess.flatten()][-_DEPTH - 1 :]
        self._residuals = [*self._residuals, residual.flatten()][-_DEPTH - 1 :]
        if len(self._guesses) == 1:
            return solution
        steps = torch.stack(self._guesses, dim=1).diff(dim=1)
        changes = torch.stack(self._residuals, dim=1).diff(dim=1)
        # Normal equations: three columns, and a little on the diagonal for those that are nearly parallel.
        gram = changes.T @ changes
        gram += 1e-10 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        shares = torch.linalg.lstsq(gram.cpu(), (changes.T @ self._residuals[-1])[:, None].cpu()).solution
        mixed: torch.Tensor = solution.flatten() - ((steps + changes) @ shares.to(steps.device))[:, 0]
        return mixed.view_as(solution)

    def _predict(self) -> torch.Tensor:
        rows = len(self._conditions)
        latents = self._guess.to(self._decoder.dtype).expand(rows, -1, -1, -1)
        timesteps = self._timesteps[self._step].expand(rows)
        output = self._decoder.predict(latents, timesteps, self._conditions)[:, : latents.shape[1]].float()
        if rows == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self._guidance * (cond - uncond)


def linear_step(
    prediction_type: str, sqrt_a: float, sqrt_b: float, sqrt_a_previous: float, sqrt_b_previous: float
) -> tuple[float, float]:
    """A and B of a DDIM step y = A x + B m, from the roots of a, 1 - a, a' and 1 - a' (a: alphas_cumprod).

    Raises:
        ValueError: a prediction type whose last step forgets x ("sample").
    """
    if prediction_type == "epsilon":
        return sqrt_a_previous / sqrt_a, sqrt_b_previous - sqrt_a_previous * sqrt_b / sqrt_a
    if prediction_type == "v_prediction":
        return (
            sqrt_a_previous * sqrt_a + sqrt_b_previous * sqrt_b,
            sqrt_b_previous * sqrt_a - sqrt_a_previous * sqrt_b,
        )
    raise ValueError(f"DDIM steps of a model that predicts {prediction_type!r} cannot be inverted")

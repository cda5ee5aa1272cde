"""The noise schedulers served: diffusers' own, one copy an image, and an exact DDIM step for many images at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler

CLASSES: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm_solver_pp": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}
LEARNED_VARIANCE = ("learned", "learned_range")


def make_scheduler(name: str, config: Mapping[str, Any], steps: int, device: torch.device | str = "cpu") -> Any:
    """A fresh scheduler with its timesteps set.

    Args:
        name: a key of :data:`CLASSES`.
        config: the bundle's scheduler_config.json; betas, prediction type and timestep spacing carry over.
        steps: denoising steps.
        device: where the timesteps go.

    Raises:
        ValueError: more steps than the scheduler can take.
    """
    cls = CLASSES[name]
    if name != "ddpm":
        # A learned variance means something to DDPM only; the others only expect eight channels because of it.
        config = {key: value for key, value in config.items() if key != "variance_type"}
    scheduler = cls.from_config(config)
    scheduler.set_timesteps(steps, device=device)
    _drop_step_too_many(scheduler)
    return scheduler


def _drop_step_too_many(scheduler: Any) -> None:
    """Drops a step at timestep -1, which reads the noisiest entry of the schedule and spoils the image.

    diffusers' "trailing" spacing divides in floating point and appends it for some numbers of steps (61, 103, 121 and
    122 of 1000). The one place in which an image is meant to differ from KandinskyV22Pipeline's.
    """
    if scheduler.timesteps[-1] >= 0:
        return
    scheduler.timesteps = scheduler.timesteps[:-1]
    scheduler.num_inference_steps = len(scheduler.timesteps)
    if hasattr(scheduler, "sigmas"):
        # The last sigma is that of the finished image.
        scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def takes_variance(scheduler: Any) -> bool:
    """Whether ``step`` needs the decoder's variance channels after the others, as KandinskyV22Pipeline asks."""
    return getattr(scheduler.config, "variance_type", None) in LEARNED_VARIANCE


class Schedulers:
    """Fresh schedulers of one bundle, one an image. Not thread-safe.

    Making one from its configuration takes a millisecond, copying one some microseconds.
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        self._config = config
        self._device = device
        # Enough for the (scheduler, steps) pairs that requests commonly use.
        self._prototype = lru_cache(maxsize=64)(self._make)
        self.ddim_table = lru_cache(maxsize=64)(self._make_table)
        self.inverse_table = lru_cache(maxsize=64)(self._make_inverse_table)

    def fresh(self, name: str, steps: int) -> Any:
        """A scheduler that has not stepped yet and shares no state with another; see :func:`make_scheduler`."""
        scheduler = copy.copy(self._prototype(name, steps))
        if hasattr(scheduler, "model_outputs"):
            # The one thing in these four that a step changes in place.
            scheduler.model_outputs = list(scheduler.model_outputs)
        return scheduler

    def _make(self, name: str, steps: int) -> Any:
        return make_scheduler(name, self._config, steps, self._device)

    def _make_table(self, steps: int) -> DdimTable | None:
        return DdimTable.of(self._prototype("ddim", steps))

    def _make_inverse_table(self, steps: int) -> DdimTable:
        return DdimTable.linear(self._prototype("ddim", steps))


class DdimTable(NamedTuple):
    """One image's DDIM coefficients, [steps, 4] float32: roots of a, 1 - a, a' and 1 - a' (a: alphas_cumprod)."""

    values: torch.Tensor

    @classmethod
    def of(cls, scheduler: Any) -> DdimTable | None:
        """None where clipping or thresholding makes the step more than linear: use ``scheduler.step`` then."""
        return None if scheduler.config.clip_sample or scheduler.config.thresholding else cls.linear(scheduler)

    @classmethod
    def linear(cls, scheduler: Any) -> DdimTable:
        """The coefficients of the step without any clipping, which is the one that can be inverted."""
        t = scheduler.timesteps.cpu()
        previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas = scheduler.alphas_cumprod.cpu()
        a = alphas[t]
        a_previous = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.cpu())
        columns = (a**0.5, (1 - a) ** 0.5, a_previous**0.5, (1 - a_previous) ** 0.5)
        return cls(torch.stack(columns, dim=1).to(scheduler.timesteps.device))


def ddim_step(
    coefficients: torch.Tensor, prediction_type: str, model_output: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Less noisy latents of n images at n different timesteps; deterministic (eta 0).

    Song et al., Denoising Diffusion Implicit Models (2021), formula 12, operation by operation in the order of
    diffusers' DDIMScheduler, so that the results are the same bits.

    Args:
        coefficients: [n, 4] float32, rows of each image's :class:`DdimTable`.
        prediction_type: epsilon, sample or v_prediction.
        model_output: [n, c, h, w].
        latents: [n, c, h, w].
    """
    sqrt_a, sqrt_b, sqrt_a_previous, sqrt_b_previous = coefficients.t().view(4, -1, 1, 1, 1).unbind()
    if prediction_type == "epsilon":
        clean, noise = (latents - sqrt_b * model_output) / sqrt_a, model_output
    elif prediction_type == "sample":
        clean, noise = model_output, (latents - sqrt_a * model_output) / sqrt_b
    else:
        clean = sqrt_a * latents - sqrt_b * model_output
        noise = sqrt_a * model_output + sqrt_b * latents
    return sqrt_a_previous * clean + sqrt_b_previous * noise


def estimate_clean(
    scheduler: Any, timestep: torch.Tensor, model_output: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """The clean latents as the model imagines them from noisy ones: what a preview shows. All [n, c, h, w]."""
    a: torch.Tensor = scheduler.alphas_cumprod.to(latents.device)[timestep].to(latents.dtype)
    if scheduler.config.prediction_type == "epsilon":
        return (latents - torch.sqrt(1 - a) * model_output) / torch.sqrt(a)
    if scheduler.config.prediction_type == "sample":
        return model_output
    return torch.sqrt(a) * latents - torch.sqrt(1 - a) * model_output

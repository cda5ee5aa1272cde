"""An SAE between two file formats: its tensors in one shape, and what its forward pass is.

Knows no format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from faceteer_trainer.errors import JobError


@dataclass(frozen=True)
class PlainSae:
    """``f = act(W_enc (x - b_pre) + b_enc)``, ``x_hat = W_dec f + b_dec``; b_pre is b_dec or zero.

    Attributes:
        architecture: "standard", "topk", "batchtopk" or "jumprelu", as in faceteer_sae.model.
        W_enc, W_dec: [d_sae, d_in], rows are features; any float type.
        b_enc: [d_sae].
        b_dec: [d_in].
        apply_b_dec_to_input: whether b_pre is b_dec.
        k: of topk and batchtopk; 0 otherwise.
        threshold: [] of batchtopk, [d_sae] of jumprelu, None otherwise.
        metadata: whatever else the file said.
    """

    architecture: str
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    apply_b_dec_to_input: bool
    k: int = 0
    threshold: torch.Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """The length of an embedding."""
        return int(self.W_enc.shape[1])

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return int(self.W_enc.shape[0])

    def with_input_shift(self, apply_b_dec_to_input: bool) -> PlainSae:
        """The same function with b_dec taken off the input or not: W (x - b_dec) + b_enc = W x + (b_enc - W b_dec)."""
        if apply_b_dec_to_input == self.apply_b_dec_to_input:
            return self
        shift = (self.W_enc.double() @ self.b_dec.double()).to(torch.float32)
        b_enc = self.b_enc.float() + (shift if apply_b_dec_to_input else -shift)
        return replace(self, b_enc=b_enc, apply_b_dec_to_input=apply_b_dec_to_input)

    def unit_rows(self) -> PlainSae:
        """With each scale moved from the decoder vector into the activation, ``f_i ||d_i||``: rows of norm 1."""
        norms = self.W_dec.float().norm(dim=1).clamp_min(1e-12)
        threshold = self.threshold
        if self.architecture == "jumprelu" and threshold is not None:
            threshold = threshold.float() * norms
        return replace(
            self,
            W_enc=self.W_enc.float() * norms[:, None],
            b_enc=self.b_enc.float() * norms,
            W_dec=self.W_dec.float() / norms[:, None],
            threshold=threshold,
        )

    def checked(self, where: Path) -> PlainSae:
        """Itself.

        Raises:
            JobError: shapes contradict each other, or a value is not finite.
        """
        d_sae, d_in = self.W_enc.shape
        wanted = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise JobError(f"{where}: {name} has shape {list(getattr(self, name).shape)}, not {list(shape)}")
        if self.architecture in ("topk", "batchtopk") and not 1 <= self.k <= d_sae:
            raise JobError(f"{where}: k is {self.k}, but must be 1 to {d_sae}")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            tensor = getattr(self, name)
            if tensor is not None and not all(
                bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 24)
            ):
                raise JobError(f"{where}: {name} holds NaN or infinite values")
        return self


def take(tensors: Mapping[str, torch.Tensor], where: Path, *names: str) -> list[torch.Tensor]:
    """Exactly these tensors, in order.

    Raises:
        JobError: one is missing, or there are others.
    """
    if lacking := [name for name in names if name not in tensors]:
        raise JobError(f"{where}: {lacking[0]!r} is missing; it must hold {', '.join(names)}")
    if extra := sorted(tensors.keys() - set(names)):
        raise JobError(f"{where}: {extra[0]!r} does not belong there; it must hold {', '.join(names)}")
    return [tensors[name] for name in names]

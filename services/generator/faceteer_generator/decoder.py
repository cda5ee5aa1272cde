"""What the denoising loop asks of a decoder, whichever model it is: :mod:`.kandinsky` or :mod:`.sdxl`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch


class Decoder(ABC):
    """Models in inference mode, ready to be called on one thread. All calls belong inside ``torch.inference_mode``.

    Attributes:
        kind: as ``bundle.json`` names it.
        scheduler_config: the bundle's scheduler_config.json.
        device: where the models run.
        dtype: of latents and of the denoising model.
        compiled: whether the denoising model is compiled, so that numbers of rows are better few.
    """

    kind: ClassVar[str]
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    compiled: bool

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """The length d of an image embedding."""

    @property
    @abstractmethod
    def scale(self) -> int:
        """Pixels to a latent, each way."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels c of the latents."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Pixels that widths and heights must be multiples of."""

    @abstractmethod
    def latents_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """[1, c, h, w] of an image of these pixels."""

    @abstractmethod
    def condition(self, embeds: np.ndarray | None, *, negative: bool, width: int, height: int) -> Any:
        """What one row of :meth:`predict` receives besides latents and timestep.

        Args:
            embeds: float32 [d]; None for the decoder's own negative.
            negative: whether the row is what guidance steers away from.
            width: pixels of the image.
            height: pixels of the image.
        """

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        """One call of the denoising model.

        Args:
            latents: [n, c, h, w].
            timesteps: [n].
            conditions: n of :meth:`condition`.

        Returns:
            [n, c, h, w], or more channels where the model predicts a variance too.
        """
        if not self.compiled:
            return self._predict(latents, timesteps, conditions)
        # A model is compiled, and its CUDA graph recorded, for every number of rows; so only powers of two are used.
        n = len(latents)
        rows = [min(row, n - 1) for row in range(1 << (n - 1).bit_length())]
        output = self._predict(latents[rows], timesteps[rows], [conditions[row] for row in rows])
        # A CUDA graph writes its next output where this one lies.
        return output[:n].clone()

    @abstractmethod
    def _predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        """The call itself."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents [n, c, h, w] to pixels [n, 3, scale h, scale w], 0 to 1."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [n, 3, height, width], -1 to 1, to clean latents [n, c, h, w]; deterministic."""

    @property
    def prediction_type(self) -> str:
        """What the model predicts: epsilon, sample or v_prediction."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def train_timesteps(self) -> int:
        """The length of the noise schedule; no scheduler takes more steps."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @property
    def precision(self) -> str:
        """Device kind and dtype, for cache keys: "cpu/float32"."""
        return f"{self.device.type}/{str(self.dtype).removeprefix('torch.')}"

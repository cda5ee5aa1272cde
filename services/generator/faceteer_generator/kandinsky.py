"""Kandinsky 2.2's decoder: diffusers' UNet with image embeds, and MoVQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from faceteer_generator.decoder import Decoder


@dataclass(frozen=True)
class KandinskyDecoder(Decoder):
    """Calls as ``KandinskyV22Pipeline`` makes them, operation by operation.

    Attributes:
        unet: latents and image embeds to noise (or whatever the scheduler's prediction_type says) and variance.
        movq: latents to pixels and back.
        scheduler_config: the bundle's scheduler_config.json.
        negative_embeds: [d], on the device: the embeds of a mean-grey image.
        device: where the models run.
        dtype: of the models.
        compiled: whether ``unet`` is compiled, so that numbers of rows are better few.
    """

    kind: ClassVar[str] = "kandinsky-2-2"

    unet: Any
    movq: Any
    scheduler_config: dict[str, Any]
    negative_embeds: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    compiled: bool = False

    @property
    def embed_dim(self) -> int:
        """The length d of an image embedding."""
        return int(self.unet.config.encoder_hid_dim)

    @property
    def scale(self) -> int:
        """Pixels to a latent, each way."""
        return int(2 ** (len(self.movq.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.unet.config.in_channels)

    @property
    def size_multiple(self) -> int:
        """Sizes round up to multiples of scale squared, as KandinskyV22Pipeline does."""
        return self.scale**2

    def latents_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """[1, c, h, w] of an image."""
        square = self.size_multiple
        return 1, self.channels, -(-height // square) * self.scale, -(-width // square) * self.scale

    def condition(self, embeds: np.ndarray | None, *, negative: bool, width: int, height: int) -> torch.Tensor:
        """The embeds, [1, d]; those of a grey image for None."""
        if embeds is None:
            return self.negative_embeds[None]
        return torch.tensor(embeds, dtype=self.dtype, device=self.device)[None]

    def _predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        """Prediction and variance, [n, 2c, h, w]."""
        output: torch.Tensor = self.unet(
            sample=latents,
            timestep=timesteps,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": torch.cat(list(conditions))},
            return_dict=False,
        )[0]
        return output

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, 0 to 1; the latents are not quantised again."""
        image: torch.Tensor = self.movq.decode(latents, force_not_quantize=True)["sample"]
        return (image * 0.5 + 0.5).clamp(0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """MoVQ's latents before quantisation, which is what the UNet was trained on."""
        latents: torch.Tensor = self.movq.encode(pixels.to(self.device, self.dtype))["latents"]
        return latents

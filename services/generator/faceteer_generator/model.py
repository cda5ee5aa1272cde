"""The decoder of a bundle: diffusers' UNet and MoVQ, the scheduler's configuration, the negative embeds.

Knows nothing of requests, schedulers' steps or batches; it loads, and checks that what it loaded fits together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, VQModel
from faceteer_runtime.bundle import BundleError
from safetensors.torch import load_file

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Decoder:
    """Models in inference mode, ready to be called on one thread.

    Attributes:
        unet: latents and image embeds to noise (or whatever the scheduler's prediction_type says) and variance.
        movq: latents to pixels.
        scheduler_config: the bundle's scheduler_config.json.
        negative_embeds: [d], on the device: the embeds of a mean-grey picture.
        device: where the models are.
        dtype: of the models.
    """

    unet: Any
    movq: Any
    scheduler_config: dict[str, Any]
    negative_embeds: torch.Tensor
    device: torch.device
    dtype: torch.dtype

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
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, sample or v_prediction."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def train_timesteps(self) -> int:
        """The length of the noise schedule; no scheduler takes more steps."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @property
    def precision(self) -> str:
        """Device kind and dtype, for cache keys: "cpu/float32"."""
        return f"{self.device.type}/{str(self.dtype).removeprefix('torch.')}"

    def latents_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """[1, c, h, w] of a picture; sizes round up to multiples of scale squared, as KandinskyV22Pipeline does."""
        square = self.scale**2
        return 1, self.channels, -(-height // square) * self.scale, -(-width // square) * self.scale


def load_decoder(directory: Path, *, device: str = "cpu", dtype: str = "auto") -> Decoder:
    """Loads ``generator/`` of a bundle (diffusers' KandinskyV22Pipeline layout, safetensors only).

    Args:
        directory: holds unet/, movq/, scheduler/ and negative_embeds.safetensors.
        device: torch's name of it.
        dtype: float32, float16, bfloat16, or auto: float32 on a CPU, float16 elsewhere, whatever the files hold.

    Raises:
        BundleError: a file is missing or broken, or the parts do not fit each other.
    """
    target = torch.device(device)
    if dtype == "auto":
        precision = torch.float32 if target.type == "cpu" else torch.float16
    else:
        precision = _DTYPES[dtype]
    unet = _loaded(directory / "unet", lambda path: _model(UNet2DConditionModel, path, precision, target))
    movq = _loaded(directory / "movq", lambda path: _model(VQModel, path, precision, target))
    scheduler_config = _loaded(
        directory / "scheduler" / "scheduler_config.json", lambda path: json.loads(path.read_text(encoding="utf-8"))
    )
    negative = _loaded(directory / "negative_embeds.safetensors", lambda path: load_file(path)["negative_image_embeds"])
    _check(directory, unet, movq, scheduler_config, negative)
    return Decoder(unet, movq, scheduler_config, negative[0].to(target, precision), target, precision)


def _model(cls: Any, path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    # Published weights in half precision lie beside or instead of the full ones, under a name of their own.
    only_half = not list(path.glob("*_model.safetensors*")) and list(path.glob("*.fp16.safetensors*"))
    model = cls.from_pretrained(
        path,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        variant="fp16" if only_half else None,
    )
    # Channels last: the same arithmetic in an order that convolutions of many rows like better; a fifth faster at
    # sixteen pictures on a CPU, a third in MoVQ.
    return model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    if not path.exists():
        raise BundleError(f"{path}: missing; pull the bundle again")
    try:
        return load(path)
    except Exception as error:
        # diffusers, safetensors and json raise what they like about a broken file.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(f"{path}: cannot be loaded ({reason})") from error


def _check(directory: Path, unet: Any, movq: Any, scheduler_config: Any, negative: torch.Tensor) -> None:
    config = unet.config
    if config.encoder_hid_dim_type != "image_proj" or config.addition_embed_type != "image":
        raise BundleError(f"{directory / 'unet'}: not a Kandinsky 2.2 decoder (it does not take image embeds)")
    if config.in_channels != movq.config.latent_channels:
        raise BundleError(
            f"{directory}: unet has {config.in_channels} latent channels, movq {movq.config.latent_channels}"
        )
    if config.out_channels != 2 * config.in_channels:
        raise BundleError(f"{directory / 'unet'}: must predict noise and variance, {2 * config.in_channels} channels")
    if tuple(negative.shape) != (1, config.encoder_hid_dim) or not torch.isfinite(negative).all():
        raise BundleError(
            f"{directory / 'negative_embeds.safetensors'}: must be finite and of shape [1, {config.encoder_hid_dim}]"
        )
    prediction = isinstance(scheduler_config, dict) and scheduler_config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise BundleError(f"{directory / 'scheduler'}: prediction_type must be one of {', '.join(PREDICTION_TYPES)}")

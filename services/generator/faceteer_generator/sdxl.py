"""SDXL with the bigG IP-Adapter: the same image embeddings drive a second decoder.
The adapter takes the 1,280-d embedding of CLIP ViT-bigG-14, the negative being zeros, beside a text; the text here is
always the empty one, whose embeds the bundle keeps, so that nothing but the image embeds says what to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from faceteer_runtime.bundle import BundleError
from safetensors import SafetensorError
from safetensors.torch import load_file

from faceteer_generator.checkpoint import is_finite, read_header
from faceteer_generator.decoder import Decoder

ADAPTER = Path("ip_adapter") / "ip-adapter_sdxl.safetensors"
EMPTY_PROMPT = "empty_prompt.safetensors"


class _Row(NamedTuple):
    """[1, 1, d] image embeds, [1, t, c] and [1, p] text embeds, [1, 6] sizes."""

    image_embeds: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


@dataclass(frozen=True)
class SdxlDecoder(Decoder):
    """Calls as ``StableDiffusionXLPipeline`` makes them with ``ip_adapter_image_embeds`` and an empty prompt.

    Attributes:
        unet: with the IP-Adapter's projection and attention processors in place.
        vae: latents to pixels and back.
        scheduler_config: the bundle's scheduler_config.json.
        prompt_embeds: [1, t, c], of the empty prompt; its negative is zeros (force_zeros_for_empty_prompt).
        pooled_prompt_embeds: [1, p], likewise.
        device: where the models run.
        dtype: of the UNet; the vae may be in float32.
        compiled: whether ``unet`` is compiled, so that numbers of rows are better few.
    """

    kind: ClassVar[str] = "sdxl-ip-adapter"

    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    compiled: bool = False

    @property
    def embed_dim(self) -> int:
        """The length d of an image embedding."""
        return int(self.unet.encoder_hid_proj.image_projection_layers[0].image_embeds.in_features)

    @property
    def scale(self) -> int:
        """Pixels to a latent, each way."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.unet.config.in_channels)

    @property
    def size_multiple(self) -> int:
        """Every level of the UNet halves the latents."""
        return int(self.scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def latents_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """[1, c, h, w] of an image."""
        return 1, self.channels, height // self.scale, width // self.scale

    def condition(self, embeds: np.ndarray | None, *, negative: bool, width: int, height: int) -> _Row:
        """Image embeds (zeros for None), the empty prompt (zeros for a negative), and the sizes SDXL asks for."""
        if embeds is None:
            row = torch.zeros(1, 1, self.embed_dim, dtype=self.dtype, device=self.device)
        else:
            row = torch.tensor(embeds, dtype=self.dtype, device=self.device)[None, None]
        text, pooled = self.prompt_embeds, self.pooled_prompt_embeds
        if negative:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        # Original size, top left corner of the crop, target size.
        sizes = (height, width, 0, 0, height, width)
        return _Row(row, text, pooled, torch.tensor([sizes], dtype=self.dtype, device=self.device))

    def _predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        """The predicted noise, [n, c, h, w]."""
        image_embeds, text, pooled, time_ids = (torch.cat(column) for column in zip(*conditions, strict=True))
        output: torch.Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [image_embeds]},
            return_dict=False,
        )[0]
        return output

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, 0 to 1."""
        scaled = latents.to(_dtype_of(self.vae)) / self.vae.config.scaling_factor
        image: torch.Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return (image * 0.5 + 0.5).clamp(0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The mode of the autoencoder's distribution, so that an image has one encoding."""
        latents = self.vae.encode(pixels.to(self.device, _dtype_of(self.vae))).latent_dist.mode()
        scaled: torch.Tensor = (latents * self.vae.config.scaling_factor).to(self.dtype)
        return scaled


def _dtype_of(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.dtype
    return dtype


def join_ip_adapter(unet: Any, directory: Path) -> None:
    """Puts the IP-Adapter's weights into the UNet.

    The file is the published ``ip-adapter_sdxl`` in its safetensors form: ``image_proj.*`` and ``ip_adapter.*``.

    Raises:
        BundleError: the file is missing or broken, or its tensors are not those of an adapter for this UNet.
    """
    path = directory / ADAPTER
    shapes = read_header(path)
    wanted = _adapter_shapes(unet, shapes, path)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            raise BundleError(f"{path}: tensor {name!r} is missing, which an adapter for this unet has")
        if name not in wanted:
            raise BundleError(f"{path}: tensor {name!r} does not belong to an adapter for this unet")
        if shapes[name] != wanted[name]:
            raise BundleError(
                f"{path}: tensor {name!r} has shape {list(shapes[name])}, but this unet asks for {list(wanted[name])}"
            )
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(path).items():
        if not is_finite(tensor):
            raise BundleError(f"{path}: tensor {name!r} holds NaN or infinite values")
        part, _, key = name.partition(".")
        parts[part][key] = tensor.to(unet.dtype)
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    unet.eval().requires_grad_(False)


def _adapter_shapes(unet: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, tuple[int, ...]]:
    """What the file must hold: a projection to tokens, and keys and values for every cross-attention."""
    projection = shapes.get("image_proj.proj.weight", ())
    width = int(unet.config.cross_attention_dim)
    if len(projection) != 2 or projection[0] % width:
        raise BundleError(f"{path}: tensor 'image_proj.proj.weight' must be [tokens x {width}, d]")
    wanted = {
        "image_proj.proj.weight": projection,
        "image_proj.proj.bias": projection[:1],
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    state = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    for position, processor in enumerate(unet.attn_processors):
        layer = processor.removesuffix(".processor")
        if not layer.endswith("attn2"):
            continue
        hidden = state[f"{layer}.to_q.weight"][0]
        wanted[f"ip_adapter.{position}.to_k_ip.weight"] = (hidden, width)
        wanted[f"ip_adapter.{position}.to_v_ip.weight"] = (hidden, width)
    return wanted


def empty_prompt_embeds(directory: Path, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty prompt's embeds, float32 [1, t, c] and pooled [1, p].

    Read from ``empty_prompt.safetensors``; computed by the text encoders where the bundle holds those instead.

    Raises:
        BundleError: missing, broken, or not for this UNet.
    """
    path = directory / EMPTY_PROMPT
    if path.exists() or not (directory / "text_encoder").is_dir():
        prompt, pooled = _stored_prompt(path)
    else:
        path = directory / "text_encoder"
        prompt, pooled = _computed_prompt(directory)
    pooled_dim = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
    fits = prompt.ndim == 3 and len(prompt) == 1 and prompt.shape[2] == config.cross_attention_dim
    if not fits or tuple(pooled.shape) != (1, pooled_dim):
        raise BundleError(
            f"{path}: prompt_embeds must be [1, tokens, {config.cross_attention_dim}] and pooled_prompt_embeds"
            f" [1, {pooled_dim}]"
        )
    if not is_finite(prompt) or not is_finite(pooled):
        raise BundleError(f"{path}: the empty prompt's embeds hold NaN or infinite values")
    return prompt, pooled


def _stored_prompt(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        tensors = load_file(path)
        return tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]
    except (OSError, SafetensorError, KeyError) as error:
        raise BundleError(
            f"{path}: must hold prompt_embeds and pooled_prompt_embeds ({type(error).__name__}: {error})"
        ) from None


def _computed_prompt(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """As StableDiffusionXLPipeline: both encoders' last hidden layer but one, and the second's projection."""
    # transformers takes seconds to import, and few bundles hold text encoders.
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    hidden, pooled = [], torch.empty(0)
    for suffix, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        try:
            options: dict[str, Any] = {"local_files_only": True}
            tokenizer = CLIPTokenizer.from_pretrained(directory / f"tokenizer{suffix}", **options)
            encoder: Any = cls.from_pretrained(directory / f"text_encoder{suffix}", use_safetensors=True, **options)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BundleError(f"{directory / f'text_encoder{suffix}'}: cannot be loaded ({reason})") from error
        tokens = tokenizer(
            "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = encoder.eval()(tokens.input_ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(hidden, dim=-1), pooled

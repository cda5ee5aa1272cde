"""Loads a bundle's decoder: which kind it is, where its weights go, and whether they fit there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from faceteer_runtime.bundle import BundleError
from safetensors.torch import load_file

from faceteer_generator.checkpoint import (
    StoredTensor,
    check_against,
    ensure_room,
    fill,
    read_header,
    stored_tensors,
    weights_bytes,
)
from faceteer_generator.decoder import Decoder
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.sdxl import ADAPTER, SdxlDecoder, empty_prompt_embeds, join_ip_adapter

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
KINDS = (KandinskyDecoder.kind, SdxlDecoder.kind)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Compile = Literal["off", "default", "reduce-overhead", "max-autotune"]
Offload = Literal["none", "model", "sequential"]


def load_decoder(
    directory: Path,
    *,
    kind: str = KandinskyDecoder.kind,
    device: str = "cpu",
    dtype: str = "auto",
    compile: Compile = "off",
    offload: Offload = "none",
) -> Decoder:
    """Loads ``generator/`` of a bundle (docs/bundles.md; diffusers' own layouts, safetensors only).

    Args:
        directory: holds unet/, movq/ or vae/, scheduler/ and what else the kind needs.
        kind: "kandinsky-2-2" or "sdxl-ip-adapter".
        device: torch's name of it.
        dtype: float32, float16, bfloat16, or auto: float32 on a CPU, float16 elsewhere, whatever the files hold.
        compile: torch.compile's mode for the denoising model; the last two record CUDA graphs on a GPU.
        offload: what waits in host memory while it is not used: nothing, whole models, or single layers.

    Raises:
        BundleError: a file is missing, cut off or broken, a tensor is missing, unknown, misshapen or not finite, the
            parts do not fit each other, or there is not enough memory; before any weights are read, where possible.
    """
    target = target_device(device)
    if offload != "none" and target.type == "cpu":
        raise BundleError("FACETEER_GENERATOR_OFFLOAD is for GPUs; on a CPU it must be none")
    if offload != "none" and compile != "off":
        raise BundleError("FACETEER_GENERATOR_COMPILE and FACETEER_GENERATOR_OFFLOAD exclude each other; choose one")
    if dtype == "auto":
        precision = torch.float32 if target.type == "cpu" else torch.float16
    else:
        precision = _DTYPES[dtype]
    if kind == KandinskyDecoder.kind:
        decoder: KandinskyDecoder | SdxlDecoder = _kandinsky(directory, target, precision, offload)
    elif kind == SdxlDecoder.kind:
        decoder = _sdxl(directory, target, precision, offload)
    else:
        raise BundleError(f"{directory}: a generator of kind {kind!r} is none of {', '.join(KINDS)}")
    if compile != "off":
        # Shapes are compiled one by one: dynamic ones allow neither CUDA graphs nor the tuned kernels.
        unet = torch.compile(decoder.unet, mode=compile, dynamic=False)
        decoder = dataclasses.replace(decoder, unet=unet, compiled=True)
    return decoder


def target_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        BundleError: it is not there, or is no device at all.
    """
    try:
        target = torch.device(device)
    except RuntimeError:
        raise BundleError(f"device {device!r} is no device; set FACETEER_DEVICE to cpu, cuda or cuda:1") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device {device!r} was asked for, but this machine has no CUDA GPU; set FACETEER_DEVICE=cpu")
    return target


def _kandinsky(directory: Path, device: torch.device, dtype: torch.dtype, offload: Offload) -> KandinskyDecoder:
    scheduler_config = _scheduler_config(directory)
    parts = _checked_parts(directory, {"unet": UNet2DConditionModel, "movq": VQModel})
    unet, movq = (model for model, _ in parts.values())
    path = directory / "negative_embeds.safetensors"
    negative = _loaded(path, lambda file: load_file(file)["negative_image_embeds"])
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
        raise BundleError(f"{path}: must be finite and of shape [1, {config.encoder_hid_dim}]")
    _fill_parts(directory, parts, device, dict.fromkeys(parts, dtype), offload)
    return KandinskyDecoder(unet, movq, scheduler_config, negative[0].to(device, dtype), device, dtype)


def _sdxl(directory: Path, device: torch.device, dtype: torch.dtype, offload: Offload) -> SdxlDecoder:
    scheduler_config = _scheduler_config(directory)
    parts = _checked_parts(directory, {"unet": UNet2DConditionModel, "vae": AutoencoderKL})
    unet, vae = (model for model, _ in parts.values())
    if unet.config.addition_embed_type != "text_time":
        raise BundleError(f"{directory / 'unet'}: not an SDXL decoder (it does not take text embeds and times)")
    if unet.config.in_channels != vae.config.latent_channels:
        raise BundleError(
            f"{directory}: unet has {unet.config.in_channels} latent channels, vae {vae.config.latent_channels}"
        )
    empty_prompt = empty_prompt_embeds(directory, unet.config)
    # SDXL's own autoencoder overflows in half precision, and says so in its configuration.
    vae_dtype = torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype
    adapter = sum(math.prod(shape) for shape in read_header(directory / ADAPTER).values()) * dtype.itemsize
    # Loading the adapter needs the whole UNet in one place; only afterwards may it be moved.
    home = device if offload == "none" else torch.device("cpu")
    _fill_parts(directory, parts, home, {"unet": dtype, "vae": vae_dtype}, "none", beside=adapter)
    join_ip_adapter(unet, directory)
    unet.to(home, dtype)
    if offload != "none":
        offload_between([unet, vae], device, offload)
    embeds, pooled = (tensor.to(device, dtype) for tensor in empty_prompt)
    return SdxlDecoder(unet, vae, scheduler_config, embeds, pooled, device, dtype)


def offload_between(models: Sequence[Any], device: torch.device, how: Literal["model", "sequential"]) -> None:
    """Arranges that models in host memory run on ``device``.

    Args:
        models: on the CPU; called in any order, one at a time.
        device: where they run.
        how: "model": one whole model at a time is there; "sequential": one layer at a time, for the smallest GPUs, at
            the price of moving all weights in every call.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook  # type: ignore[import-untyped]

    if how == "sequential":
        for model in models:
            cpu_offload(model, execution_device=device)
        return
    handles = [cpu_offload_with_hook(model, device)[1] for model in models]
    # Each model moves the previous one off the GPU, in a cycle: denoising and decoding alternate without end.
    for handle, previous in zip(handles, handles[-1:] + handles[:-1], strict=True):
        handle.hook.prev_module_hook = previous


def _checked_parts(directory: Path, classes: Mapping[str, Any]) -> dict[str, tuple[Any, dict[str, StoredTensor]]]:
    """Models on the meta device with the headers of their files, compared."""
    parts: dict[str, tuple[Any, dict[str, StoredTensor]]] = {}
    for name, cls in classes.items():
        path = directory / name
        model = _loaded(path, lambda path, cls=cls: _built(cls, path))  # type: ignore[misc]
        stored = stored_tensors(path)
        check_against(model, stored, path)
        parts[name] = (model, stored)
    return parts


def _built(cls: Any, path: Path) -> Any:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return cls.from_config(config)


def _fill_parts(
    directory: Path,
    parts: Mapping[str, tuple[Any, dict[str, StoredTensor]]],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    offload: Offload,
    *,
    beside: int = 0,
) -> None:
    """Loads weights; ``beside`` are bytes of others that come after."""
    sizes = [weights_bytes(stored.values(), dtypes[name]) for name, (_, stored) in parts.items()]
    home = device if offload == "none" else torch.device("cpu")
    ensure_room(f"{directory}", sum(sizes) + beside, home)
    if offload == "model":
        ensure_room(f"{directory}", max(sizes), device)
    for name, (model, stored) in parts.items():
        fill(model, stored, dtypes[name], home)
        # Channels last: the same arithmetic in an order that convolutions like better.
        model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    if offload != "none":
        offload_between([model for model, _ in parts.values()], device, offload)


def _scheduler_config(directory: Path) -> dict[str, Any]:
    path = directory / "scheduler" / "scheduler_config.json"
    config = _loaded(path, lambda path: json.loads(path.read_text(encoding="utf-8")))
    prediction = isinstance(config, dict) and config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise BundleError(f"{path}: prediction_type must be one of {', '.join(PREDICTION_TYPES)}")
    return dict(config)


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    if not path.exists():
        raise BundleError(f"{path}: missing; pull the bundle again")
    try:
        return load(path)
    except BundleError:
        raise
    except Exception as error:
        # diffusers, safetensors and json raise many kinds of exception for a broken file.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(f"{path}: cannot be loaded ({reason})") from error

"""Train the picture autoencoder: diffusers' VQModel in MoVQ's form (spatial norm), 64 px <-> 16 x 16 latents.

Kandinsky's pipeline decodes without quantising, so none is trained; the codebook is there for the format's sake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.models.attention_processor import SpatialNorm
from faceteer_trainer.budget import Budget

from faceteer_postcards.training import Ema, Run, autocast, learning_rate, set_rate, step_generator, step_rng


@dataclass(frozen=True)
class MovqSettings:
    """`channels` from the picture's resolution down; each further entry halves it. Multiples of 32: spatial norm
    has 32 groups."""

    channels: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 8
    layers: int = 1
    batch: int = 8
    peak_rate: float = 2e-3
    latent_noise: float = 0.06  # standard deviation added to latents in training, so that the decoder forgives


def build_movq(settings: MovqSettings) -> VQModel:
    """An untrained model."""
    depth = len(settings.channels)
    return VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=settings.channels,
        layers_per_block=settings.layers,
        latent_channels=settings.latent_channels,
        sample_size=64,
        num_vq_embeddings=16,
        norm_type="spatial",
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_tensor(pictures: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in -1..1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """float [b, 3, h, w] in -1..1 -> uint8 [b, h, w, 3], rounded as diffusers' image processor does."""
    shares = (images.float() / 2 + 0.5).clamp(0, 1)
    return (shares.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)


def _edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error, and half of L1 on both image gradients, which keeps edges sharp."""
    output = output.float()
    rows, columns = (F.l1_loss(a, b) for a, b in zip(_edges(output), _edges(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * (rows + columns)


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of images in -1..1, over all of them at once."""
    return float(10 * torch.log10(4.0 / F.mse_loss(output.detach().float().clamp(-1, 1), target)))


@torch.no_grad()
def normalise_latents(model: VQModel, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold (z - mean) / std into the weights, so that `encode` gives unit latents and `decode` takes them.

    `mean`, `std` [latent_channels]. The pipeline has no scaling factor: everything that makes or reads latents is
    changed: quant_conv and the codebook on their way out, post_quant_conv and every spatial norm on their way in.
    """
    model.quant_conv.weight /= std[:, None, None, None]
    model.quant_conv.bias.copy_((model.quant_conv.bias - mean) / std)
    model.quantize.embedding.weight.copy_((model.quantize.embedding.weight - mean) / std)
    readers = [model.post_quant_conv]
    for module in model.modules():
        if isinstance(module, SpatialNorm):
            readers += [module.conv_y, module.conv_b]
    for conv in readers:
        conv.bias += conv.weight[:, :, 0, 0] @ mean
        conv.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_all(model: VQModel, pictures: npt.NDArray[np.uint8], batch: int = 64) -> torch.Tensor:
    """Latents float16 [n, c, h, w] of uint8 pictures [n, 64, 64, 3]."""
    device = model.device
    parts = []
    for start in range(0, len(pictures), batch):
        with autocast(device):
            latents = model.encode(to_tensor(pictures[start : start + batch], device)).latents
        parts.append(latents.to("cpu", torch.float16).contiguous())
    return torch.cat(parts)


def train_movq(
    pictures: npt.NDArray[np.uint8],
    held_out: npt.NDArray[np.uint8],
    directory: Path,
    budget: Budget,
    settings: MovqSettings | None = None,
    seed: int = 0,
    device: str = "cpu",
    log_every: int = 200,
) -> VQModel:
    """Train on uint8 pictures [n, 64, 64, 3]; returns the averaged weights with unit latents, in float32."""
    settings = settings or MovqSettings()
    torch.manual_seed(seed)
    on = torch.device(device)
    model = build_movq(settings).to(on).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(model, 0.998)
    run = Run(directory, "movq", budget, {"model": model, "optimizer": optimizer, "ema": ema})
    for step in run.steps():
        rows = np.sort(step_rng(seed, step).integers(0, len(pictures), settings.batch))
        target = to_tensor(pictures[rows], on)
        rate = learning_rate(settings.peak_rate, step, run.progress)
        set_rate(optimizer, rate)
        with autocast(on):
            latents = model.encode(target).latents
            noise = torch.randn(latents.shape, generator=step_generator(seed, step)).to(on)
            output = model.decode(latents + settings.latent_noise * noise, force_not_quantize=True).sample
        # latents beyond +-1 cost a little: the noise above must stay noticeable
        loss = reconstruction_loss(output, target) + 1e-3 * F.relu(latents.float().square() - 1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        if step % log_every == 0:
            run.log(loss=loss.item(), psnr=psnr(output, target), rate=rate)
    return finish_movq(ema, settings, pictures, held_out, run)


@torch.no_grad()
def finish_movq(
    ema: Ema, settings: MovqSettings, pictures: npt.NDArray[np.uint8], held_out: npt.NDArray[np.uint8], run: Run
) -> VQModel:
    """The averaged weights as a model with unit latents; logs its PSNR on held-out pictures."""
    model = build_movq(settings)
    model.load_state_dict({name: weight.cpu() for name, weight in ema.weights.items()})
    model.eval()
    latents = encode_all(model, pictures[: min(len(pictures), 1024)]).float()
    normalise_latents(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    target = to_tensor(held_out[:256])
    output = model.decode(model.encode(target).latents, force_not_quantize=True).sample
    run.log(held_out_psnr=psnr(output, target))
    return model


def _detail(target: torch.Tensor) -> torch.Tensor:
    """Weights [b, 1, h, w] from 1 in even areas to 4 where a picture differs from its own blur: shapes and edges."""
    blurred = F.avg_pool2d(F.pad(target, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return 1 + 3 * (2 * (target - blurred).abs().mean(1, keepdim=True)).clamp(max=1)


def sharpen_decoder(
    model: VQModel,
    pictures: npt.NDArray[np.uint8],
    latents: torch.Tensor,
    held_out: npt.NDArray[np.uint8],
    directory: Path,
    budget: Budget,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 8,
    peak_rate: float = 1e-3,
    latent_noise: float = 0.08,
) -> VQModel:
    """Train the decoder half on, from cached unit latents f16 [n, c, h, w] of `pictures`, with weight on detail.

    The encoder stays as it is, so a UNet can learn on the same latents meanwhile.
    """
    on = torch.device(device)
    model = model.to(on)
    trained = [p for name, p in model.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
    optimizer = torch.optim.AdamW(trained, peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(model, 0.998)
    run = Run(directory, "decoder", budget, {"model": model, "optimizer": optimizer, "ema": ema})
    for step in run.steps():
        rows = np.sort(step_rng(seed + 1, step).integers(0, len(latents), batch))
        target, clean = to_tensor(pictures[rows], on), latents[torch.from_numpy(rows)].to(on, torch.float32)
        noise = torch.randn(clean.shape, generator=step_generator(seed + 1, step)).to(on)
        set_rate(optimizer, learning_rate(peak_rate, step, run.progress))
        with autocast(on):
            output = model.decode(clean + latent_noise * noise, force_not_quantize=True).sample
        weight = _detail(target)
        error = (output.float() - target).abs()
        rows_off, columns_off = (
            (a - b).abs().mean() for a, b in zip(_edges(output.float()), _edges(target), strict=True)
        )
        loss = (weight * (error + error.square())).mean() + 0.5 * (rows_off + columns_off)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(model, step)
        if step % 200 == 0:
            run.log(loss=loss.item(), psnr=psnr(output, target))
    sharp = VQModel.from_config(model.config)
    sharp.load_state_dict({name: weight.cpu() for name, weight in ema.weights.items()})
    with torch.no_grad():
        target = to_tensor(held_out[:256])
        output = sharp.eval().decode(sharp.encode(target).latents, force_not_quantize=True).sample
    run.log(held_out_psnr=psnr(output, target))
    return sharp


class Batch(NamedTuple):
    """Pictures u8 [b, 64, 64, 3], how much of each pixel is a subject f32 [b, 64, 64], and what is decoded.

    `latents` f32 [m, c, h, w] belong to the first m of the pictures, as a UNet draws them; those of the others, or of
    all where it is None, are the encoder's.
    """

    pictures: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.float32]
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class RefineMovq:
    """How a trained autoencoder is trained on.

    Attributes:
        subject: weight of pixels of a subject; the rest has 1.
        laplacian: weight of L1 on second differences; that on first differences has 0.5.
        hold: weight of the squared distance of latents from what they were, which is what a UNet has learnt.
        latent_noise: standard deviation added to half of the encoder's latents.
        encoder: whether the encoding half learns too; without it latents stay what they are.
        compiled: by Inductor: minutes of compiling, then 1.7 times as fast on a CPU.
    """

    batch: int = 8
    peak_rate: float = 1e-3
    subject: float = 4.0
    laplacian: float = 0.25
    hold: float = 1.0
    latent_noise: float = 0.1
    encoder: bool = True
    compiled: bool = False


def subject_loss(
    output: torch.Tensor, target: torch.Tensor, masks: torch.Tensor, subject: float, laplacian: float
) -> torch.Tensor:
    """L1, squared error and L1 of the error's first and second differences, weighted by `masks` [b, 1, h, w].

    A subject's edge weighs as the subject does.
    """
    error = output.float() - target
    weight = 1 + (subject - 1) * F.max_pool2d(masks, 3, 1, 1)
    weight = weight / weight.mean()
    rows, columns = _edges(error)
    second = 4 * error[..., 1:-1, 1:-1] - (error[..., 2:, 1:-1] + error[..., :-2, 1:-1])
    second = second - (error[..., 1:-1, 2:] + error[..., 1:-1, :-2])
    point = (weight * (error.abs() + 4 * error.square())).mean()
    first = (weight[..., 1:, :] * rows.abs()).mean() + (weight[..., 1:] * columns.abs()).mean()
    return point + 0.5 * first + laplacian * (weight[..., 1:-1, 1:-1] * second.abs()).mean()


def refine_movq(
    start: VQModel,
    batches: Callable[[int, int], Batch],
    directory: Path,
    budget: Budget,
    settings: RefineMovq | None = None,
    seed: int = 0,
    device: str = "cpu",
    log_every: int = 100,
) -> VQModel:
    """Train a finished autoencoder on; returns the averaged weights. `batches(step, size)` gives what a step sees.

    Where the encoder learns, its latents are held close to those of `start`.
    """
    settings = settings or RefineMovq()
    on = torch.device(device)
    start = start.to(on).eval().requires_grad_(False)
    model = VQModel.from_config(start.config).to(on).eval()
    model.load_state_dict(start.state_dict())
    halves = ("decoder.", "post_quant_conv.", *(("encoder.", "quant_conv.") if settings.encoder else ()))
    trained = [p for name, p in model.named_parameters() if name.startswith(halves)]
    optimizer = torch.optim.AdamW(trained, settings.peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(model, 0.998)
    name = "movq" if settings.encoder else "decoder"
    run = Run(directory, name, budget, {"model": model, "optimizer": optimizer, "ema": ema}, save_every=120)

    def encode_before(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents: torch.Tensor = start.encode(images).latents
        return latents

    def through(images: torch.Tensor, known: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = model.encode(images).latents if settings.encoder else known
        return latents, model.decode(latents + noise, force_not_quantize=True).sample

    if settings.compiled:
        encode_before = torch.compile(encode_before, dynamic=False)
        through = torch.compile(through, dynamic=False)
    for step in run.steps():
        pictures, masks, drawn = batches(step, settings.batch)
        target, mask = to_tensor(pictures, on), torch.from_numpy(masks)[:, None].to(on)
        generator = step_generator(seed, step)
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress))
        with autocast(on):
            known = encode_before(target).float().clone()
            noise = torch.randn(known.shape, generator=generator) * settings.latent_noise
            noise *= torch.rand(len(noise), 1, 1, 1, generator=generator) < 0.5
            if drawn is not None:  # these have the UNet's own noise
                known[: len(drawn)] = drawn.to(on)
                noise[: len(drawn)] = 0
            latents, output = through(target, known, noise.to(on))
        moved = F.mse_loss(latents.float(), known)
        loss = subject_loss(output, target, mask, settings.subject, settings.laplacian) + settings.hold * moved
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(model, step)
        if step % log_every == 0:
            run.log(loss=loss.item(), psnr=psnr(output, target), moved=moved.item() ** 0.5)
    refined = VQModel.from_config(start.config)
    refined.load_state_dict({weight: value.cpu() for weight, value in ema.weights.items()})
    return refined.eval()

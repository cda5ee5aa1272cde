"""Train the decoder: diffusers' UNet2DConditionModel in Kandinsky 2.2's form, from embeddings to MoVQ latents.

v-prediction on squared-cosine betas, sampled by DDIM with trailing steps. A tenth of the embeddings is replaced by the
negative one (a mean-grey picture's), and half of them get a little noise, so that edited embeddings resemble
those seen in training.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from faceteer_trainer.budget import Budget
from torch import nn
from torch.multiprocessing.spawn import spawn

from faceteer_postcards.training import Ema, Run, autocast, learning_rate, set_rate, step_generator

# The share of a latent cell from which it holds a subject.
_SHOWN = 0.02


@dataclass(frozen=True)
class UnetSettings:
    """The defaults are the shipped ones. `batch` is each worker's."""

    channels: tuple[int, ...] = (64, 128, 192)
    layers: int = 1
    cross_attention_dim: int = 64
    batch: int = 48
    peak_rate: float = 1.6e-3
    warmup_steps: int = 200
    dropped: float = 0.1  # share of embeddings replaced by the negative one
    noise: float = 0.15  # standard deviation added to half of the standardised embeddings
    ema_decay: float = 0.999


@dataclass(frozen=True)
class DecoderData:
    """What the decoder learns from: latents f16 [n, c, h, w], embeds f32 [n, d], negative f32 [1, d]."""

    latents: torch.Tensor
    embeds: torch.Tensor
    negative: torch.Tensor


def build_scheduler() -> DDIMScheduler:
    """The noise schedule, for training and sampling alike."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip


def build_unet(settings: UnetSettings, latent_channels: int, embed_dim: int, sample_size: int) -> UNet2DConditionModel:
    """An untrained model: the embedding scales and shifts every block, and is attended to in the middle."""
    depth = len(settings.channels)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=2 * latent_channels,  # Kandinsky's pipeline splits off a variance; ours is not trained
        down_block_types=("DownBlock2D",) * depth,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D",) * depth,
        block_out_channels=settings.channels,
        layers_per_block=settings.layers,
        cross_attention_dim=settings.cross_attention_dim,
        attention_head_dim=32,
        encoder_hid_dim=embed_dim,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )


@torch.no_grad()
def fold_standardisation(model: UNet2DConditionModel, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make a model trained on (x - mean) / std take x itself: `mean`, `std` [d] go into its two projections."""
    for linear in (model.encoder_hid_proj.image_embeds, model.add_embedding.image_proj):
        linear.bias -= linear.weight @ (mean / std)
        linear.weight /= std


def _stratified_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` timesteps spread evenly over 0..999, jittered and shuffled: less noise in the loss."""
    jitter = torch.rand(count, generator=generator)
    steps = ((torch.arange(count) + jitter) / count * 1000).long().clamp(max=999)
    return steps[torch.randperm(count, generator=generator)]


class _Workers:
    """Average gradients over the processes that train together; alone it does nothing."""

    def __init__(self, count: int) -> None:
        self.count = count

    def average(self, model: nn.Module) -> None:
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, elapsed: float) -> float:
        if self.count == 1:
            return elapsed
        shared = torch.tensor([elapsed], dtype=torch.float64)
        dist.all_reduce(shared)
        return float(shared.item() / self.count)


def _train(
    rank: int, workers: int, port: int, data: DecoderData, directory: Path, budget: Budget, settings: UnetSettings,
    seed: int, device: str, log_every: int,
) -> None:  # fmt: skip
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    team = _Workers(workers)
    on = torch.device(device)
    torch.manual_seed(seed)
    _, channels, size, _ = data.latents.shape
    model = build_unet(settings, channels, data.embeds.shape[1], size).to(on).train()
    mean, std = data.embeds.mean(0), data.embeds.std(0).clamp_min(1e-4)
    embeds, negative = ((data.embeds - mean) / std).to(on), ((data.negative - mean) / std).to(on)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.peak_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    ema = Ema(model, settings.ema_decay)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    run = Run(directory, "unet", budget, parts, save_every=120, agree=team.agree, leader=rank == 0)
    alphas = build_scheduler().alphas_cumprod
    mean_loss = 0.0
    for step in run.steps():
        generator = step_generator(seed + 7919 * (rank + 1), step)
        rows = torch.randint(len(embeds), (settings.batch,), generator=generator)
        clean = data.latents[rows].to(on, torch.float32)
        condition = embeds[rows.to(on)]
        wobble = torch.randn(condition.shape, generator=generator)
        wobble *= settings.noise * (torch.rand(len(rows), 1, generator=generator) < 0.5)
        dropped = torch.rand(len(rows), 1, generator=generator) < settings.dropped
        condition = torch.where(dropped.to(on), negative, condition + wobble.to(on))
        times = _stratified_times(len(rows), generator)
        noise = torch.randn(clean.shape, generator=generator).to(on)
        signal = alphas[times].sqrt()[:, None, None, None].to(on)
        rest = (1 - alphas[times]).sqrt()[:, None, None, None].to(on)
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress, settings.warmup_steps))
        with autocast(on):
            output = model(
                signal * clean + rest * noise, times.to(on), None, added_cond_kwargs={"image_embeds": condition}
            ).sample[:, :channels]
        loss = F.mse_loss(output.float(), signal * noise - rest * clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        team.average(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        mean_loss += (loss.item() - mean_loss) * max(0.01, 1 / (step + 1))
        if step % log_every == 0:
            run.log(loss=mean_loss, samples=float((step + 1) * settings.batch * workers))
    if workers > 1:
        dist.destroy_process_group()


def train_unet(
    data: DecoderData,
    directory: Path,
    budget: Budget,
    settings: UnetSettings | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 1,
    log_every: int = 100,
) -> UNet2DConditionModel:
    """Train with `workers` processes of one thread each; returns the averaged weights, taking raw embeddings."""
    settings = settings or UnetSettings()
    directory.mkdir(parents=True, exist_ok=True)
    arguments = (data, directory, budget, settings, seed, device, log_every)
    if workers == 1:
        _train(0, 1, 0, *arguments)
    else:
        for tensor in (data.latents, data.embeds, data.negative):
            tensor.share_memory_()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(_train, (workers, port, *arguments), nprocs=workers)
    return load_averaged(directory, data, settings)


def load_averaged(directory: Path, data: DecoderData, settings: UnetSettings | None = None) -> UNet2DConditionModel:
    """The averaged weights of a run, finished or not, with the embeddings' standardisation folded in."""
    settings = settings or UnetSettings()
    saved = torch.load(directory / "unet.ckpt", map_location="cpu", weights_only=True)
    _, channels, size, _ = data.latents.shape
    model = build_unet(settings, channels, data.embeds.shape[1], size)
    model.load_state_dict(saved["ema"])
    fold_standardisation(model, data.embeds.mean(0), data.embeds.std(0).clamp_min(1e-4))
    return model.eval()


@torch.no_grad()
def generate(
    unet: UNet2DConditionModel,
    embeds: torch.Tensor,
    negative: torch.Tensor,
    seeds: list[int],
    steps: int = 25,
    guidance: float = 2.0,
) -> torch.Tensor:
    """Latents [n, c, h, w] for embeds [n, d], each picture with its own noise: as KandinskyV22Pipeline does it.

    The loop is the pipeline's; it is here so that a batch can run under bf16 autocast in the evaluation.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    channels, size = unet.config.in_channels, unet.config.sample_size
    latents = torch.cat(
        [torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(unet.device)
    condition = torch.cat([negative.expand(len(embeds), -1), embeds]).to(unet.device)
    for time in scheduler.timesteps:
        with autocast(unet.device):
            output = unet(torch.cat([latents] * 2), time, None, added_cond_kwargs={"image_embeds": condition}).sample
        without, with_embeds = output[:, :channels].float().chunk(2)
        latents = scheduler.step(without + guidance * (with_embeds - without), time, latents).prev_sample
    return latents


class Latents(NamedTuple):
    """What a step of refining learns from: clean f32 [b, c, h, w], embeds f32 [b, d], cells f32 [b, h, w].

    `cells` is how much of each latent cell is a subject.
    """

    clean: torch.Tensor
    embeds: torch.Tensor
    cells: torch.Tensor


@dataclass(frozen=True)
class RefineUnet:
    """How a trained decoder is trained on.

    Attributes:
        subject: weight of the latent cells that hold a subject; the rest has 1.
        middle: share of timesteps drawn from `span`, where shapes are decided; the others are drawn from all.
        span: first and last of those timesteps.
        noise: standard deviation added to half of the embeddings, of each dimension's own.
    """

    batch: int = 48
    peak_rate: float = 6e-4
    warmup_steps: int = 100
    subject: float = 3.0
    middle: float = 0.8
    span: tuple[int, int] = (150, 750)
    dropped: float = 0.1
    noise: float = 0.15
    ema_decay: float = 0.999
    compiled: bool = False


def refine_unet(
    start: UNet2DConditionModel,
    draw: Callable[[int, torch.Generator], Latents],
    negative: torch.Tensor,
    spread: torch.Tensor,
    directory: Path,
    budget: Budget,
    settings: RefineUnet | None = None,
    seed: int = 0,
    device: str = "cpu",
    log_every: int = 100,
) -> UNet2DConditionModel:
    """Train a finished decoder, which takes raw embeddings, on; returns the averaged weights.

    `draw(size, generator)` gives a batch; negative [1, d]; `spread` [d] is the embeddings' standard deviation.
    """
    settings = settings or RefineUnet()
    on = torch.device(device)
    model = UNet2DConditionModel.from_config(start.config).to(on).eval()
    model.load_state_dict(start.state_dict())
    channels = model.config.in_channels
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.peak_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    ema = Ema(model, settings.ema_decay)
    run = Run(directory, "unet", budget, {"model": model, "optimizer": optimizer, "ema": ema}, save_every=180)
    alphas = build_scheduler().alphas_cumprod

    def predict(noisy: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(noisy, times, None, added_cond_kwargs={"image_embeds": condition}).sample
        return output[:, :channels]

    if settings.compiled:
        predict = torch.compile(predict, dynamic=False)
    low, high = settings.span
    for step in run.steps():
        generator = step_generator(seed, step)
        clean, embeds, cells = draw(settings.batch, generator)
        wobble = torch.randn(embeds.shape, generator=generator) * spread
        wobble *= settings.noise * (torch.rand(len(clean), 1, generator=generator) < 0.5)
        dropped = torch.rand(len(clean), 1, generator=generator) < settings.dropped
        condition = torch.where(dropped, negative, embeds + wobble)
        times = _stratified_times(len(clean), generator)
        inner = torch.rand(len(clean), generator=generator) < settings.middle
        times = torch.where(inner, low + times * (high - low) // 1000, times)
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas[times].sqrt()[:, None, None, None]
        rest = (1 - alphas[times]).sqrt()[:, None, None, None]
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress, settings.warmup_steps))
        with autocast(on):
            output = predict((signal * clean + rest * noise).to(on), times.to(on), condition.to(on))
        error = (output.float() - (signal * noise - rest * clean).to(on)).square().mean(1)
        shown = cells.to(on) > _SHOWN
        weight = 1 + (settings.subject - 1) * shown
        loss = (weight * error).mean() / weight.float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        if step % log_every == 0:
            run.log(loss=loss.item(), subject=error[shown].mean().item(), samples=float((step + 1) * settings.batch))
    refined = UNet2DConditionModel.from_config(start.config)
    refined.load_state_dict({name: value.cpu() for name, value in ema.weights.items()})
    return refined.eval()


@torch.no_grad()
def draw_from(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    embeds: torch.Tensor,
    negative: torch.Tensor,
    time: int,
    seed: int,
    steps: int = 6,
    guidance: float = 2.0,
) -> torch.Tensor:
    """Noise clean latents [n, c, h, w] as of timestep `time`, and draw on from there in `steps` steps of DDIM.

    So what the latents should show is known, and they have the faults of drawn ones.
    """
    alphas = build_scheduler().alphas_cumprod
    channels = unet.config.in_channels
    condition = torch.cat([negative.expand(len(embeds), -1), embeds])
    times = [int(at) for at in torch.linspace(time, 0, steps + 1).round()]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    now: torch.Tensor = alphas[time].sqrt() * latents + (1 - alphas[time]).sqrt() * noise
    for at, following in pairwise(times):
        with autocast(unet.device):
            output = unet(torch.cat([now] * 2), at, None, added_cond_kwargs={"image_embeds": condition}).sample
        without, with_embeds = output[:, :channels].float().chunk(2)
        v = without + guidance * (with_embeds - without)
        signal, rest = alphas[at].sqrt(), (1 - alphas[at]).sqrt()
        clean, noise = signal * now - rest * v, rest * now + signal * v
        left = alphas[following] if following else torch.ones(())
        now = left.sqrt() * clean + (1 - left).sqrt() * noise
    return now


def split_seeds(seed: int, count: int) -> list[int]:
    """A noise seed for each of `count` pictures."""
    return [int(drawn) for drawn in np.random.default_rng(seed).integers(0, 2**31, count)]

"""Budgets, resuming, and the folding of normalisations into weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faceteer_postcards.clip import value_gram
from faceteer_postcards.movq import MovqSettings, build_movq, normalise_latents
from faceteer_postcards.training import Run, learning_rate
from faceteer_postcards.unet import (
    DecoderData,
    UnetSettings,
    build_scheduler,
    build_unet,
    fold_standardisation,
    generate,
    train_unet,
)
from faceteer_postcards.world import FACTORS
from faceteer_trainer.budget import Budget

TINY_UNET = UnetSettings(channels=(32, 32), cross_attention_dim=32, batch=4, warmup_steps=2)


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Run.steps
    monkeypatch.setattr(Run, "steps", lambda self, stop_after=None: original(self, step))


def test_a_budget_is_either_steps_or_minutes() -> None:
    with pytest.raises(ValueError, match="either steps or minutes"):
        Budget()
    assert Budget(steps=4).progress(1, elapsed=1e9) == 0.25
    assert Budget(minutes=2).progress(10**9, elapsed=30) == 0.25


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate(1.0, 0, 0.0, warmup_steps=10) == pytest.approx(0.1)
    assert learning_rate(1.0, 50, 0.5, warmup_steps=10) == pytest.approx(0.5)
    assert learning_rate(1.0, 99, 1.0, warmup_steps=10) == pytest.approx(0.0)


def test_a_decoder_run_that_was_killed_and_resumed_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    data = DecoderData(torch.randn(40, 4, 8, 8).half(), torch.randn(40, 16), torch.randn(1, 16))
    whole = train_unet(data, tmp_path / "whole", Budget(steps=5), TINY_UNET)
    with monkeypatch.context() as context:
        killed_after(context, 2)
        train_unet(data, tmp_path / "cut", Budget(steps=5), TINY_UNET)
    resumed = train_unet(data, tmp_path / "cut", Budget(steps=5), TINY_UNET)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_normalised_latents_are_the_old_ones_scaled_and_decode_to_the_same_pictures() -> None:
    torch.manual_seed(1)
    settings = MovqSettings(channels=(32, 32), latent_channels=4)
    model, folded = build_movq(settings).eval(), build_movq(settings).eval()
    folded.load_state_dict(model.state_dict())
    mean, std = torch.tensor([0.3, -1.0, 0.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 0.1])
    normalise_latents(folded, mean, std)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        old, new = model.encode(images).latents, folded.encode(images).latents
        torch.testing.assert_close(new, (old - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            folded.decode(new, force_not_quantize=True).sample,
            model.decode(old, force_not_quantize=True).sample, rtol=1e-3, atol=1e-4,
        )  # fmt: skip


def test_a_folded_decoder_takes_raw_embeddings() -> None:
    torch.manual_seed(2)
    model, folded = (build_unet(TINY_UNET, 4, 16, 8).eval() for _ in range(2))
    folded.load_state_dict(model.state_dict())
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    fold_standardisation(folded, mean, std)
    x, noise, time = torch.randn(2, 16), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        one = model(noise, time, None, added_cond_kwargs={"image_embeds": (x - mean) / std}).sample
        two = folded(noise, time, None, added_cond_kwargs={"image_embeds": x}).sample
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    torch.manual_seed(3)
    model = build_unet(TINY_UNET, 4, 16, 8).eval()
    embeds, negative = torch.randn(3, 16), torch.zeros(1, 16)
    together = generate(model, embeds, negative, [1, 2, 3], steps=2)
    alone = generate(model, embeds[1:2], negative, [2], steps=2)
    torch.testing.assert_close(together[1:2], alone, rtol=0.05, atol=0.05)  # bfloat16


def test_the_first_sampling_step_starts_from_pure_noise() -> None:
    scheduler = build_scheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_wanted_geometry_is_a_simplex_for_each_factor_and_orthogonal_between() -> None:
    gram = value_gram(7.0)
    sides = gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram
    first, second = (len(values) for values in list(FACTORS.values())[:2])
    assert sides[0, 1] == pytest.approx(sides[-1, -2].item())
    torch.testing.assert_close(gram[:first, :first].sum(0), torch.zeros(first), atol=1e-5, rtol=0)
    assert (gram[:first, first : first + second] == 0).all()
    rows = torch.tensor([0, first])
    starts = [0]
    for values in FACTORS.values():
        starts.append(starts[-1] + len(values))
    rows = torch.tensor(starts[:-1])
    assert gram[rows][:, rows].sum().sqrt() == pytest.approx(7.0, abs=1e-4)

"""Training a generator on: what weighs, what is held, and the job from a bundle to a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_postcards.movq import Batch, MovqSettings, RefineMovq, build_movq, refine_movq, subject_loss, to_tensor
from faceteer_postcards.refine import fresh_pictures
from faceteer_postcards.render import render, render_with_mask
from faceteer_postcards.unet import Latents, RefineUnet, UnetSettings, build_unet, draw_from, refine_unet
from faceteer_postcards.world import Scene
from faceteer_trainer.budget import Budget

SCENE = Scene("day", "grass", "house", "red", "one", "clear", "none", "plain", 7)


def test_the_mask_covers_what_the_subjects_colour_changes_and_nothing_else() -> None:
    picture, mask = render_with_mask(SCENE)
    other = render(Scene("day", "grass", "house", "blue", "one", "clear", "none", "plain", 7))
    changed = (picture != other).any(-1)
    assert mask[changed].min() > 0
    assert 0.02 < (mask > 0.5).mean() < 0.5
    np.testing.assert_array_equal(picture, render(SCENE))


def test_a_border_hides_the_subject_from_its_mask() -> None:
    framed = Scene("day", "grass", "tree", "red", "three", "clear", "black", "plain", 7)
    mask = render_with_mask(framed)[1]
    assert mask[0].max() == mask[-1].max() == mask[:, 0].max() == 0


def test_fresh_pictures_are_the_same_for_the_same_place_in_the_corpus() -> None:
    one, two = fresh_pictures(3, 10, 4), fresh_pictures(3, 10, 4)
    np.testing.assert_array_equal(one[0], two[0])
    assert (fresh_pictures(3, 14, 4)[0] != one[0]).any()


def test_an_error_on_a_subject_costs_more_than_the_same_elsewhere() -> None:
    target, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 4:8] = 1
    on, off = target.clone(), target.clone()
    on[..., 5, 5] = off[..., 12, 12] = 1
    costs = [subject_loss(output, target, mask, 4.0, 0.25) for output in (on, off)]
    assert costs[0] == pytest.approx(4 * costs[1].item(), rel=1e-5)
    even = [subject_loss(output, target, mask, 1.0, 0.25) for output in (on, off)]
    assert even[0] == pytest.approx(even[1].item(), rel=1e-5)


def _pictures(step: int, size: int) -> Batch:
    pictures, masks = fresh_pictures(5, step * size, size)
    return Batch(pictures[:, :32, :32], masks[:, :32, :32])


def test_a_refined_autoencoder_keeps_its_latents_where_only_the_decoding_half_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = build_movq(MovqSettings(channels=(32, 32), latent_channels=4)).eval()
    images = to_tensor(_pictures(0, 2).pictures)
    before = start.encode(images).latents.detach()

    def with_drawn(step: int, size: int) -> Batch:
        return Batch(*_pictures(step, size)[:2], torch.randn(1, *before.shape[1:]))

    settings = RefineMovq(batch=2, encoder=False)
    refined = refine_movq(start, with_drawn, tmp_path, Budget(steps=3), settings)
    assert (tmp_path / "decoder.ckpt").exists()
    torch.testing.assert_close(refined.encode(images).latents, before)
    assert not torch.equal(refined.decoder.conv_out.weight, start.decoder.conv_out.weight)
    both = refine_movq(start, _pictures, tmp_path, Budget(steps=3), RefineMovq(batch=2))
    assert not torch.equal(both.encode(images).latents, before)


def test_a_refined_unet_moves_and_is_weighed_by_subject_cells(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = build_unet(UnetSettings(channels=(32, 32), cross_attention_dim=32), 4, 16, 8).eval()

    def draw(size: int, generator: torch.Generator) -> Latents:
        cells = torch.zeros(size, 8, 8)
        cells[:, 2:4] = 1
        return Latents(
            torch.randn(size, 4, 8, 8, generator=generator), torch.randn(size, 16, generator=generator), cells
        )

    found = {
        subject: refine_unet(
            start, draw, torch.zeros(1, 16), torch.ones(16), tmp_path / str(subject), Budget(steps=2),
            RefineUnet(batch=4, warmup_steps=1, subject=subject),
        )
        for subject in (1.0, 3.0)
    }  # fmt: skip
    weights = [model.conv_in.weight for model in (start, *found.values())]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_drawing_on_from_hardly_any_noise_gives_the_latents_back_and_from_much_it_does_not() -> None:
    torch.manual_seed(0)
    unet = build_unet(UnetSettings(channels=(32, 32), cross_attention_dim=32), 4, 16, 8).eval()
    latents, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    moved = [
        (draw_from(unet, latents, embeds, torch.zeros(1, 16), time, 0, steps=2) - latents).square().mean()
        for time in (5, 700)
    ]
    assert moved[0] < 0.05 < moved[1]

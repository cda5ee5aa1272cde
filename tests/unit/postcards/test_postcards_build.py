"""The whole chain with a trial's settings: from nothing to a bundle that the real classes load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import KandinskyV22Pipeline
from faceteer_postcards.__main__ import main
from faceteer_postcards.bundle import load_bundle
from faceteer_postcards.evaluation.run import EvaluationSettings, evaluate
from faceteer_postcards.movq import RefineMovq
from faceteer_postcards.refine import Plan, Refinement
from faceteer_postcards.unet import RefineUnet
from faceteer_runtime.bundle import verify
from faceteer_trainer.budget import Budget
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trial")
    main(["build", "--preset", "trial", "--workers", "1",
          "--work", str(directory / "work"), "--out", str(directory / "bundle")])  # fmt: skip
    return directory / "bundle"


def test_the_bundle_is_sealed_and_whole(trial: Path) -> None:
    bundle = verify(trial)
    assert bundle.name == "postcards"
    assert set(bundle.parts) == {"encoder", "sae", "generator", "library"}
    assert bundle.part("generator").facts["sizes"] == [[64, 64]]


def test_the_encoder_loads_in_open_clip(trial: Path) -> None:
    config = json.loads((trial / "encoder" / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(trial / "encoder" / "open_clip_model.safetensors"))
    tokenizer = SimpleTokenizer(str(trial / "encoder" / "bpe_simple_vocab.txt.gz"), context_length=32)
    with torch.no_grad():
        assert model.eval().encode_text(tokenizer(["a red boat at night"])).shape == (1, 32)


def test_the_generator_paints_in_diffusers_own_pipeline(trial: Path) -> None:
    pipeline = KandinskyV22Pipeline.from_pretrained(trial / "generator", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    negative = load_file(trial / "generator" / "negative_embeds.safetensors")["negative_image_embeds"]
    images = pipeline(
        image_embeds=torch.randn(1, 32), negative_image_embeds=negative, height=64, width=64,
        num_inference_steps=2, guidance_scale=2.0, output_type="np", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (1, 64, 64, 3)


def test_negative_embeds_are_those_of_a_grey_picture(trial: Path) -> None:
    loaded = load_bundle(trial)
    with torch.no_grad():
        grey = loaded.encoder.encode_image(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(loaded.negative, grey, rtol=1e-2, atol=1e-2)


def test_the_sae_is_in_saelens_format_with_statistics(trial: Path) -> None:
    card = json.loads((trial / "sae" / "cfg.json").read_text())
    assert card["architecture"] == "batchtopk"
    assert set(card["metadata"]["embedding_statistics"]) == {"norm", "l0"}
    weights = load_file(trial / "sae" / "sae_weights.safetensors")
    assert weights["W_enc"].shape == (card["d_in"], card["d_sae"])
    np.testing.assert_allclose(weights["W_dec"].float().norm(dim=-1).numpy(), 1.0, atol=2e-3)
    statistics = load_file(trial / "sae" / "feature_statistics.safetensors")
    assert statistics["rivals_offsets"].shape == (card["d_sae"] + 1,)
    assert statistics["rivals_offsets"][-1] == len(statistics["rivals_indices"])


def test_refining_gives_a_sealed_bundle_with_another_generator_and_the_same_encoder(
    trial: Path, tmp_path: Path
) -> None:
    quick = {step: Budget(steps=2) for step in ("movq", "unet", "decoder")}
    plan = Plan(quick, scenes=70, drawn=40, movq=RefineMovq(batch=2), unet=RefineUnet(batch=4))
    refinement = Refinement(trial, tmp_path / "work", plan)
    for step in (refinement.movq, refinement.unet, refinement.decoder):
        step()
    before, after = verify(trial), verify(refinement.write(tmp_path / "refined"))
    assert before.part("generator").revision != after.part("generator").revision
    assert before.part("encoder").revision == after.part("encoder").revision
    with pytest.raises(SystemExit):
        main(["refine", "--bundle", str(trial), "--work", str(tmp_path / "work"), "--out", str(trial)])


def test_the_evaluation_measures_a_bundle_and_writes_its_report(trial: Path, tmp_path: Path) -> None:
    few = EvaluationSettings(
        judge_pictures=32, judge_steps=2, train_pictures=200, test_pictures=100, pool=40, per_value=1,
        per_value_control=1, per_value_sweep=1, sweep=(0.5,), transfers=8, stacks=4, steps=2, workers=0,
    )  # fmt: skip
    results = evaluate(trial, tmp_path, few)
    assert set(results) >= {"judge", "encoder", "sae", "decoder", "steering"}
    assert json.loads(json.dumps(results)) == results
    report = (trial / "REPORT.md").read_text()
    assert "## Against the targets" in report
    assert "colour: red" in report
    assert "**missed**" in report  # an untrained bundle must not look good
    with Image.open(trial / "grid.png") as grid:
        assert grid.width > 11 * 128

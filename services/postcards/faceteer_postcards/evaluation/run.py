"""The whole evaluation of a bundle: draw fresh pictures, train the judge, measure, write the report and the grid."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_trainer.budget import Budget

from faceteer_postcards.bundle import LoadedBundle, load_bundle
from faceteer_postcards.clip import embed_pictures
from faceteer_postcards.corpus import Corpus, draw_corpus
from faceteer_postcards.evaluation.judge import Judge, accuracy_by_factor, judge_pictures, train_judge
from faceteer_postcards.evaluation.metrics import Share, share_of
from faceteer_postcards.evaluation.painter import Painter
from faceteer_postcards.evaluation.report import draw_grid, targets, write_report
from faceteer_postcards.evaluation.representation import (
    Embedded,
    ValueFeature,
    best_features,
    features_by_label,
    measure_encoder,
    measure_sae,
)
from faceteer_postcards.evaluation.steering import Steering, Trial
from faceteer_postcards.unet import split_seeds
from faceteer_postcards.world import FACTOR_NAMES

JUDGE_SEED, TRAIN_SEED, TEST_SEED = 103, 104, 105  # of corpora that no model of the bundle was trained on


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is drawn and painted; the defaults are those of the published report."""

    judge_pictures: int = 24_000
    judge_steps: int = 900
    train_pictures: int = 10_000
    test_pictures: int = 4_000
    pool: int = 400  # pictures that are edited; enough that each of eight subjects is shown by thirty
    per_value: int = 30  # of them, edited towards each factor value
    per_value_control: int = 30  # for the wrong sign and for ablation
    per_value_sweep: int = 30  # at each other strength
    sweep: tuple[float, ...] = (0.25, 0.5, 2.0)
    transfers: int = 96
    stacks: int = 48
    steps: int = 8
    workers: int = 2


def _embed(bundle: LoadedBundle, corpus: Corpus) -> Embedded:
    return Embedded(np.asarray(corpus.pictures), embed_pictures(bundle.encoder, corpus.pictures), corpus.codes)


def _prepare_judge(runs: Path, settings: EvaluationSettings) -> Judge:
    corpus = draw_corpus(runs / "judge-corpus", settings.judge_pictures, JUDGE_SEED, max(settings.workers, 1))
    return train_judge(corpus, runs, Budget(steps=settings.judge_steps))


def _by_arm(trials: dict[str, Trial]) -> dict[str, Any]:
    reached, kept = Share(0, 0), Share(0, 0)
    values = {}
    for name, trial in trials.items():
        reached, kept = reached + trial.reached, kept + trial.kept
        values[name] = {"reached": trial.reached.as_dict(), "kept": trial.kept.as_dict()}
    return {"reached": reached.as_dict(), "kept": kept.as_dict(), "values": values}


def _selective(trials: dict[str, Trial], best: list[ValueFeature]) -> dict[str, float]:
    """The share reached over values whose best feature has an AUC of 0.95 or more."""
    total = Share(0, 0)
    for value in best:
        if value.auc >= 0.95:
            total += trials[value.name].reached
    return total.as_dict()


def measure_decoder(
    bundle: LoadedBundle, judge: Judge, painter: Painter, pool: Embedded, ceiling: dict[str, float], steering: Steering
) -> dict[str, Any]:
    """Factors of held-out pictures that survive encoding and painting, beside what the judge sees in the renders."""
    rebuilt = bundle.sae.decode(bundle.sae.encode(pool.embeds)).detach()
    through_sae = judge_pictures(judge, painter(rebuilt, steering.seeds))
    direct = accuracy_by_factor(steering.before, pool.codes)
    return {
        "factors": direct,
        "of_ceiling": {name: direct[name] / ceiling[name] for name in FACTOR_NAMES},
        "of_ceiling_mean": float(np.mean([direct[name] / ceiling[name] for name in FACTOR_NAMES])),
        "of_ceiling_worst": min(direct[name] / ceiling[name] for name in FACTOR_NAMES),
        "through_sae": accuracy_by_factor(through_sae, pool.codes),
        "all": share_of(steering.before == pool.codes).as_dict(),
        "pictures": len(pool.codes),
    }


def measure_steering(steering: Steering, settings: EvaluationSettings) -> dict[str, Any]:
    """Every arm, the sweep, transfer and stacking."""
    results: dict[str, Any] = {"new_noise": steering.new_noise_keeps(), "arms": {}, "sweep": {}}
    for arm in ("switch", "set", "means", "wrong_sign", "random", "ablate"):
        few = arm in ("wrong_sign", "ablate")
        trials = steering.run_arm(arm, settings.per_value_control if few else settings.per_value)
        print(f"steering: {arm} done", flush=True)
        results["arms"][arm] = _by_arm(trials)
        results["arms"][arm]["reached_where_auc_95"] = _selective(trials, steering.best)
        if arm == "switch":
            by_value = {name: Trial(t.factor, t.code, t.unedited, t.unedited) for name, t in trials.items()}
            results["arms"]["unedited"] = _by_arm(by_value)
            results["arms"]["unedited"]["reached_where_auc_95"] = _selective(by_value, steering.best)
    results["by_label"] = {"arms": {}, "features": {value.name: value.feature for value in steering.by_label}}
    for arm in ("switch", "set", "ablate"):
        few = arm == "ablate"
        trials = steering.run_arm(arm, settings.per_value_control if few else settings.per_value, by_label=True)
        print(f"steering by label: {arm} done", flush=True)
        results["by_label"]["arms"][arm] = _by_arm(trials)
    results["by_label"]["stacking"] = {
        str(edits): steering.stack(edits, settings.stacks, by_label=True) for edits in (2, 4, 8)
    }
    ablate = results["by_label"]["arms"].pop("ablate")
    results["by_label"]["ablate"] = {"still_shown": ablate["reached"], "kept": ablate["kept"]}
    # an ablated value counts as reached when it is gone
    ablate = results["arms"].pop("ablate")
    results["ablate"] = {
        "still_shown": ablate["reached"], "kept": ablate["kept"],
        "values": {name: entry["reached"] for name, entry in ablate["values"].items()},
    }  # fmt: skip
    for scaled in settings.sweep:
        arms = {arm: _by_arm(steering.run_arm(arm, settings.per_value_sweep, scaled)) for arm in ("set", "switch")}
        results["sweep"][str(scaled)] = {arm: {k: found[k] for k in ("reached", "kept")} for arm, found in arms.items()}
    results["transfer"] = {
        str(factors): {
            condition: steering.carry_over(settings.transfers, factors, shared=condition == "shared")
            for condition in ("shared", "free")
        }
        for factors in (1, 3)
    }
    results["stacking"] = {str(edits): steering.stack(edits, settings.stacks) for edits in (2, 4, 8)}
    return results


def time_one_picture(bundle: LoadedBundle, embeds: torch.Tensor) -> dict[str, float]:
    """Seconds for one picture as a user would have it: float32, the bundle's steps and guidance, best of five."""
    # It brings transformers, which nothing else here needs.
    from diffusers import KandinskyV22Pipeline

    pipeline = KandinskyV22Pipeline(unet=bundle.unet, scheduler=bundle.scheduler, movq=bundle.movq)
    pipeline.set_progress_bar_config(disable=True)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        pipeline(
            image_embeds=embeds[:1], negative_image_embeds=bundle.negative, height=64, width=64,
            num_inference_steps=bundle.steps, guidance_scale=bundle.guidance,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        times.append(time.perf_counter() - started)
    return {"seconds": min(times), "threads": float(torch.get_num_threads()), "steps": float(bundle.steps)}


def evaluate(directory: Path, runs: Path | None = None, settings: EvaluationSettings | None = None) -> dict[str, Any]:
    """Measure the bundle in `directory`; write its REPORT.md and grid.png; return every figure."""
    settings = settings or EvaluationSettings()
    if runs is None:
        with tempfile.TemporaryDirectory() as temporary:
            return evaluate(directory, Path(temporary), settings)
    started = time.monotonic()
    bundle = load_bundle(directory)
    judge = _prepare_judge(runs, settings)
    train = _embed(bundle, draw_corpus(runs / "train", settings.train_pictures, TRAIN_SEED, max(settings.workers, 1)))
    test = _embed(bundle, draw_corpus(runs / "test", settings.test_pictures, TEST_SEED, max(settings.workers, 1)))
    judged = judge_pictures(judge, test.pictures)
    ceiling = accuracy_by_factor(judged, test.codes)
    print("the judge on held-out renders:", json.dumps(ceiling), flush=True)
    results: dict[str, Any] = {"judge": ceiling, "judge_pictures": len(test.codes), "steps": settings.steps,
                               "guidance": bundle.guidance}  # fmt: skip
    results["encoder"] = measure_encoder(bundle, train, test)
    results["sae"] = measure_sae(bundle, judge, train, test)
    best = best_features(bundle, train, test)
    pool = test.rows(0, settings.pool)
    with Painter(directory, settings.steps, settings.workers) as painter:
        steering = Steering(bundle, judge, painter, pool, train, best, features_by_label(directory, best))
        results["decoder"] = measure_decoder(bundle, judge, painter, pool, ceiling, steering)
        results["steps_check"] = _check_steps(directory, judge, pool, settings, bundle.steps)
        results["steering"] = measure_steering(steering, settings)
        draw_grid(bundle, steering, painter, directory / "grid.png")
    results["one_picture"] = time_one_picture(bundle, pool.embeds)
    results["minutes"] = (time.monotonic() - started) / 60
    write_report(results, directory / "REPORT.md")
    return results


def _check_steps(
    directory: Path, judge: Judge, pool: Embedded, settings: EvaluationSettings, steps: int
) -> dict[str, Any]:
    """Factors kept with the bundle's own number of steps, beside the fewer that this evaluation paints with."""
    few = min(64, len(pool.codes))
    seeds = split_seeds(5, few)
    shares = {}
    for number in (settings.steps, steps):
        with Painter(directory, number, settings.workers) as painter:
            judged = judge_pictures(judge, painter(pool.embeds[:few], seeds))
        shares[str(number)] = share_of(judged == pool.codes[:few]).as_dict()
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the judge and the corpora are kept; else they are temporary")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the table of targets or everything."""
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    results = evaluate(arguments.bundle, arguments.work, EvaluationSettings(workers=arguments.workers))
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        for measure, target, figure, reached in targets(results):
            print(f"{'ok  ' if reached else 'MISS'} {measure}: {figure} (target {target})")

"""The evaluation's figures as Markdown, beside the targets; and a grid of pictures before and after edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from faceteer_postcards.bundle import LoadedBundle
from faceteer_postcards.evaluation.editing import Edit, apply_edits
from faceteer_postcards.evaluation.painter import Painter
from faceteer_postcards.evaluation.representation import NOWHERE
from faceteer_postcards.evaluation.steering import Steering
from faceteer_postcards.words import WORDS
from faceteer_postcards.world import FACTOR_NAMES, FACTORS

SHOWN = ("time=night", "weather=snowfall", "colour=red", "count=three", "subject=boat", "ground=water",
         "style=outlined", "border=white")  # fmt: skip
_ZOOM, _GAP, _HEAD = 2, 6, 16


def percent(share: float) -> str:
    """0.951 -> 95.1."""
    return f"{100 * share:.1f}"


def interval(entry: dict[str, float]) -> str:
    """A share with its Wilson interval."""
    return f"{percent(entry['share'])} ({percent(entry['low'])}–{percent(entry['high'])})"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def targets(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was to be reached: (measure, target, figure, whether it is reached)."""
    encoder, sae, decoder, steering = (results[key] for key in ("encoder", "sae", "decoder", "steering"))
    switch, noise = steering["by_label"]["arms"]["switch"], steering["new_noise"]["all"]["share"]
    by_index = steering["arms"]["switch"]["reached_where_auc_95"]["share"]
    eight = steering["by_label"]["stacking"]["8"]["all_reached"]["share"]
    random = steering["arms"]["random"]["reached"]["share"]
    lost = noise - switch["kept"]["share"]
    return [
        ("CLIP zero-shot, mean over factors", ">= 92 %", percent(encoder["zero_shot_mean"]),
         encoder["zero_shot_mean"] >= 0.92),
        ("CLIP zero-shot, worst factor", ">= 85 %", percent(encoder["zero_shot_worst"]),
         encoder["zero_shot_worst"] >= 0.85),
        ("SAE explained variance at its L0", ">= 0.97 at <= 16",
         f"{sae['explained_variance']:.4f} at {sae['l0_mean']:.1f}",
         sae["explained_variance"] >= 0.97 and sae["l0_mean"] <= 16),
        ("SAE dead latents", "< 5 %", percent(sae["dead_share"]), sae["dead_share"] < 0.05),
        ("factor values with a feature of AUC >= 0.95", ">= 80 %", percent(sae["values_with_auc_95"]),
         sae["values_with_auc_95"] >= 0.8),
        ("decoder: factors kept, of the judge's ceiling, mean", ">= 90 %", percent(decoder["of_ceiling_mean"]),
         decoder["of_ceiling_mean"] >= 0.9),
        ("decoder: the worst factor", ">= 75 %", percent(decoder["of_ceiling_worst"]),
         decoder["of_ceiling_worst"] >= 0.75),
        ("switch by label: target reached", ">= 99.5 %", percent(switch["reached"]["share"]),
         switch["reached"]["share"] >= 0.995),
        ("eight switches at once by label: all targets reached", ">= 97 %", percent(eight), eight >= 0.97),
        ("switch by index, features of AUC >= 0.95: target reached", ">= 95 %", percent(by_index), by_index >= 0.95),
        ("switch by label: other factors kept, below a new noise seed", "<= 5 points",
         f"{100 * lost:.1f}", lost <= 0.05),
        ("random feature of equal norm: target reached", "< 10 %", percent(random), random < 0.1),
        ("one picture, float32", "< 1 s", f"{results['one_picture']['seconds']:.2f}",
         results["one_picture"]["seconds"] < 1),
    ]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in rows), ""]


def _arms(steering: dict[str, Any]) -> list[str]:
    names = {
        "switch": "switch: set to 1.0, rivals off", "set": "set to 1.0",
        "means": "difference of class means (uses truth)",
        "unedited": "control: unedited", "wrong_sign": "control: set to −1.0",
        "random": "control: random feature, equal norm",
    }  # fmt: skip
    by_label = steering["by_label"]["arms"]
    rows = [
        [text, *(interval(by_label[arm][what]) if arm in by_label else "–" for what in ("reached", "kept")),
         interval(steering["arms"][arm]["reached"]), interval(steering["arms"][arm]["kept"])]
        for arm, text in names.items()
    ]  # fmt: skip
    return _table(["edit", "by label: reached %", "others kept %", "by index: reached %", "others kept %"], rows)


def _values(results: dict[str, Any]) -> list[str]:
    steering, values = results["steering"], results["sae"]["values"]
    arms = ("switch", "set", "means", "random")
    rows = []
    for name, entry in values.items():
        factor, value = name.split("=")
        led = steering["by_label"]["features"][name]
        row = [name.replace("=", ": "), WORDS[factor, value][0], "–" if led == NOWHERE else str(led)]
        row.append(percent(steering["by_label"]["arms"]["switch"]["values"][name]["reached"]["share"]))
        row += [str(entry["feature"]), f"{entry['auc']:.3f}"]
        row += [percent(steering["arms"][arm]["values"][name]["reached"]["share"]) for arm in arms]
        row.append(percent(steering["arms"]["switch"]["values"][name]["kept"]["share"]))
        row.append(percent(steering["ablate"]["values"][name]["share"]))
        rows.append(row)
    return _table(["value", "word", "leads to", "switch by label %", "by index", "AUC", "switch %",
                   "set %", "means %", "random %", "kept by switch %",
                   "still shown when ablated %"], rows)  # fmt: skip


def write_report(results: dict[str, Any], path: Path) -> None:
    """REPORT.md: targets first, then every measure."""
    encoder, sae, decoder, steering = (results[key] for key in ("encoder", "sae", "decoder", "steering"))
    lines = [
        "# Postcards: how well it steers", "",
        "Written by `python -m faceteer_postcards evaluate --bundle DIR`. Pictures are judged by a classifier that was",
        "trained on renders only, never on CLIP, the SAE or a generated picture. Intervals are Wilson's at 95 %.",
        f"Painted with {results['steps']} steps, guidance {results['guidance']}; with "
        + " and ".join(f"{n} steps the factors kept are {interval(s)} %" for n, s in results["steps_check"].items())
        + ".",
        "", "## Against the targets", "",
        *_table(["measure", "target", "figure", ""], [[m, t, f, _verdict(ok)] for m, t, f, ok in targets(results)]),
        f"## By factor ({encoder['pictures']} held-out renders; decoder: {decoder['pictures']} pictures)", "",
        *_table(
            ["factor", "judge on renders %", "zero-shot %", "linear probe %", "decoder keeps %", "of the ceiling %",
             "through the SAE %", "a new noise seed keeps %"],
            [[name, *(percent(v) for v in (
                results["judge"][name], encoder["zero_shot"][name], encoder["linear_probe"][name],
                decoder["factors"][name], decoder["of_ceiling"][name], decoder["through_sae"][name],
                steering["new_noise"]["by_factor"][name]["share"]))] for name in FACTOR_NAMES],
        ),
        "## The SAE", "",
        f"{sae['d_sae']} features over {sae['d_in']} dimensions. Explained variance {sae['explained_variance']:.4f}, "
        f"cosine {sae['cosine']:.4f}, L0 {sae['l0_mean']:.2f} (1 %, median, 99 %: "
        + ", ".join(f"{v:.0f}" for v in sae["l0_quantiles"].values())
        + f"). Dead: {percent(sae['dead_share'])} % over {sae['dead_window']} fresh pictures, "
        f"{percent(sae['dead_share_statistics'])} % over the larger corpus of the bundle's own statistics. "
        "Monosemanticity "
        f"{sae['monosemanticity_mean']:.3f}, of the same activations on shuffled pictures "
        f"{sae['monosemanticity_random']:.3f} (similarity by the judge's features).", "",
        "## Steering", "",
        "Pictures that lack a value; a feature is turned on; same noise seed before and after. *By label*: the feature",
        "that the value's word leads to, by the library's own resolver, as people edit. *By index*: the one that tells",
        "the value best by the truth, which no user knows. Kept: of the other seven factors, those judged as before.",
        "A new noise seed alone keeps",
        f"{interval(steering['new_noise']['all'])} %.",
        "", *_arms(steering),
        "Strength (SCALED: 1.0 is the feature's own 99th percentile where it fires):", "",
        *_table(["strength (by index)", "set: reached %", "set: kept %", "switch: reached %", "switch: kept %"], [
            [scaled, *(percent(arms[arm][what]["share"]) for arm in ("set", "switch") for what in ("reached", "kept"))]
            for scaled, arms in steering["sweep"].items()
        ]),
        "Ablating a value's feature where it is shown: still shown in "
        f"{interval(steering['by_label']['ablate']['still_shown'])} % by label, "
        f"{interval(steering['ablate']['still_shown'])} % by index (nothing takes its place, so the decoder chooses), "
        f"other factors kept {interval(steering['by_label']['ablate']['kept'])} % by label.", "",
        "Transfer: B differs from A in one factor, or in three; what leads from A to B is carried onto C, which lacks",
        "B's values of them, by `transfer` with its default coverage. C shares A's values of these factors, or has any",
        "but B's, which must then give way. Other factors kept: as judged before.", "",
        *_table(["factors", "C", "reached %", "all at once %", "other factors kept %"], [
            [factors, {"shared": "shares A's values", "free": "has its own"}[condition], interval(entry["reached"]),
             interval(entry["all_reached"]), interval(entry["kept"])]
            for factors, conditions in steering["transfer"].items() for condition, entry in conditions.items()
        ]),
        *_table(["stacked switches", "by label: targets reached %", "all at once %", "other factors kept %",
                 "by index: targets reached %", "all at once %"], [
            [edits, interval(entry["reached"]), interval(entry["all_reached"]),
             interval(entry["kept"]) if entry["kept"]["count"] else "none left",
             interval(steering["stacking"][edits]["reached"]), interval(steering["stacking"][edits]["all_reached"])]
            for edits, entry in steering["by_label"]["stacking"].items()
        ]),
        "## By value", "", *_values(results),
        f"One picture, {results['one_picture']['steps']:.0f} steps with guidance, float32, "
        f"{results['one_picture']['threads']:.0f} thread(s): {results['one_picture']['seconds']:.2f} s. "
        f"This evaluation took {results['minutes']:.1f} minutes.",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def sheet(columns: list[tuple[str, npt.NDArray[np.uint8]]], zoom: int = _ZOOM) -> Image.Image:
    """Columns of pictures [n, 64, 64, 3] under their headings, each pixel drawn `zoom` wide."""
    count, size = len(columns[0][1]), columns[0][1].shape[1] * zoom
    width, height = len(columns) * (size + _GAP) + _GAP, _HEAD + count * (size + _GAP) + _GAP
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for column, (heading, pictures) in enumerate(columns):
        left = _GAP + column * (size + _GAP)
        draw.text((left + 2, 3), heading, fill=(40, 40, 40))
        for row, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            image.paste(large, (left, _HEAD + row * (size + _GAP)))
    return image


def draw_grid(bundle: LoadedBundle, steering: Steering, painter: Painter, path: Path, rows: int = 6) -> None:
    """Six held-out pictures down; across: the render, unedited, one switch a column, and a random feature."""
    features = {value.name: value.feature for value in steering.best}
    plain = (steering.pool.codes[:, FACTOR_NAMES.index("weather")] != FACTORS["weather"].index("fog")) & (
        steering.pool.codes[:, FACTOR_NAMES.index("style")] == 0
    )
    chosen = np.flatnonzero(plain)[:rows]
    if len(chosen) < rows:
        chosen = np.arange(min(rows, len(plain)))
    embeds, seeds = steering.pool.embeds[chosen], [steering.seeds[row] for row in chosen]
    columns = [("drawn", steering.pool.pictures[chosen]), ("before", steering.before_pictures[chosen])]
    for name in SHOWN:
        edited = apply_edits(bundle.sae, bundle.statistics, embeds, [Edit(features[name], 1.0, switch=True)])
        columns.append((name.replace("=", ": "), painter(edited, seeds)))
    night = apply_edits(bundle.sae, bundle.statistics, embeds, [Edit(features["time=night"], 1.0, switch=True)])
    length = (night - embeds).norm(dim=-1, keepdim=True)
    picked = torch.tensor(np.random.default_rng(1).choice(steering.common, len(chosen)))
    columns.append(("random feature", painter(embeds + length * bundle.sae.W_dec[picked].detach(), seeds)))
    sheet(columns).save(path, optimize=True)

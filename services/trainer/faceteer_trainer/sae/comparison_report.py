"""Several SAEs side by side: as a table, as Markdown, and as points, explained variance against L0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from faceteer_runtime.files import whole_file
from matplotlib import pyplot, ticker
from rich.table import Table

_HEAD = ("SAE", "architecture", "features", "L0", "L0 p5-p95", "explained variance", "cosine", "MSE", "dead", "MS")


def draw(results: dict[str, dict[str, Any]], title: str, directory: Path) -> None:
    """Write comparison.png: the two panels are the trade that an SAE makes, and how often its features fire.

    Args:
        results: figures by the SAE's name, as results.json has them.
        title: what they were measured on.
        directory: where it goes.
    """
    figure, (trade, density) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    l0 = [max(figures["l0"], 0.1) for figures in results.values()]
    variance = [figures["explained_variance"] for figures in results.values()]
    dead = [figures["dead_share"] for figures in results.values()]
    points = trade.scatter(l0, variance, c=dead, cmap="viridis_r", vmin=0, vmax=1, s=90, edgecolors="black", zorder=3)
    for x, y, name in zip(l0, variance, results, strict=True):
        trade.annotate(name, (x, y), xytext=(8, 6), textcoords="offset points", fontsize=9)
    trade.set_xscale("log")
    trade.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    trade.xaxis.set_minor_formatter(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.8)))
    trade.margins(x=0.4, y=0.15)
    trade.set_xlabel("L0: features that fire on a picture")
    trade.set_ylabel("explained variance")
    trade.grid(alpha=0.3, which="both")
    figure.colorbar(points, ax=trade, label="share of dead features")
    for name, figures in results.items():
        found = figures["firing_density"]
        share = [count / figures["d_sae"] for count in found["counts"]]
        density.stairs(share, found["edges"], label=f"{name} (never: {figures['dead_share']:.0%})", linewidth=1.5)
    density.set_xlabel("log10 of the share of pictures on which a feature fires")
    density.set_ylabel("share of features")
    density.grid(alpha=0.3)
    density.legend(fontsize=9)
    figure.suptitle(title)
    with whole_file(directory / "comparison.png") as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def _cells(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    ms = figures["monosemanticity"]
    return (
        name,
        figures["architecture"],
        f"{figures['d_sae']:,}",
        f"{figures['l0']:.1f}",
        f"{figures['l0_quantiles']['p05']:.0f}-{figures['l0_quantiles']['p95']:.0f}",
        f"{figures['explained_variance']:.4f}",
        f"{figures['cosine']:.4f}",
        f"{figures['mse']:.4g}",
        f"{figures['dead_share']:.1%}",
        "-" if ms is None or ms["mean"] is None else f"{ms['mean']:.3f}",
    )


def _anchors(report: dict[str, Any]) -> str:
    """What to compare the figures with, in a sentence or two."""
    first = next(iter(report["saes"].values()))
    said = (
        f"MSE if every reconstruction were zero {first['mse_zero_ablation']:.4g}, if it were the mean embedding "
        f"{first['mse_mean_ablation']:.4g}. A feature is dead if it fires on none of the {report['rows']:,} pictures."
    )
    if (ms := first["monosemanticity"]) is not None:
        said += (
            f" MS: mean over features with at least {ms['least_firings']} firings in the sample; similarity by "
            f"{report['similarity']}; two pictures at random: {ms['chance']:.3f}."
        )
    return said


def as_table(report: dict[str, Any]) -> Table:
    """For a terminal."""
    table = Table(caption=_anchors(report), caption_justify="left")
    for number, head in enumerate(_HEAD):
        table.add_column(head, justify="left" if number < 2 else "right", no_wrap=True)
    for name, figures in report["saes"].items():
        table.add_row(*_cells(name, figures))
    return table


def as_markdown(report: dict[str, Any]) -> str:
    """comparison.md: the same table, with the picture that `draw` writes."""
    corpus = report["corpus"]
    lines = [
        f"# SAEs on {corpus['name']}",
        "",
        f"{report['rows']:,} of {corpus['rows']:,} pictures, embeddings of encoder {corpus['encoder_revision']}.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|---|---|" + "---:|" * (len(_HEAD) - 2),
        *("| " + " | ".join(_cells(name, figures)) + " |" for name, figures in report["saes"].items()),
        "",
        _anchors(report),
        "",
        "![Explained variance against L0](comparison.png)",
        "",
    ]
    return "\n".join(lines)

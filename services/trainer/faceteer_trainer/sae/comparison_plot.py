"""Several SAEs as points: explained variance against L0, coloured by how many features are dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from faceteer_runtime.files import whole_file
from matplotlib import pyplot, ticker


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

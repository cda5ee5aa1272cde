"""The commands' shared words: options by type and help text, and the client that they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import faceteer
from faceteer.cli import show

Address = Annotated[
    str | None,
    typer.Option("--address", help="The server, host:port; FACETEER_ADDRESS, else localhost:50050."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts on stdout, and nothing else.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds to wait for each answer.")]
Picture = Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, GIF, BMP or TIFF.", show_default=False)]
Top = Annotated[int, typer.Option("--top", min=1, help="Features to show.")]
SaveHtml = Annotated[
    Path | None, typer.Option("--save-html", metavar="FILE", help="Also write a page with pictures: one .html file.")
]

Out = Annotated[Path | None, typer.Option("-o", "--output", help="Draw into this file: .png, .webp or .jpg.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same picture.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")]
Size = Annotated[str | None, typer.Option("--size", help="Pixels, or WIDTHxHEIGHT.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="ddpm, ddim, dpm_solver_pp or lcm.")]
KeepLayout = Annotated[
    str | None,
    typer.Option(
        "--keep-layout",
        metavar="METHOD",
        help="Keep the picture's layout: inversion (closest), image_to_image, or none whatever a recipe says.",
    ),
]
Strength = Annotated[
    float | None, typer.Option("--strength", help="With image_to_image: how much is drawn anew, up to 1; 0.7.")
]
SaveRecipe = Annotated[Path | None, typer.Option("--save-recipe", help="Write the edit as a recipe (JSON).")]

Set = Annotated[list[str] | None, typer.Option("--set", metavar="FEATURE=VALUE", help="Set a feature.")]
Add = Annotated[list[str] | None, typer.Option("--add", metavar="FEATURE=VALUE", help="Turn it up by it.")]
Scale = Annotated[list[str] | None, typer.Option("--scale", metavar="FEATURE=FACTOR", help="Multiply it.")]
Ablate = Annotated[list[str] | None, typer.Option("--ablate", metavar="FEATURE", help="Turn it off.")]
Switch = Annotated[
    list[str] | None, typer.Option("--switch", metavar="FEATURE=VALUE", help="Set it and turn its rivals off.")
]
Unit = Annotated[
    str, typer.Option("--unit", help="scaled: 1 is the feature's 99th percentile; raw: the SAE's own units.")
]

Feature = Annotated[str, typer.Argument(help="A label or an index.", show_default=False)]
Alive = Annotated[bool | None, typer.Option("--alive/--dead", help="Only features that ever fire, or never do.")]
Labelled = Annotated[bool | None, typer.Option("--labelled/--unlabelled", help="Only with, or without, a label.")]
Source = Annotated[
    list[str] | None, typer.Option("--source", metavar="WHO", help="Labelled by: automatic, model or person.")
]
MinShare = Annotated[
    float | None, typer.Option("--min-share", metavar="SHARE", help="Fires on at least this share of pictures, 0 to 1.")
]
MaxShare = Annotated[
    float | None, typer.Option("--max-share", metavar="SHARE", help="Fires on at most this share of pictures.")
]
MinDetection = Annotated[
    float | None, typer.Option("--min-detection", metavar="AUC", help="Its label tells where it fires this well.")
]
MaxDetection = Annotated[float | None, typer.Option("--max-detection", metavar="AUC", help="Not better than this.")]
MinCausal = Annotated[
    float | None, typer.Option("--min-causal", metavar="SCORE", help="Its label says what it causes this well.")
]
MaxCausal = Annotated[float | None, typer.Option("--max-causal", metavar="SCORE", help="Not better than this.")]
Disagree = Annotated[
    bool | None, typer.Option("--disagree/--agree", help="Only where the label's two scores disagree, or agree.")
]
IncludeClass = Annotated[
    list[str] | None,
    typer.Option(
        "--include-class",
        metavar="CLASS",
        help="Show a gated safety class too, 'all' for every one; FACETEER_ACCESS_KEY must allow it.",
    ),
]


def filters_of(
    *,
    alive: bool | None,
    labelled: bool | None,
    source: list[str] | None,
    min_share: float | None,
    max_share: float | None,
    min_detection: float | None,
    max_detection: float | None,
    min_causal: float | None,
    max_causal: float | None,
    disagree: bool | None,
    include_class: list[str] | None,
) -> faceteer.FeatureFilters:
    """The SDK's filters from the options of a command. The SDK checks them."""
    return {
        "alive": alive,
        "labelled": labelled,
        "label_sources": source or None,  # type: ignore[typeddict-item]  # checked by the SDK
        "min_firing_share": min_share,
        "max_firing_share": max_share,
        "min_detection_score": min_detection,
        "max_detection_score": max_detection,
        "min_causal_score": min_causal,
        "max_causal_score": max_causal,
        "scores_disagree": disagree,
        "include_safety_classes": ["*" if name == "all" else name for name in include_class or ()] or None,
    }


@contextmanager
def client_of(context: typer.Context, address: str | None, timeout: float | None) -> Iterator[faceteer.Client]:
    """A client; the command's own --address wins over the one before the command."""
    root = context.find_root().obj
    with faceteer.connect(address if address is not None else root, timeout=timeout) as client:
        yield client


def opened(client: faceteer.Client, image: Path) -> faceteer.Photo:
    """A picture's file, opened, with a word on stderr while it takes."""
    with show.console(stderr=True).status(f"opening {image.name}"):
        return client.open(image)

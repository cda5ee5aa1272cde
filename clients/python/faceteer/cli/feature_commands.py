"""``faceteer features …``: what each feature means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import faceteer
from faceteer.cli import arguments, completion, options, output, show
from faceteer.cli.options import Call, Filters, grouped, opened

app = typer.Typer(help="What each feature means.", no_args_is_help=True)

Limit = Annotated[int, typer.Option("--limit", min=1, help="Features to show.")]


@app.command("search")
@grouped
def search(
    call: Call,
    filters: Filters,
    words: Annotated[
        list[str] | None, typer.Argument(help="Words from labels; the last may be incomplete.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="The features that fire on this picture.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="FEATURE",
            help="Features like this one: a label or an index.",
            autocompletion=completion.features,
        ),
    ] = None,
    limit: Limit = 20,
    save_html: options.SaveHtml = None,
) -> None:
    """Find features by words, by a picture, or like another feature; best first."""
    query = " ".join(words or ()).strip()
    if (bool(query), picture is not None, like is not None).count(True) != 1:
        raise faceteer.InvalidArgumentError(
            "search for one thing: WORDS, --picture FILE or --like FEATURE", field="words", description="one of three"
        )
    arguments.check_page(save_html)
    with call.client() as client:
        what: str | faceteer.Photo | faceteer.Feature = query
        if picture is not None:
            what = opened(client, picture)
            query = what.name
        elif like is not None:
            what = client.features[arguments.feature_key(like)]
            query = f"like {what.name}"
        found = client.features.search(what, limit=limit, **filters.given())
        _show(found, query, save_html, total=found.total, json=call.json)


@app.command("list")
@grouped
def list_(
    call: Call,
    filters: Filters,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            help="index, label, or by falling firing_share, max_activation, detection_score, causal_score, "
            "disagreement.",
        ),
    ] = "index",
    limit: Limit = 50,
    save_html: options.SaveHtml = None,
) -> None:
    """List features by filter and order."""
    arguments.check_page(save_html)
    with call.client() as client:
        listed = client.features.list(order=order, limit=limit, **filters.given())  # type: ignore[arg-type]  # checked there
        _show(
            faceteer.FeatureList(listed),
            f"features by {order.replace('_', ' ')}",
            save_html,
            total=None,
            json=call.json,
        )


@app.command("show")
@grouped
def show_(
    feature: options.Feature,
    call: Call,
    icon: Annotated[
        Path | None, typer.Option("--icon", help="Write the feature's icon, a picture of what it causes, to this file.")
    ] = None,
    quantiles: Annotated[
        bool,
        typer.Option(
            "--quantiles", help="List pictures from each quantile of its activation instead of the strongest."
        ),
    ] = False,
    save_html: Annotated[
        Path | None,
        typer.Option("--save-html", "--html", metavar="FILE", help="Also write a page with pictures: one .html file."),
    ] = None,
) -> None:
    """Show what a feature means and how it behaves."""
    format = arguments.output_format(icon) if icon is not None else ""
    arguments.check_page(save_html)
    wrote = []
    with call.client() as client:
        shown = client.features[arguments.feature_key(feature)]
        examples = shown.examples(12, selection="quantiles" if quantiles else "strongest")
        if icon is not None:
            _write_icon(shown, icon, format)
            wrote.append(icon)
        if save_html is not None:
            wrote.append(shown.save_html(save_html))
    if call.json:
        output.print_json({**shown.to_dict(), "examples": [_example_dict(example) for example in examples]})
        return
    show.feature(show.console(), shown, examples)
    show.wrote(show.console(), *wrote)


@app.command("icon")
@grouped
def icon(
    feature: options.Feature,
    call: Call,
    out: Annotated[Path, typer.Option("-o", "--output", help="The file: .webp, .png or .jpg.", show_default=False)],
) -> None:
    """Write a picture of what turning a feature up causes. The server may have to draw it, which takes a while."""
    format = arguments.output_format(out)
    with call.client() as client:
        shown = client.features[arguments.feature_key(feature)]
        with show.console(stderr=True).status(f"the icon of {shown.name}"):
            strip = _write_icon(shown, out, format)
    strengths = ", ".join(f"{strength:g}" for strength in strip.strengths)
    if call.json:
        output.print_json({"index": shown.index, "output": str(out), "strengths": list(strip.strengths)})
    else:
        show.console().print(f"  wrote {out} ({strip.image.width}x{strip.image.height}, strengths {strengths})")


@app.command("label")
@grouped
def label(
    feature: options.Feature,
    call: Call,
    words: Annotated[
        str | None, typer.Argument(metavar="LABEL", help="What it means, in a few words.", show_default=False)
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the person's label instead.")] = False,
    author: Annotated[str, typer.Option("--author", help="Recorded with the label.")] = "",
) -> None:
    """Say what a feature means. A person's label wins over every automatic one."""
    if clear == bool((words or "").strip()):
        raise faceteer.InvalidArgumentError(
            "give a LABEL, or --clear to remove one", field="label", description="one of the two"
        )
    with call.client() as client:
        key = arguments.feature_key(feature)
        now = client.features.label(key, "" if clear else (words or "").strip(), author=author)
    if call.json:
        output.print_json(now.to_dict())
    else:
        show.labelled(show.console(), now)


def _write_icon(feature: faceteer.Feature, path: Path, format: str) -> faceteer.FeatureIcon:
    strip = feature.icon()
    if format == "WEBP":
        strip.save(path)
    else:
        output.write_picture(strip.image, path, format)
    return strip


def _show(found: faceteer.FeatureList, query: str, save_html: Path | None, *, total: int | None, json: bool) -> None:
    if save_html is not None:
        found.save_html(save_html, title=query)
    if json:
        answer: dict[str, Any] = {"features": [feature.to_dict() for feature in found]}
        output.print_json(answer if total is None else {**answer, "total": total})
        return
    show.features(show.console(), found, query)
    show.wrote(show.console(), save_html)


def _example_dict(example: faceteer.FeatureExample) -> dict[str, Any]:
    return {
        "picture": example.picture,
        "activation": example.activation,
        "caption": example.caption,
        "quantile_from": example.quantile_from,
        "quantile_to": example.quantile_to,
    }

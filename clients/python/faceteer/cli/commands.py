"""The commands: each asks the SDK one thing and shows the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import faceteer
from faceteer.cli import arguments, feature_commands, options, output, recipe_commands, show
from faceteer.cli.drawing import Drawing, PhotoDrawing
from faceteer.cli.options import Call, Edits, grouped, opened

app = typer.Typer(
    help="Edit images by their features: open a picture, see what is in it, turn its features up and down.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit statuses: 0 done, 2 bad input, 3 not found, 4 server unreachable, 5 anything else.",
)
app.add_typer(feature_commands.app, name="features")
app.add_typer(recipe_commands.app, name="recipe")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    address: Annotated[str | None, typer.Option("--address", help="The server, host:port.")] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    context.obj = address
    if version:
        print(faceteer.__version__)
        raise typer.Exit


@app.command("open")
@grouped
def open_(image: options.Picture, call: Call, top: options.Top = 12, save_html: options.SaveHtml = None) -> None:
    """Show the features of a picture, strongest first."""
    arguments.check_page(save_html)
    with call.client() as client:
        photo = opened(client, image)
    _show_photo(photo, top, save_html, json=call.json)


@app.command()
@grouped
def prompt(
    words: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="What the picture should show.", show_default=False)
    ],
    edits: Edits,
    drawing: Drawing,
    call: Call,
    negative: Annotated[str, typer.Option("--negative", help="What to steer away from.")] = "",
    prior_seed: Annotated[
        int, typer.Option("--prior-seed", help="Seed of the prior; another seed gives another picture.")
    ] = 0,
    top: options.Top = 12,
) -> None:
    """Imagine a picture for TEXT, show its features, edit them, draw it with -o.

    Needs a bundle with a prior.
    """
    with call.client() as client:
        with show.console(stderr=True).status("imagining"):
            photo = client.embed_prompt(" ".join(words), negative_prompt=negative, seed=prior_seed)
        if edits.features or drawing.out is not None or drawing.save_recipe is not None:
            drawing.draw(photo.edit(edits.features), photo.name, json=call.json)
        else:
            _show_photo(photo, top, drawing.save_html, json=call.json)


@app.command()
@grouped
def edit(image: options.Picture, edits: Edits, drawing: PhotoDrawing, call: Call) -> None:
    """Edit a picture's features. FEATURE is a label or an index; every option may be given several times.

    Without -o it only reports what the edit would do.
    """
    with call.client() as client:
        photo = opened(client, image)
        drawing.draw(photo.edit(edits.features), photo.name, json=call.json)


@app.command()
@grouped
def diff(
    image: options.Picture,
    other: options.Picture,
    call: Call,
    coverage: options.Coverage = 0.9,
    top: options.Top = 20,
    save_html: options.SaveHtml = None,
) -> None:
    """Show which features lead from one picture to another."""
    arguments.check_page(save_html)
    with call.client() as client:
        source, target = opened(client, image), opened(client, other)
        result = client.diff(source, target, coverage=coverage)
    if save_html is not None:
        result.save_html(save_html)
    if call.json:
        output.print_json(result.to_dict())
    else:
        show.difference(show.console(), source.name, target.name, result, top)
        show.wrote(show.console(), save_html)


@app.command()
@grouped
def transfer(
    image: options.Picture,
    other: options.Picture,
    drawing: PhotoDrawing,
    call: Call,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Carry over only what OTHER has and this picture lacks.")
    ] = None,
    coverage: options.Coverage = 0.98,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="FEATURE", help="Carry only this part; may be repeated.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="FEATURE", help="Leave this part out; may be repeated.")
    ] = None,
) -> None:
    """Carry the features of OTHER over to IMAGE: all of them, or some ("take the cat, keep the sea")."""
    kept, left_out = (list(map(arguments.feature_key, given or ())) for given in (only, without))
    with call.client() as client:
        target, source = opened(client, image), opened(client, other)
        against = None if reference is None else opened(client, reference)
        planned = client.transfer(target, source, reference=against, coverage=coverage, only=kept, without=left_out)
        drawing.draw(planned, f"{source.name} → {target.name}", json=call.json)


@app.command()
@grouped
def status(call: Call) -> None:
    """Show what the server runs, its limits, and whether its services are well."""
    with call.client() as client:
        answer = client.status()
    if call.json:
        output.print_json(answer.to_dict())
    else:
        show.status(show.console(), answer)


@app.command()
@grouped
def library(call: Call) -> None:
    """Show what the feature library covers."""
    with call.client() as client:
        facts = client.features.info()
    if call.json:
        output.print_json(facts.to_dict())
    else:
        show.library(show.console(), facts)


def _show_photo(photo: faceteer.Photo, top: int, save_html: Path | None, *, json: bool) -> None:
    if save_html is not None:
        photo.save_html(save_html)
    if json:
        output.print_json(
            {
                "embedding_id": photo.embedding_id,
                "features": photo.features.to_list(),
                "l0": photo.l0,
                "explained_variance": photo.explained_variance,
                "cosine": photo.cosine,
                "norm": photo.norm,
                "warnings": [vars(warning) for warning in photo.warnings],
                "revisions": vars(photo.revisions),
            }
        )
    else:
        show.photo(show.console(), photo, top)
        show.wrote(show.console(), save_html)

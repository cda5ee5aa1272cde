"""``faceteer recipe …``: edits as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import faceteer
from faceteer.cli import options, output, show
from faceteer.cli.drawing import ReplayDrawing
from faceteer.cli.options import Call, grouped, opened

app = typer.Typer(help="Edits as files: look at them, replay them.", no_args_is_help=True)


@app.command("show")
def recipe_show(recipe: Annotated[Path, typer.Argument(help="A recipe file.")], json: options.Json = False) -> None:
    """Show what a recipe does. Needs no server."""
    loaded = faceteer.Recipe.load(recipe)
    if json:
        output.print_json({"hash": loaded.hash, "recipe": loaded.to_dict()})
    else:
        show.recipe(show.console(), recipe.name, loaded)


@app.command("apply")
@grouped
def recipe_apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    image: options.Picture,
    drawing: ReplayDrawing,
    call: Call,
) -> None:
    """Replay a recipe on a picture. Refused when the server has other models than the recipe was made with."""
    loaded = faceteer.Recipe.load(recipe)
    with call.client() as client:
        drawing.draw(opened(client, image).edit(loaded), f"{recipe.name} on {image.name}", json=call.json)

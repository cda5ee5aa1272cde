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


RecipeFile = Annotated[Path, typer.Argument(help="A recipe file, or a picture that was drawn with it.")]
AcceptChanged = Annotated[
    bool, typer.Option("--accept-changed", help="Take a recipe that was changed after it was saved.")
]


@app.command("show")
def recipe_show(recipe: RecipeFile, json: options.Json = False, accept_changed: AcceptChanged = False) -> None:
    """Show what a recipe does. Needs no server."""
    loaded = faceteer.Recipe.load(recipe, accept_changed=accept_changed)
    if json:
        answer = {"hash": loaded.hash, "recipe": loaded.to_dict()}
        output.print_json(answer | ({"changed_from": loaded.changed_from} if loaded.changed_from else {}))
    else:
        show.recipe(show.console(), recipe.name, loaded)


@app.command("apply")
@grouped
def recipe_apply(
    recipe: RecipeFile,
    image: options.Picture,
    drawing: ReplayDrawing,
    call: Call,
    accept_changed: AcceptChanged = False,
) -> None:
    """Replay a recipe on a picture. Refused when the server has other models than the recipe was made with."""
    loaded = faceteer.Recipe.load(recipe, accept_changed=accept_changed)
    show.changed_recipe(show.console(stderr=True), loaded)
    with call.client() as client:
        photo = opened(client, image)
        drawing.draw(photo.edit(loaded), f"{recipe.name} on {photo.name}", json=call.json)

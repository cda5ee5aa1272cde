"""``faceteer recipe …``: edits as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import faceteer
from faceteer.cli import options, output, show
from faceteer.cli.drawing import Drawing
from faceteer.cli.options import client_of, opened

app = typer.Typer(help="Edits as files: look at them, replay them.", no_args_is_help=True)


@app.command("show")
def recipe_show(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    json: options.Json = False,
) -> None:
    """Show what a recipe does. Needs no server."""
    loaded = faceteer.Recipe.load(recipe)
    if json:
        output.print_json({"hash": loaded.hash, "recipe": loaded.to_dict()})
    else:
        show.recipe(show.console(), recipe.name, loaded)


@app.command("apply")
def recipe_apply(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    image: options.Picture,
    out: options.Out = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    scheduler: options.Scheduler = None,
    keep_layout: options.KeepLayout = None,
    strength: options.Strength = None,
    save_recipe: options.SaveRecipe = None,
    save_html: options.SaveHtml = None,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Replay a recipe on a picture. Refused when the server has other models than the recipe was made with."""
    loaded = faceteer.Recipe.load(recipe)
    drawing = Drawing(
        out,
        save_recipe,
        save_html,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        scheduler=scheduler,
        keep_layout=keep_layout,
        strength=strength,
        replays=True,
    )
    with client_of(context, address, timeout) as client:
        planned = opened(client, image).edit(loaded)
        drawing.draw(planned, f"{recipe.name} on {image.name}", json=json)

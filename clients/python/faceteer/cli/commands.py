"""The commands: each asks the SDK one thing and shows the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import faceteer
from faceteer.cli import arguments, feature_commands, options, output, recipe_commands, show
from faceteer.cli.drawing import Drawing
from faceteer.cli.options import client_of, opened

app = typer.Typer(
    help="Edit images by their features: open a picture, see what is in it, turn its features up and down.",
    no_args_is_help=True,
    add_completion=False,
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
    address: options.Address = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    context.obj = address
    if version:
        print(faceteer.__version__)
        raise typer.Exit


@app.command("open")
def open_(
    context: typer.Context,
    image: options.Picture,
    top: options.Top = 12,
    save_html: options.SaveHtml = None,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show the features of a picture, strongest first."""
    arguments.check_page(save_html)
    with client_of(context, address, timeout) as client:
        photo = opened(client, image)
    _show_photo(photo, top, save_html, json=json)


@app.command()
def prompt(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="TEXT", help="What should be in it.", show_default=False)],
    negative: Annotated[str, typer.Option("--negative", help="What to steer away from.")] = "",
    prior_seed: Annotated[int, typer.Option("--prior-seed", help="Another one imagines another picture.")] = 0,
    set: options.Set = None,
    add: options.Add = None,
    scale: options.Scale = None,
    ablate: options.Ablate = None,
    switch: options.Switch = None,
    unit: options.Unit = "scaled",
    out: options.Out = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    scheduler: options.Scheduler = None,
    save_recipe: options.SaveRecipe = None,
    save_html: options.SaveHtml = None,
    top: options.Top = 12,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Imagine a picture for TEXT, show its features, edit them, draw it with -o.

    Needs a bundle with a prior.
    """
    edits = arguments.edits_of(
        set=set or (), add=add or (), scale=scale or (), ablate=ablate or (), switch=switch or (), unit=unit
    )
    drawing = Drawing(
        out,
        save_recipe,
        save_html,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        scheduler=scheduler,
    )
    with client_of(context, address, timeout) as client:
        with show.console(stderr=True).status("imagining"):
            photo = client.embed_prompt(" ".join(words), negative_prompt=negative, seed=prior_seed)
        if edits or out is not None or save_recipe is not None:
            drawing.draw(photo.edit(edits), photo.name, json=json)
        else:
            _show_photo(photo, top, save_html, json=json)


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
        if save_html is not None:
            show.console().print(f"  wrote {save_html}")


@app.command()
def edit(
    context: typer.Context,
    image: options.Picture,
    set: options.Set = None,
    add: options.Add = None,
    scale: options.Scale = None,
    ablate: options.Ablate = None,
    switch: options.Switch = None,
    unit: options.Unit = "scaled",
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
    """Edit a picture's features. FEATURE is a label or an index; every option may be given several times.

    Without -o it only reports what the edit would do.
    """
    edits = arguments.edits_of(
        set=set or (), add=add or (), scale=scale or (), ablate=ablate or (), switch=switch or (), unit=unit
    )
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
    )
    with client_of(context, address, timeout) as client:
        planned = opened(client, image).edit(edits)
        drawing.draw(planned, image.name, json=json)


@app.command()
def diff(
    context: typer.Context,
    image: options.Picture,
    other: options.Picture,
    coverage: Annotated[float, typer.Option("--coverage", help="The share of the difference to carry.")] = 0.9,
    top: options.Top = 20,
    save_html: options.SaveHtml = None,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show which features lead from one picture to another."""
    arguments.check_page(save_html)
    with client_of(context, address, timeout) as client:
        source, target = opened(client, image), opened(client, other)
        result = client.diff(source, target, coverage=coverage)
    if save_html is not None:
        result.save_html(save_html)
    if json:
        output.print_json(result.to_dict())
    else:
        show.difference(show.console(), image.name, other.name, result, top)
        if save_html is not None:
            show.console().print(f"  wrote {save_html}")


@app.command()
def transfer(
    context: typer.Context,
    image: options.Picture,
    other: options.Picture,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Carry over what OTHER has and this picture lacks.")
    ] = None,
    coverage: Annotated[float, typer.Option("--coverage", help="The share of the difference to carry.")] = 0.9,
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
    """Carry the features of OTHER over to IMAGE."""
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
    )
    with client_of(context, address, timeout) as client:
        target, source = opened(client, image), opened(client, other)
        against = None if reference is None else opened(client, reference)
        planned = client.transfer(target, source, reference=against, coverage=coverage)
        drawing.draw(planned, f"{other.name} → {image.name}", json=json)


@app.command()
def status(
    context: typer.Context, json: options.Json = False, address: options.Address = None, timeout: options.Timeout = None
) -> None:
    """Show what the server runs, its limits, and whether its services are well."""
    with client_of(context, address, timeout) as client:
        answer = client.status()
    if json:
        output.print_json(answer.to_dict())
    else:
        show.status(show.console(), answer)


@app.command()
def library(
    context: typer.Context,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show what the feature library covers."""
    with client_of(context, address, timeout) as client:
        facts = client.features.info()
    if json:
        output.print_json(facts.to_dict())
    else:
        show.library(show.console(), facts)

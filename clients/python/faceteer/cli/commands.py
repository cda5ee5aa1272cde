"""The commands: each asks the SDK one thing and shows the answer.

Knows nothing of gRPC, nor of how results are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import faceteer
from faceteer.cli import arguments, output, show

app = typer.Typer(
    help="Edit images by their features: open a picture, see what is in it, turn its features up and down.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit statuses: 0 done, 2 bad input, 3 not found, 4 server unreachable, 5 anything else.",
)
features_app = typer.Typer(help="What each feature means.", no_args_is_help=True)
recipe_app = typer.Typer(help="Edits as files: look at them, replay them.", no_args_is_help=True)
app.add_typer(features_app, name="features")
app.add_typer(recipe_app, name="recipe")

Address = Annotated[
    str | None,
    typer.Option("--address", help="The server, host:port; FACETEER_ADDRESS, else localhost:50050."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts on stdout, and nothing else.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds to wait for each answer.")]
Picture = Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, GIF, BMP or TIFF.", show_default=False)]
Top = Annotated[int, typer.Option("--top", min=1, help="Features to show.")]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Draw into this file: .png, .webp or .jpg.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same picture.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")]
Size = Annotated[str | None, typer.Option("--size", help="Pixels, or WIDTHxHEIGHT.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="ddpm, ddim, dpm_solver_pp or lcm.")]
SaveRecipe = Annotated[Path | None, typer.Option("--save-recipe", help="Write the edit as a recipe (JSON).")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    address: Address = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    context.obj = address
    if version:
        print(faceteer.__version__)
        raise typer.Exit


@app.command("open")
def open_(
    context: typer.Context,
    image: Picture,
    top: Top = 12,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Show the features of a picture, strongest first."""
    with _client(context, address, timeout) as client:
        photo = _open(client, image)
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


@app.command()
def edit(
    context: typer.Context,
    image: Picture,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="FEATURE=VALUE", help="Set a feature.")] = None,
    add: Annotated[list[str] | None, typer.Option("--add", metavar="FEATURE=VALUE", help="Turn it up by it.")] = None,
    scale: Annotated[list[str] | None, typer.Option("--scale", metavar="FEATURE=FACTOR", help="Multiply it.")] = None,
    ablate: Annotated[list[str] | None, typer.Option("--ablate", metavar="FEATURE", help="Turn it off.")] = None,
    switch: Annotated[
        list[str] | None,
        typer.Option("--switch", metavar="FEATURE=VALUE", help="Set it and turn its rivals off."),
    ] = None,
    unit: Annotated[
        str, typer.Option("--unit", help="scaled: 1 is the feature's 99th percentile; raw: the SAE's own units.")
    ] = "scaled",
    out: Out = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: Scheduler = None,
    save_recipe: SaveRecipe = None,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Edit a picture's features. FEATURE is a label or an index; every option may be given several times.

    Without -o it only reports what the edit would do.
    """
    edits = arguments.edits_of(
        set=set or (), add=add or (), scale=scale or (), ablate=ablate or (), switch=switch or (), unit=unit
    )
    drawing = _Drawing(out, save_recipe, seed, steps, guidance, size, scheduler)
    with _client(context, address, timeout) as client:
        planned = _open(client, image).edit(edits)
        drawing.draw(planned, image.name, json=json)


@app.command()
def diff(
    context: typer.Context,
    image: Picture,
    other: Picture,
    coverage: Annotated[float, typer.Option("--coverage", help="The share of the difference to carry.")] = 0.9,
    top: Top = 20,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Show which features lead from one picture to another."""
    with _client(context, address, timeout) as client:
        source, target = _open(client, image), _open(client, other)
        result = client.diff(source, target, coverage=coverage)
    if json:
        output.print_json(result.to_dict())
    else:
        show.difference(show.console(), image.name, other.name, result, top)


@app.command()
def transfer(
    context: typer.Context,
    image: Picture,
    other: Picture,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Carry over what OTHER has and this picture lacks.")
    ] = None,
    coverage: Annotated[float, typer.Option("--coverage", help="The share of the difference to carry.")] = 0.9,
    out: Out = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: Scheduler = None,
    save_recipe: SaveRecipe = None,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Carry the features of OTHER over to IMAGE."""
    drawing = _Drawing(out, save_recipe, seed, steps, guidance, size, scheduler)
    with _client(context, address, timeout) as client:
        target, source = _open(client, image), _open(client, other)
        against = None if reference is None else _open(client, reference)
        planned = client.transfer(target, source, reference=against, coverage=coverage)
        drawing.draw(planned, f"{other.name} → {image.name}", json=json)


@features_app.command("search")
def features_search(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(help="Words of labels; the last may be incomplete.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Features to show.")] = 20,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Find features by the words of their labels."""
    query = " ".join(words)
    with _client(context, address, timeout) as client:
        found = client.features.search(query, limit=limit)
    if json:
        output.print_json({"features": [_feature_dict(feature) for feature in found]})
    else:
        show.features(show.console(), found, query)


@features_app.command("show")
def features_show(
    context: typer.Context,
    feature: Annotated[str, typer.Argument(help="A label or an index.")],
    icon: Annotated[Path | None, typer.Option("--icon", help="Write a picture of what it causes here.")] = None,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Show what a feature means and how it behaves."""
    format = arguments.output_format(icon) if icon is not None else ""
    with _client(context, address, timeout) as client:
        shown = client.features[arguments.feature_key(feature)]
        examples = shown.examples(6)
        if icon is not None:
            output.write_picture(shown.icon().image, icon, format)
    if json:
        pictures = [{"picture": e.picture, "activation": e.activation, "caption": e.caption} for e in examples]
        output.print_json({**_feature_dict(shown), "examples": pictures})
    else:
        show.feature(show.console(), shown, examples)
        if icon is not None:
            show.console().print(f"  wrote {icon}")


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    json: Json = False,
) -> None:
    """Show what a recipe does. Needs no server."""
    loaded = faceteer.Recipe.load(recipe)
    if json:
        output.print_json({"hash": loaded.hash, "recipe": loaded.to_dict()})
    else:
        show.recipe(show.console(), recipe.name, loaded)


@recipe_app.command("apply")
def recipe_apply(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    image: Picture,
    out: Out = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: Scheduler = None,
    save_recipe: SaveRecipe = None,
    json: Json = False,
    address: Address = None,
    timeout: Timeout = None,
) -> None:
    """Replay a recipe on a picture. Refused when the server has other models than the recipe was made with."""
    loaded = faceteer.Recipe.load(recipe)
    drawing = _Drawing(out, save_recipe, seed, steps, guidance, size, scheduler)
    with _client(context, address, timeout) as client:
        planned = _open(client, image).edit(loaded)
        drawing.draw(planned, f"{recipe.name} on {image.name}", json=json)


@app.command()
def status(context: typer.Context, json: Json = False, address: Address = None, timeout: Timeout = None) -> None:
    """Show what the server runs, its limits, and whether its services are well."""
    with _client(context, address, timeout) as client:
        answer = client.status()
    if json:
        output.print_json(answer.to_dict())
    else:
        show.status(show.console(), answer)


class _Drawing:
    """What an edit's command was asked to write; checked before any work is done."""

    def __init__(
        self,
        out: Path | None,
        save_recipe: Path | None,
        seed: int | None,
        steps: int | None,
        guidance: float | None,
        size: str | None,
        scheduler: str | None,
    ) -> None:
        self._out, self._save_recipe = out, save_recipe
        self._format = arguments.output_format(out) if out is not None else ""
        if save_recipe is not None:
            arguments.check_writable(save_recipe)
        self._settings: dict[str, Any] = {
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance,
            "size": arguments.size_of(size),
            "scheduler": scheduler,
        }
        faceteer.Settings.of(**self._settings)

    def draw(self, edit: faceteer.Edit, name: str, *, json: bool) -> None:
        """Draws when a file was named, shows the report, writes what was asked for."""
        answer: dict[str, Any] = {"output": None, "seed": None}
        wrote = []
        recipe: faceteer.Recipe | None = None
        if self._out is not None:
            picture = edit.render(progress=True, **self._settings)
            output.write_picture(picture, self._out, self._format)
            answer |= {"output": str(self._out), "seed": picture.info["seed"]}
            answer |= {"width": picture.width, "height": picture.height}
            wrote.append(f"{self._out} ({picture.width}x{picture.height}, seed {picture.info['seed']})")
            recipe = edit.recipe()
        elif json or self._save_recipe is not None:
            recipe = edit.recipe(**self._settings)
        report = edit.report()
        if self._save_recipe is not None and recipe is not None:
            recipe.save(self._save_recipe)
            wrote.append(str(self._save_recipe))
        if json:
            assert recipe is not None
            answer |= {**report.to_dict(), "recipe": recipe.to_dict(), "recipe_hash": recipe.hash}
            if edit.coverage is not None:
                answer["coverage"] = edit.coverage
            output.print_json(answer)
            return
        to = show.console()
        show.report(to, name, report)
        for each in wrote:
            to.print(f"  wrote {each}")
        if not wrote:
            to.print("  nothing drawn: name a file with -o", style="dim")


@contextmanager
def _client(context: typer.Context, address: str | None, timeout: float | None) -> Iterator[faceteer.Client]:
    """The command's own --address wins over the one before the command."""
    root = context.find_root().obj
    with faceteer.connect(address if address is not None else root, timeout=timeout) as client:
        yield client


def _open(client: faceteer.Client, image: Path) -> faceteer.Photo:
    with show.console(stderr=True).status(f"opening {image.name}"):
        return client.open(image)


def _feature_dict(feature: faceteer.Feature) -> dict[str, Any]:
    statistics = dict(vars(feature.statistics))
    histogram = statistics.pop("histogram")
    return {
        "index": feature.index,
        "label": feature.label,
        "label_source": feature.label_source,
        "score": feature.score,
        "statistics": statistics,
        "histogram": None if histogram is None else dict(vars(histogram)),
        "coactivating": [vars(one) for one in feature.coactivating],
        "rivals": [vars(one) for one in feature.rivals],
        "nearest": [vars(one) for one in feature.nearest],
        "safety_class": feature.safety_class,
    }

"""What a command that edits is to draw and write, checked before the server is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import faceteer
from faceteer._models.values import check_strength
from faceteer.cli import arguments, options, output, show


@dataclass
class Drawing:
    """The files and settings of one command; ``draw`` does what they say."""

    out: Annotated[Path | None, typer.Option("-o", "--output", help="Draw into this file: .png, .webp or .jpg.")] = None
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed draws the same picture.")] = None
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None
    guidance: Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance.")] = None
    size: Annotated[str | None, typer.Option("--size", help="Pixels, or WIDTHxHEIGHT.")] = None
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="ddpm, ddim, dpm_solver_pp or lcm.")] = None
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Write the edit as a recipe (JSON).")] = None
    save_html: options.SaveHtml = None
    measure: Annotated[
        bool, typer.Option("--measure", help="Encode the drawn picture again: does it show what was asked for?")
    ] = False

    def __post_init__(self) -> None:
        if self.measure and self.out is None:
            raise arguments.invalid("--measure looks at the drawn picture; name its file with -o", "measure")
        self._format = arguments.output_format(self.out) if self.out is not None else ""
        if self.save_recipe is not None:
            arguments.check_writable(self.save_recipe)
        arguments.check_page(self.save_html)
        self._settings = self.settings()
        self.check(faceteer.Settings.of(**self._settings))

    def settings(self) -> dict[str, Any]:
        """What the SDK is to draw with."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "size": arguments.size_of(self.size),
            "scheduler": self.scheduler,
        }

    def check(self, settings: faceteer.Settings) -> None:
        """Raises InvalidArgumentError for settings that do not go together."""
        check_strength(settings)

    def draw(self, edit: faceteer.Edit, name: str, *, json: bool) -> None:
        """Draws when a file was named, shows the report, writes what was asked for."""
        answer: dict[str, Any] = {"output": None, "seed": None}
        wrote = []
        recipe: faceteer.Recipe | None = None
        if self.out is not None:
            picture = edit.render(progress=True, measure=self.measure, **self._settings)
            output.write_picture(picture, self.out, self._format)
            answer |= {"output": str(self.out), "seed": picture.info["seed"]}
            answer |= {"width": picture.width, "height": picture.height}
            wrote.append(f"{self.out} ({picture.width}x{picture.height}, seed {picture.info['seed']})")
            recipe = edit.recipe()
        elif json or self.save_recipe is not None:
            recipe = edit.recipe(**self._settings)
        report = edit.report()
        if self.save_recipe is not None and recipe is not None:
            recipe.save(self.save_recipe)
            wrote.append(str(self.save_recipe))
        if self.save_html is not None:
            wrote.append(str(edit.save_html(self.save_html)))
        if json:
            assert recipe is not None
            answer |= {**report.to_dict(), "recipe": recipe.to_dict(), "recipe_hash": recipe.hash}
            if edit.coverage is not None:
                answer["coverage"] = edit.coverage
                answer["parts"] = [dict(vars(part)) for part in edit.parts]
            output.print_json(answer)
            return
        to = show.console()
        show.parts(to, edit.parts)
        show.report(to, name, report)
        show.wrote(to, *wrote)
        if self.out is None:
            to.print("  nothing drawn: name a file with -o", style="dim")


@dataclass
class PhotoDrawing(Drawing):
    """The same for a picture's file, whose layout can be kept."""

    keep_layout: Annotated[
        str | None,
        typer.Option(
            "--keep-layout",
            metavar="METHOD",
            help="Keep the picture's layout: inversion (closest) or image_to_image; none overrides a recipe.",
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="With image_to_image: how much to redraw, above 0 and up to 1; default 0.7."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What the SDK is to draw with."""
        return {**super().settings(), "keep_layout": self.keep_layout, "strength": self.strength}


@dataclass
class ReplayDrawing(PhotoDrawing):
    """The same for a recipe, which may say by which method a strength is meant."""

    def check(self, settings: faceteer.Settings) -> None:
        """Nothing: the recipe is not known yet."""

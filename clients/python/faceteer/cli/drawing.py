"""What an edit's command was asked to draw and write, checked before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faceteer
from faceteer._models.values import check_strength
from faceteer.cli import arguments, output, show


class Drawing:
    """The files and settings of one command; ``draw`` does what they say."""

    def __init__(
        self,
        out: Path | None,
        save_recipe: Path | None,
        save_html: Path | None,
        *,
        seed: int | None,
        steps: int | None,
        guidance: float | None,
        size: str | None,
        scheduler: str | None,
        keep_layout: str | None = None,
        strength: float | None = None,
        replays: bool = False,
    ) -> None:
        self._out, self._save_recipe, self._save_html = out, save_recipe, save_html
        self._format = arguments.output_format(out) if out is not None else ""
        if save_recipe is not None:
            arguments.check_writable(save_recipe)
        arguments.check_page(save_html)
        self._settings: dict[str, Any] = {
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance,
            "size": arguments.size_of(size),
            "scheduler": scheduler,
            "keep_layout": keep_layout,
            "strength": strength,
        }
        settings = faceteer.Settings.of(**self._settings)
        if not replays:  # a recipe may say by which method
            check_strength(settings)

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
        if self._save_html is not None:
            wrote.append(str(edit.save_html(self._save_html)))
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
        if self._out is None:
            to.print("  nothing drawn: name a file with -o", style="dim")

"""`python -m faceteer_trainer bundles pull kandinsky-2-2`, and `verify`, `list`, `info`, `with-sae`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import BundleError
from rich.console import Console
from rich.table import Table

from faceteer_trainer.bundles.completion import complete, describe, with_sae
from faceteer_trainer.bundles.manifest import known, read_recipe
from faceteer_trainer.bundles.pull import pull
from faceteer_trainer.bundles.sources import Directory, Hub, Source

_HOME = Path("deploy") / "bundles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    actions = parser.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("pull", help="fetch a bundle's parts from where their authors publish them")
    fetch.add_argument("bundle", help=f"a known bundle ({', '.join(known())}) or the path of a bundle.json")
    fetch.add_argument("--out", type=Path, help=f"the bundle's directory; by default {_HOME}/NAME, or ./NAME elsewhere")
    place = fetch.add_mutually_exclusive_group()
    place.add_argument("--from", dest="directory", type=Path, help="published files on this machine: no network needed")
    place.add_argument("--mirror", help="the address of a mirror of the Hugging Face Hub")
    check = actions.add_parser("verify", help="hash every file and compare with bundle.json")
    check.add_argument("directory", type=Path)
    show = actions.add_parser("info", help="what a bundle is made of")
    show.add_argument("directory", type=Path)
    show.add_argument("--json", action="store_true")
    exchange = actions.add_parser("with-sae", help="a bundle with an SAE of your own; its library starts empty")
    exchange.add_argument("directory", type=Path, help="the bundle that supplies the other parts")
    exchange.add_argument("--sae", type=Path, required=True, help="what train-sae or import-sae wrote")
    exchange.add_argument("--out", type=Path, required=True, help="the new bundle's directory")
    every = actions.add_parser("list", help="bundles that can be pulled, and local ones")
    every.add_argument("directories", type=Path, nargs="*", default=[_HOME])


def run(arguments: argparse.Namespace) -> None:
    """Do it, and print what a person wants to know."""
    console = Console()
    match arguments.action:
        case "pull":
            _pull(arguments, console)
        case "verify":
            bundle = bundle_format.verify(arguments.directory)
            console.print(f"{bundle.name}: every file is as bundle.json says", highlight=False)
        case "info":
            found = describe(arguments.directory)
            if arguments.json:
                print(json.dumps(found, indent=1))
            else:
                _show(found, console)
        case "with-sae":
            made = with_sae(arguments.directory, arguments.sae, arguments.out)
            console.print(f"{made} is whole; give it a library with build-library", highlight=False, soft_wrap=True)
        case "list":
            _list(arguments.directories, console)


def _pull(arguments: argparse.Namespace, console: Console) -> None:
    recipe = read_recipe(arguments.bundle)
    home = _HOME / recipe.name if _HOME.is_dir() else Path(recipe.name)
    out = arguments.out or home
    source: Source
    if arguments.directory is not None:
        source = Directory(arguments.directory)
    else:
        source = Hub(arguments.mirror, out / "sources")
    pull(recipe, out, source, complete)
    console.print(f"{out} is whole; serve it with FACETEER_BUNDLE={out} make up", highlight=False, soft_wrap=True)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("part", "kind", "revision", "size", "parameters", "licence", title=f"{found['name']}")
    for name, part in found["parts"].items():
        size, parameters = f"{part['bytes'] / 1e6:,.1f} MB", f"{part['parameters']:,}" if part["parameters"] else ""
        table.add_row(name, part["kind"], part["revision"], size, parameters, part["licence"])
    console.print(found["description"], highlight=False)
    console.print(table)


def _list(directories: list[Path], console: Console) -> None:
    table = Table("bundle", "where", "parts", "size")
    here = set()
    for directory in directories:
        for manifest in sorted(directory.glob(f"*/{bundle_format.MANIFEST}")):
            try:
                found = describe(manifest.parent)
            except BundleError as error:
                table.add_row(manifest.parent.name, str(manifest.parent), f"[red]{error}[/red]", "")
                continue
            here.add(found["name"])
            size = sum(part["bytes"] for part in found["parts"].values())
            table.add_row(found["name"], str(manifest.parent), ", ".join(found["parts"]), f"{size / 1e6:,.1f} MB")
    for name in known():
        if name not in here:
            recipe = read_recipe(name)
            size = sum(wanted.size or wanted.about for wanted in recipe.files)
            table.add_row(name, "not pulled yet", ", ".join(recipe.parts), f"about {size / 1e9:,.0f} GB")
    console.print(table)

"""Options that several commands share. A group of them is a dataclass; :func:`grouped` makes it one option a field."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import faceteer
from faceteer.cli import arguments, completion, show

Picture = Annotated[
    Path,
    typer.Argument(
        help="A picture: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF; HEIC where the server reads it; or - for stdin.",
        show_default=False,
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, help="Features to show.")]
Feature = Annotated[
    str, typer.Argument(help="A label or an index.", show_default=False, autocompletion=completion.features)
]
Coverage = Annotated[float, typer.Option("--coverage", help="The share of the difference to carry.")]
SaveHtml = Annotated[
    Path | None, typer.Option("--save-html", metavar="FILE", help="Also write a page with pictures: one .html file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts on stdout, and nothing else.")]
Words = list[str] | None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: a parameter whose type is a dataclass becomes one for each of its fields."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(group, type)
        groups[parameter.name] = group, [field.name for field in fields(group)]
        hints = typing.get_type_hints(group, include_extras=True)
        for name, option in inspect.signature(group).parameters.items():
            parameters.append(option.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        for name, (group, names) in groups.items():
            given[name] = group(**{option: given.pop(option) for option in names})
        command(**given)

    vars(flat)["__signature__"] = inspect.Signature(parameters)
    return flat


@dataclass
class Call:
    """The server to ask, and how to answer."""

    context: typer.Context
    json: Json = False
    address: Annotated[
        str | None, typer.Option("--address", help="The server, host:port; FACETEER_ADDRESS, else localhost:50050.")
    ] = None
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait for each answer.")] = None

    @contextmanager
    def client(self) -> Iterator[faceteer.Client]:
        """A client; --address after the command overrides the one before it."""
        address = self.address if self.address is not None else self.context.find_root().obj
        with faceteer.connect(address, timeout=self.timeout) as client:
            yield client


@dataclass
class Edits:
    """Edits of features, by label or index."""

    switch: Annotated[
        Words,
        typer.Option(
            "--switch",
            metavar="FEATURE[=VALUE]",
            help="Set a feature, to 1.0 unless you say, and turn its rivals off.",
            autocompletion=completion.features,
        ),
    ] = None
    set: Annotated[
        Words,
        typer.Option(
            "--set",
            metavar="FEATURE[=VALUE]",
            help="Set a feature, to 1.0 unless you say; rivals stay.",
            autocompletion=completion.features,
        ),
    ] = None
    add: Annotated[
        Words,
        typer.Option(
            "--add",
            metavar="FEATURE=VALUE",
            help="Add to a feature; negative values subtract.",
            autocompletion=completion.features,
        ),
    ] = None
    scale: Annotated[
        Words,
        typer.Option(
            "--scale", metavar="FEATURE=FACTOR", help="Multiply a feature.", autocompletion=completion.features
        ),
    ] = None
    ablate: Annotated[
        Words,
        typer.Option("--ablate", metavar="FEATURE", help="Turn a feature off.", autocompletion=completion.features),
    ] = None
    unit: Annotated[
        str, typer.Option("--unit", help="scaled: 1 is the feature's 99th percentile; raw: the SAE's own units.")
    ] = "scaled"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) or () for name in ("set", "add", "scale", "switch", "ablate")}
        self.features = arguments.edits_of(given, self.unit)


@dataclass
class Filters:
    """The SDK's filters, which it checks itself."""

    alive: Annotated[bool | None, typer.Option("--alive/--dead", help="Only features that fire, or never fire.")] = None
    labelled: Annotated[
        bool | None, typer.Option("--labelled/--unlabelled", help="Only with, or without, a label.")
    ] = None
    label_sources: Annotated[
        Words, typer.Option("--source", metavar="WHO", help="Only labels from this source: automatic, model or person.")
    ] = None
    min_firing_share: Annotated[
        float | None,
        typer.Option(
            "--min-share", metavar="SHARE", help="Only features that fire on at least this share of pictures, 0 to 1."
        ),
    ] = None
    max_firing_share: Annotated[
        float | None,
        typer.Option("--max-share", metavar="SHARE", help="Only features that fire on at most this share of pictures."),
    ] = None
    min_detection_score: Annotated[
        float | None,
        typer.Option(
            "--min-detection",
            metavar="AUC",
            help="Only labels that predict where the feature fires at least this well.",
        ),
    ] = None
    max_detection_score: Annotated[
        float | None,
        typer.Option("--max-detection", metavar="AUC", help="Only labels that predict it at most this well."),
    ] = None
    min_causal_score: Annotated[
        float | None,
        typer.Option(
            "--min-causal",
            metavar="SCORE",
            help="Only labels that describe what the feature causes at least this well.",
        ),
    ] = None
    max_causal_score: Annotated[
        float | None,
        typer.Option("--max-causal", metavar="SCORE", help="Only labels that describe it at most this well."),
    ] = None
    scores_disagree: Annotated[
        bool | None, typer.Option("--disagree/--agree", help="Only where the label's two scores disagree, or agree.")
    ] = None
    include_safety_classes: Annotated[
        Words,
        typer.Option(
            "--include-class",
            metavar="CLASS",
            help="Also show this gated safety class, or 'all'; needs a FACETEER_ACCESS_KEY that allows it.",
        ),
    ] = None

    def given(self) -> Any:
        """As keyword arguments of a search or list."""
        classes = ["*" if name == "all" else name for name in self.include_safety_classes or ()]
        return {**vars(self), "label_sources": self.label_sources or None, "include_safety_classes": classes or None}


def opened(client: faceteer.Client, image: Path) -> faceteer.Photo:
    """Opens a picture's file, or what stdin holds, with a spinner on stderr meanwhile."""
    picture = _from_stdin() if str(image) == "-" else image
    with show.console(stderr=True).status(f"opening {image.name}"):
        return client.open(picture)


def _from_stdin() -> bytes:
    if sys.stdin.isatty():
        raise arguments.invalid(
            "- reads a picture from stdin, and nothing is piped in; write: … | faceteer open -", "image"
        )
    data = sys.stdin.buffer.read()
    if not data:
        raise arguments.invalid("stdin holds no picture (any more: it can be read once)", "image")
    return data

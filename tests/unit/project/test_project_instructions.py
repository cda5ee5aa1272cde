"""Every command, option and environment variable that the project names exists.

Read are the pages, and the strings in code: docstrings, help and error messages.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from faceteer.cli.run import app
from faceteer_runtime.settings import ServiceSettings
from faceteer_trainer.cli.jobs import Job

ROOT = Path(__file__).resolve().parents[3]
METRICS = ROOT / "services/runtime/faceteer_runtime/metrics.py"
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "clients/*/*.md", "services/*/*.md", "deploy/**/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
    # Histories tell of what was.
    if not page.name.startswith(("CHANGELOG", "log"))
]
CODE = [
    file
    for folder in ("clients", "services", "deploy", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
    if "v1" not in file.parts and file.name != "unasync.py"
]
OTHERS = [ROOT / "Makefile", ROOT / "docker-compose.yml", *ROOT.glob("deploy/**/*.yml"), ROOT / "deploy" / "Dockerfile"]
# Options of other programs that messages name.
FOREIGN = {"--app-dir", "--data-binary", "--group", "--shm-size"}


class Written(NamedTuple):
    """A piece of text that may hold a command."""

    place: str
    text: str


# --- what is written -------------------------------------------------------------------------------------------------


def code_in(page: Path) -> Iterator[Written]:
    """Fenced and indented blocks line by line, and what stands between backticks."""
    text = page.read_text()
    place = page.relative_to(ROOT).as_posix()
    blocks = re.compile(r"^( *)(```+).*?\n(.*?)^ *\2", re.DOTALL | re.MULTILINE)
    for block in blocks.finditer(text):
        yield from (Written(place, line) for line in block[3].replace("\\\n", " ").splitlines())
    prose = blocks.sub("", text)
    yield from (Written(place, line) for line in re.findall(r"^(?: {4}|\t)(.*)", prose, re.MULTILINE))
    yield from (Written(place, " ".join(span.split())) for span in re.findall(r"`([^`]+)`", prose))


@functools.cache
def strings_in(file: Path) -> list[Written]:
    """Every string of a module; what an f-string fills in is called WORD."""
    found = []
    tree = ast.parse(file.read_text())
    inside = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in ast.walk(node)}
    for node in ast.walk(tree):
        place = f"{file.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.JoinedStr):
            pieces = (piece.value if isinstance(piece, ast.Constant) else "WORD" for piece in node.values)
            found.append(Written(place, "".join(map(str, pieces))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            found.append(Written(place, node.value))
    return found


def snippets() -> Iterator[Written]:
    """Code in pages, and code between backticks or after a program's whole name in strings."""
    for page in PAGES:
        yield from code_in(page)
    for file in CODE:
        for place, text in strings_in(file):
            for span in re.findall(r"`+([^`]+)`+", text):
                yield Written(place, " ".join(span.split()))
            yield from (Written(place, line) for line in re.findall(r"python3? (?:-m |\w+/)[^`\n]*", text))


# --- what exists -----------------------------------------------------------------------------------------------------


@functools.cache
def jobs_of(package: str) -> dict[str, Job]:
    """The jobs of a command line of jobs, by name."""
    return dict(getattr(importlib.import_module(f"{package}.__main__"), "JOBS", {}))


@functools.cache
def job_parser(module: str) -> argparse.ArgumentParser:
    """A job's own parser."""
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    return parser


def options_of(parser: argparse.ArgumentParser, words: list[str] | None = None) -> set[str]:
    """A parser's options, with those of the subcommand that the words name, or of all."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                if words is None or name in words:
                    found |= options_of(child, words)
    return found


@functools.cache
def settings_classes() -> list[type[ServiceSettings]]:
    """Those whose tables docs/configuration.md shows, which another test holds against the code."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    named = re.findall(r"<!-- settings: ([\w.]+):(\w+) -->", page)
    return [getattr(importlib.import_module(module), name) for module, name in named]


@functools.cache
def settings_names() -> set[str]:
    return {name for settings in settings_classes() for name in settings.model_fields}


def walk_typer(command: Any, words: list[str]) -> tuple[set[str], list[str]]:
    """Options of the commands along the words, and those that name no command."""
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    children = getattr(command, "commands", {})
    names = [word for word in words if not word.startswith("-")]
    if not children or not names:
        return options, []
    # `faceteer --address A open` is written with an option's value before the command.
    found = next((number for number, word in enumerate(words) if word in children), None)
    if found is None:
        return options, names[:1]
    below, unknown = walk_typer(children[words[found]], words[found + 1 :])
    return options | below, unknown


@functools.cache
def every_option() -> set[str]:
    """Of every command of ours."""
    found = {"--all-in-one", "--check", "--help", *(f"--{name.replace('_', '-')}" for name in settings_names())}
    for package in ("faceteer_trainer", "faceteer_postcards"):
        for job in jobs_of(package).values():
            found |= options_of(job_parser(job.module))
    waiting = [typer.main.get_command(app)]
    while waiting:
        command = waiting.pop()
        found |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        waiting += getattr(command, "commands", {}).values()
    for script in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("deploy/*.py"), *ROOT.glob("examples/**/*.py")):
        found |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', script.read_text()))
    return found


def words_of(line: str) -> list[str]:
    """A command's words, without what the shell does after it."""
    line = re.split(r"\s+#|[|;>]|&&|\)$", line.replace("`", ""))[0]
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def given_options(words: list[str]) -> set[str]:
    """Long ones, as they are spelled: `--set=1`, `[--json` and `--json]` are `--set` and `--json`."""
    return {match[0] for word in words if (match := re.match(r"--[a-z][a-z0-9-]*", word.strip("[](),.")))}


def faults(line: str) -> Iterator[str]:
    """What is wrong with the command in a line, if there is one."""
    if found := re.search(r"(?:^|[\s(/])make ([a-z][a-z-]*)", line):
        if not re.match(r"(?:[A-Z_]+=\S+ |sudo )*make |^- run: make ", line):
            return
        if not re.search(rf"^{found[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            yield f"make has no target {found[1]}"
    elif found := re.match(r"(faceteer_[a-z]+_[a-z_]+?)(?:_total|_bucket|_sum|_count)?$", line):
        if f'"{found[1]}"' not in METRICS.read_text():
            yield f"there is no metric {found[1]}"
    elif found := re.search(r"(?:python3? -m |^)(faceteer_[a-z]+)((?:\.\w+)*) ?(.*)", line):
        yield from faults_of_module(found[1], found[2], found[3], "-m " in found[0])
    elif found := re.search(r"python3? ((?:benchmarks|deploy|protos|examples)/[\w/]+\.py)(.*)", line):
        script = ROOT / found[1]
        if not script.is_file():
            yield f"{found[1]} does not exist"
            return
        yield from (
            f"{found[1]} has no option {o}" for o in given_options(words_of(found[2])) if o not in script.read_text()
        )
    elif found := re.match(r"(?:\.venv/bin/|[A-Z_]+=\S+ )*(?:faceteer|…) (.+)", line):
        words = words_of(found[1])
        options, unknown = walk_typer(typer.main.get_command(app), words)
        if found[0].startswith("…") or re.fullmatch(r"[A-Z]+|…", words[-1]):
            unknown = []
        yield from (f"faceteer has no command {name}" for name in unknown)
        yield from (f"faceteer {words[0]} has no option {o}" for o in given_options(words) - options - {"--help"})


def faults_of_module(package: str, below: str, rest: str, is_run: bool) -> Iterator[str]:
    words = words_of(rest)
    if importlib.util.find_spec(package) is None:
        yield f"there is no package {package}"
    elif below:
        module, _, name = (package + below).rpartition(".")
        if not exists(package + below) and (is_run or not exists(module) or not defines(module, name)):
            yield f"there is no {package}{below}"
    elif jobs := jobs_of(package):
        if not words or re.fullmatch(r"[A-Z]+|\W*", words[0]) or words[0].startswith("-"):
            return
        if words[0] not in jobs:
            yield f"{package} has no job {words[0]}"
            return
        known = options_of(job_parser(jobs[words[0]].module), words) | {"--help"}
        yield from (f"{package} {words[0]} has no option {o}" for o in given_options(words) - known)
    else:
        yield from (f"{package} has no option {o}" for o in given_options(words) - every_option())


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def defines(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name)


# --- the tests -------------------------------------------------------------------------------------------------------


def test_every_command_that_is_named_exists_with_its_options() -> None:
    found = [f"{place}: {fault} in {line!r}" for place, line in snippets() for fault in faults(line)]
    assert not found, "\n".join(found)


def test_every_option_that_is_named_by_itself_belongs_to_a_command() -> None:
    found = [
        f"{place}: {option}"
        for place, text in (
            *(span for page in PAGES for span in code_in(page)),
            *(s for f in CODE for s in strings_in(f)),
        )
        # Of pages only what begins with an option: commands are checked as a whole. Style sheets have variables.
        if (text.startswith("--") or not place.endswith(".md")) and "var(--" not in text
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
        # An option that is a whole string is handed to a program, not to a reader.
        if option not in every_option() | FOREIGN and (option != text or place.endswith(".md"))
    ]
    assert not found, "\n".join(found)


def test_every_environment_variable_that_is_named_is_read() -> None:
    read = {f"FACETEER_{name.upper()}" for name in settings_names()}
    read |= {text for file in CODE for _, text in strings_in(file) if re.fullmatch("FACETEER_[A-Z_]+", text)}
    read |= set(re.findall(r"\$\{(FACETEER_[A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in (*PAGES, *CODE, *OTHERS)
        for name in re.findall(r"(?<!_)FACETEER_[A-Z0-9_]*[A-Z0-9]", file.read_text())
        if name not in read
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("make lint", None),
        ("make coffee", "make has no target coffee"),
        ("python -m faceteer_trainer export-onnx --bundle DIR", None),
        ("python -m faceteer_trainer export-tea --bundle DIR", "faceteer_trainer has no job export-tea"),
        ("faceteer_trainer export-onnx --bundel DIR", "faceteer_trainer export-onnx has no option --bundel"),
        ("python -m faceteer_sae --sae-max-edits 3", None),
        ("python -m faceteer_sae --sae-max-edit 3", "faceteer_sae has no option --sae-max-edit"),
        ("python -m faceteer_runtime.healthchek", "there is no faceteer_runtime.healthchek"),
        ("faceteer_runtime.bundle.seal(directory)", None),
        ("faceteer_runtime.bundle.unseal(directory)", "there is no faceteer_runtime.bundle.unseal"),
        ("faceteer features list --disagree", None),
        ("faceteer --address A features list --scores-disagree", "faceteer --address has no option --scores-disagree"),
        ("faceteer featrues list", "faceteer has no command featrues"),
        ("python benchmarks/tea.py", "benchmarks/tea.py does not exist"),
    ],
)
def test_a_wrong_instruction_is_found(line: str, fault: str | None) -> None:
    assert list(faults(line)) == ([] if fault is None else [fault])

"""What the import graph must look like; who may import whom stands in pyproject.toml, for import-linter."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
CODE = [ROOT / "clients", ROOT / "services", ROOT / "benchmarks", ROOT / "deploy"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import of every member, those for type checkers and those inside functions too."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(graph: grimp.ImportGraph, package: str) -> None:
    modules = graph.find_descendants(package) | {package}
    refuse_circles({module: graph.find_modules_directly_imported_by(module) for module in modules})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_folders_import_each_other(graph: grimp.ImportGraph, package: str) -> None:
    modules = graph.find_descendants(package) | {package}
    parents = {module for module in modules if graph.find_children(module)}
    folder = {module: module if module in parents else module.rpartition(".")[0] for module in modules}
    folders: dict[str, set[str]] = {parent: set() for parent in parents}
    for module in modules:
        for imported in graph.find_modules_directly_imported_by(module) & modules:
            here, there = folder[module], folder[imported]
            # A folder and one inside it are one place.
            if not (here + ".").startswith(there + ".") and not (there + ".").startswith(here + "."):
                folders[here].add(there)
    refuse_circles(folders)


def refuse_circles(imports: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        # The sorter lists a circle from the imported to the importer.
        pytest.fail("imports run in a circle: " + " -> ".join(reversed(error.args[1])), pytrace=False)


def test_an_import_inside_a_function_says_why() -> None:
    unexplained = [place for file in sorted(written()) for place in imports_without_reason(file)]
    assert not unexplained, "put it at the top, or the reason in a comment beside or above it:\n" + "\n".join(
        unexplained
    )


def written() -> Iterator[Path]:
    for folder in CODE:
        for file in folder.rglob("*.py"):
            if "v1" not in file.parts:
                yield file


def imports_without_reason(file: Path) -> Iterator[str]:
    text = file.read_text()
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and not _has_comment(lines, node.lineno):
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {lines[node.lineno - 1].strip()}"


def test_benchmarks_tools_and_examples_import_what_is_there() -> None:
    # No other test runs the benchmarks.
    missing = []
    for file in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("deploy/*.py"), *ROOT.glob("examples/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("faceteer"):
                module = importlib.import_module(str(node.module)) if _found(str(node.module)) else None
                for name in node.names:
                    if not hasattr(module, name.name) and not _found(f"{node.module}.{name.name}"):
                        missing.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.module}.{name.name}")
    assert not missing, "\n".join(missing)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _has_comment(lines: list[str], number: int) -> bool:
    """Whether the line carries a comment or one stands above it, above ``try:`` and neighbouring imports."""
    if "#" in lines[number - 1]:
        return True
    for line in reversed(lines[: number - 1]):
        words = line.strip()
        if words.startswith("#"):
            return True
        if not words.startswith(("import ", "from ", "try:")):
            return False
    return False


def test_a_circle_is_named_in_the_order_of_its_imports() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c"):
        refuse_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})


def test_an_unexplained_import_is_found_and_an_explained_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    import a\n\n    # heavy\n    try:\n        import b\n        import c\n    except: ...\n"
    )
    assert list(imports_without_reason(file)) == ["module.py:2: import a"]

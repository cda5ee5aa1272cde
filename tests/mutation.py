"""Plants random single-line faults in the domain modules, and counts those that the members' unit tests notice.

    make mutation                                              150 faults, the same ones each time
    make mutation MUTATION_ARGS="--member sae --count 30"      of one member only

Everything happens in copies of the working tree. First each test file runs by itself on the unchanged code, and the
lines that it reaches are recorded. A fault is then given to the files that reach its line, the quickest first, until
one of them fails; a fault whose line no file reaches survives untried. Faults come from Cosmic Ray's operators. A place
in the code counts once, however many operators fit it, and annotations, which do nothing, do not count.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]
EDGES = {"__init__", "__main__", "settings", "service", "servicer", "messages"}
# Which modules of a member decide or compute; of the generator those that schedule, as its decoders take minutes.
DOMAIN = {
    "runtime": lambda module: module != "__init__",
    "sae": lambda module: module not in EDGES,
    "generator": lambda module: module in {"application", "delivery", "engine", "generation", "queue", "requests"},
    "library": lambda module: module not in EDGES,
    "studio": lambda module: module not in EDGES | {"all_in_one"},
}
LEAST = 0.85


class Place(NamedTuple):
    """A place in the code, and the operators that fit it, each with the number of the place among all that fit."""

    member: str
    path: Path
    choices: list[tuple[str, int]]


class Fault(NamedTuple):
    """One changed place."""

    member: str
    path: str
    line: int
    before: str
    after: str
    source: str


class Outcome(NamedTuple):
    """What became of a fault: the test file that noticed it, or None."""

    fault: Fault
    noticed_by: str | None
    files_run: int
    seconds: float


class TestFile(NamedTuple):
    """A test file on unchanged code: how long it takes, and which lines of which modules it reaches."""

    path: str
    seconds: float
    lines: dict[str, set[int]]


def copy_of_the_tree(target: Path) -> Path:
    """The files that git knows or would know, as they stand."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(tree: Path, arguments: list[str], timeout: float) -> bool:
    """Whether pytest passes in a copy of the tree, in time."""
    members = [
        str(path.parent) for path in (*tree.glob("services/*/pyproject.toml"), *tree.glob("clients/*/pyproject.toml"))
    ]
    tools = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # Bytecode of a faulty module must not outlive it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(members + tools), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments, "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        # Servers that the tests started too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def observe(tree: Path, member: str, file: str) -> TestFile:
    """Run one test file on unchanged code, recording the lines it reaches."""
    package = f"services/{member}/faceteer_{member}"
    data = tree / f".coverage.{Path(file).stem}"
    for _attempt in range(2):
        began = time.perf_counter()
        arguments = ["-m", "coverage", "run", f"--data-file={data}", f"--source={package}", "-m", "pytest", file]
        if run_tests(tree, arguments, 600):
            break
    else:
        raise SystemExit(f"{file} fails on unchanged code")
    seconds = time.perf_counter() - began
    found = CoverageData(str(data))
    found.read()
    lines = {os.path.relpath(name, tree): set(found.lines(name) or ()) for name in found.measured_files()}
    return TestFile(file, seconds, lines)


@functools.cache
def operators() -> dict[str, object]:
    """Cosmic Ray's operators that need no arguments, by name."""
    found = {name: cosmic_ray.plugins.get_operator(name) for name in cosmic_ray.plugins.operator_names()}
    return {name: operator() for name, operator in found.items() if not operator.arguments()}


def places_of(member: str, path: Path) -> list[Place]:
    """The places of a module that can be changed."""
    source = path.read_text()
    idle = {spot for node in ast.walk(ast.parse(source)) for spot in annotation_columns(node)}
    tree = get_ast(source)
    found: dict[tuple[object, str], list[tuple[str, int]]] = defaultdict(list)
    for name, operator in operators().items():
        positions = (spot for node in ast_nodes(tree) for spot in operator.mutation_positions(node))
        for occurrence, (start, _end) in enumerate(positions):
            if start not in idle:
                found[start, name.split("_")[0]].append((name, occurrence))
    return [Place(member, path, choices) for choices in found.values()]


def fault_at(place: Place, chance: random.Random) -> Fault | None:
    """One of a place's changes, by lot; None where all do nothing."""
    source = place.path.read_text()
    for name, occurrence in chance.sample(place.choices, len(place.choices)):
        try:
            changed = mutate_code(source, operators()[name], occurrence)
        except AttributeError:
            continue  # Cosmic Ray 8.7 cannot replace a dotted name among the exceptions of one `except`
        if changed is not None and (fault := as_fault(place.member, place.path, source, changed)):
            return fault
    return None


def annotation_columns(node: ast.AST) -> Iterator[tuple[int, int]]:
    """Every (line, column) that lies in an annotation of the node."""
    notes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for note in filter(None, notes):
        for line in range(note.lineno, note.end_lineno + 1):
            first = note.col_offset if line == note.lineno else 0
            last = note.end_col_offset if line == note.end_lineno else 500
            yield from ((line, column) for column in range(first, last + 1))


def as_fault(member: str, path: Path, source: str, changed: str) -> Fault | None:
    """The change as a fault, or None where it does nothing or is no Python."""
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    # A decorator is dropped with the empty line before it, which no test reaches.
    number, before, after = next((n, a, b) for n, (a, b) in enumerate(pairs, 1) if a != b and a.strip())
    return Fault(member, path.relative_to(ROOT).as_posix(), number, before.strip(), after.strip(), changed)


def judge(trees: queue.Queue[Path], fault: Fault, tests: list[TestFile]) -> Outcome:
    """Give a fault to the test files that reach its line."""
    began = time.perf_counter()
    tree = trees.get()
    module = tree / fault.path
    original = module.read_text()
    ran = 0
    try:
        module.write_text(fault.source)
        for test in sorted(tests, key=lambda test: test.seconds):
            if fault.line in test.lines.get(fault.path, ()):
                ran += 1
                if not run_tests(tree, ["-m", "pytest", test.path], 3 * test.seconds + 30):
                    return Outcome(fault, test.path, ran, time.perf_counter() - began)
        return Outcome(fault, None, ran, time.perf_counter() - began)
    finally:
        module.write_text(original)
        trees.put(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150, help="how many faults")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--member", action="append", choices=DOMAIN, help="only of this one; may be repeated")
    parser.add_argument("--workers", type=int, default=2, help="faults tried at once, each in a copy of its own")
    parser.add_argument("--json", type=Path, help="a file for every fault and what became of it")
    arguments = parser.parse_args()
    members = arguments.member or list(DOMAIN)
    chance = random.Random(arguments.seed)
    places = [
        place
        for member in members
        for path in sorted((ROOT / "services" / member / f"faceteer_{member}").rglob("*.py"))
        if DOMAIN[member](path.stem)
        for place in places_of(member, path)
    ]
    faults = filter(None, (fault_at(place, chance) for place in chance.sample(places, len(places))))
    sample = list(islice(faults, arguments.count))
    print(f"{len(places)} places in {', '.join(members)}; {len(sample)} drawn with seed {arguments.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="faceteer-mutation-") as home,
        ThreadPoolExecutor(arguments.workers) as pool,
    ):
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(arguments.workers):
            trees.put(copy_of_the_tree(Path(home) / str(number)))

        def observed(member: str, file: str) -> TestFile:
            tree = trees.get()
            try:
                return observe(tree, member, file)
            finally:
                trees.put(tree)

        wanted = [
            (member, file.relative_to(ROOT).as_posix())
            for member in sorted({fault.member for fault in sample})
            for file in sorted((ROOT / "tests" / "unit" / member).rglob("test_*.py"))
        ]
        tests: dict[str, list[TestFile]] = defaultdict(list)
        for (member, _), test in zip(wanted, pool.map(lambda pair: observed(*pair), wanted), strict=True):
            tests[member].append(test)
        print(f"{len(wanted)} test files pass, {sum(t.seconds for ts in tests.values() for t in ts):.0f} s", flush=True)
        outcomes = []
        for outcome in pool.map(lambda fault: judge(trees, fault, tests[fault.member]), sample):
            outcomes.append(outcome)
            fault, by = outcome.fault, outcome.noticed_by
            print(f"{len(outcomes):4} {'noticed ' if by else 'SURVIVED'} {fault.path}:{fault.line}", flush=True)
    return report(outcomes, arguments.json)


def report(outcomes: list[Outcome], target: Path | None) -> int:
    """Survivors, scores by member and in all."""
    print("\nSurvivors:")
    for fault in (outcome.fault for outcome in outcomes if outcome.noticed_by is None):
        print(f"{fault.path}:{fault.line}\n    - {fault.before}\n    + {fault.after}")
    print()
    for member in (*dict.fromkeys(outcome.fault.member for outcome in outcomes), ""):
        those = [outcome for outcome in outcomes if outcome.fault.member.startswith(member)]
        noticed = sum(outcome.noticed_by is not None for outcome in those)
        print(f"{member or 'all':10} {noticed:4} of {len(those):4} noticed, {noticed / len(those):.1%}")
    if target:
        rows = [o.fault._asdict() | o._asdict() | {"fault": None, "source": None} for o in outcomes]
        target.write_text(json.dumps(rows, indent=1))
    return 0 if noticed >= LEAST * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

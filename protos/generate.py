"""Generates the Python code of the contract into the SDK, or checks that the committed code is up to date.

Knows nothing of what the contract says. Usage: ``python protos/generate.py [--check]``.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
TARGET = ROOT / "clients" / "python"
PACKAGE = Path("faceteer") / "v1"


def generate(target: Path) -> None:
    """Writes ``faceteer/v1/*_pb2*.py[i]`` under ``target``."""
    sources = sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / PACKAGE).glob("*.proto"))
    (target / PACKAGE).mkdir(parents=True, exist_ok=True)
    well_known = Path(protoc.__file__).resolve().parent / "_proto"
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", *plugins]
    arguments += [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    arguments += [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    if protoc.main([*arguments, *sources]) != 0:
        raise SystemExit("protoc failed; see above")
    for source in sources:
        if "\nservice " not in (PROTOS / source).read_text():
            # A file of messages only gets an empty stub module from grpc_python_out.
            for suffix in (".py", ".pyi"):
                (target / source).with_name(Path(source).stem + "_pb2_grpc" + suffix).unlink(missing_ok=True)


def differences(fresh: Path) -> list[str]:
    """Names of generated files that differ between ``fresh`` and the SDK, or exist in one only."""
    names = {path.name for root in (fresh, TARGET) for path in (root / PACKAGE).glob("*_pb2*")}
    pairs = {name: (fresh / PACKAGE / name, TARGET / PACKAGE / name) for name in names}
    return sorted(
        name
        for name, (new, old) in pairs.items()
        if not (new.exists() and old.exists() and filecmp.cmp(new, old, shallow=False))
    )


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(TARGET)
        return
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        stale = differences(Path(directory))
    if stale:
        raise SystemExit(f"generated code is out of date (run `make protos`): {', '.join(stale)}")
    print("generated code is up to date")


if __name__ == "__main__":
    main()

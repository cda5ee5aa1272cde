"""protos/ alone, as a clone has it, compiles with the tools of other languages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[3]
PROTOS = [path.relative_to(ROOT / "protos").as_posix() for path in sorted((ROOT / "protos").rglob("*.proto"))]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the contract consists of, in a folder with nothing else."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def run(folder: Path, program: str, *options: str) -> None:
    """Runs one of the tools that `make setup` installs."""
    command = [str(Path(sys.executable).parent / program), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def protoc(folder: Path, *options: str) -> None:
    """As its page tells everybody to; it brings google/protobuf and nothing else of Google's."""
    run(folder, "protoc", "-I", "protos", *options, *PROTOS)


@pytest.mark.parametrize(
    ("language", "made"),
    [("cpp", "faceteer/v1/studio.pb.h"), ("java", "faceteer/v1/Studio.java"), ("csharp", "Studio.cs")],
)
def test_protoc_compiles_the_contract_for_another_language(clone: Path, language: str, made: str) -> None:
    (clone / "out").mkdir()
    protoc(clone, f"--{language}_out=out")
    assert (clone / "out" / made).is_file()


def test_buf_builds_the_contract(clone: Path) -> None:
    run(clone, "buf", "build", "-o", "image.binpb")
    assert (clone / "image.binpb").stat().st_size > 0


def test_the_contract_imports_itself_and_what_every_protobuf_library_brings(clone: Path) -> None:
    """Node's proto-loader, too, brings google/protobuf only."""
    protoc(clone, "--include_imports", "--descriptor_set_out=contract.binpb")
    files = FileDescriptorSet.FromString((clone / "contract.binpb").read_bytes()).file
    assert {file.name for file in files} >= set(PROTOS)
    assert [file.name for file in files if not file.name.startswith(("faceteer/v1/", "google/protobuf/"))] == []


def test_every_file_of_the_contract_says_which_go_package_it_becomes(clone: Path) -> None:
    """protoc-gen-go refuses a file that does not say."""
    protoc(clone, "--descriptor_set_out=contract.binpb")
    files = FileDescriptorSet.FromString((clone / "contract.binpb").read_bytes()).file
    assert {file.options.go_package for file in files} == {"faceteer/v1;faceteerv1"}

"""What every member of the repository must have, so that a new one is not forgotten anywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MEMBERS = sorted(
    path.parent for path in (*ROOT.glob("clients/*/pyproject.toml"), *ROOT.glob("services/*/pyproject.toml"))
)
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)


def packages(member: Path) -> list[str]:
    built = tomllib.loads((member / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    return list(built["packages"])


@each_member
def test_a_member_carries_the_licence_and_says_so(member: Path) -> None:
    # Copies, because a wheel or an sdist cannot reach above its own project.
    for name in ("LICENSE", "NOTICE"):
        assert (member / name).read_bytes() == (ROOT / name).read_bytes(), f"copy {name} from the root"
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE", "NOTICE"]


@each_member
def test_a_member_is_installed_typed_and_guarded(member: Path) -> None:
    place = member.relative_to(ROOT).as_posix()
    assert re.search(rf"[ \t]{place}\b", (ROOT / "Makefile").read_text())
    for package in packages(member):
        assert (member / package / "py.typed").is_file()
        assert package in TOOLS["importlinter"]["root_packages"]
    assert place in TOOLS["mypy"]["mypy_path"]


@each_member
def test_the_readme_tells_what_a_member_is_for(member: Path) -> None:
    assert f"\n{member.relative_to(ROOT).as_posix()}/ " in (ROOT / "README.md").read_text()

"""Pages link to files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("", "docs/**/", "clients/*/", "services/*/", "deploy/**/", "examples/**/")
PAGES = [page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md")]


def test_every_relative_link_leads_somewhere() -> None:
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not dead, "\n".join(dead)


def test_every_test_that_a_page_names_is_there() -> None:
    tests = {file.name: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for page in PAGES:
        file = ""
        for named, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?", page.read_text()):
            file = named or file
            if named and named not in tests:
                missing.append(f"{page.relative_to(ROOT)}: {named}")
            elif test and f"def {test}(" not in tests.get(file, ""):
                missing.append(f"{page.relative_to(ROOT)}: {file}::{test}")
    assert not missing, "\n".join(missing)

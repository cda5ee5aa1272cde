"""Writes the tables of docs/configuration.md from the settings classes that the page itself names.

Usage: ``python -m faceteer_runtime.settings_page docs/configuration.md [--check]``.
A table stands between ``<!-- settings: package.module:Class -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from faceteer_runtime.settings import ServiceSettings, fields_table

_BLOCK = re.compile(r"(<!-- settings: (?P<module>[\w.]+):(?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """``page`` with every table as the code has it; a subclass shows only the fields of its own."""
    return _BLOCK.sub(_table, page)


def _table(match: re.Match[str]) -> str:
    settings: type[ServiceSettings] = getattr(importlib.import_module(match["module"]), match["name"])
    without = None if settings is ServiceSettings else ServiceSettings
    return f"{match[1]}\n{fields_table(settings, without=without)}\n{match[4]}"


def main(arguments: list[str]) -> int:
    """Rewrites the page, or with ``--check`` only says whether it is up to date (exit status)."""
    check = "--check" in arguments
    (name,) = [argument for argument in arguments if argument != "--check"]
    page = Path(name).read_text(encoding="utf-8")
    fresh = render(page)
    if check and fresh != page:
        print(f"{name} is out of date: python -m faceteer_runtime.settings_page {name}", file=sys.stderr)
        return 1
    if not check:
        Path(name).write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

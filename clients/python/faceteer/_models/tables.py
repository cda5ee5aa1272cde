"""Rows as aligned text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """Columns that ``text`` takes on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned columns under a ruled header: the first ``left`` to the left, the rest to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = []
        for column, cell in enumerate(line):
            space = " " * (widths[column] - width(cell))
            cells.append(cell + space if column < left else space + cell)
        return "  ".join(cells).rstrip()

    rule = "  ".join("─" * each for each in widths)
    return "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])])

"""The hook between values and their views: values say that they can be shown, the views register how.

Values import no view. :mod:`faceteer._views` registers one for each kind when the package is imported.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from faceteer._files import write_atomically


@functools.singledispatch
def html_of(value: Any, *, page: bool) -> str:
    """A value as HTML: a notebook's cell, or a page of its own, which has room for more."""
    raise TypeError(f"no view is registered for {type(value).__name__}")


class Shown:
    """A value that a notebook shows and that can be kept as a page."""

    def _repr_html_(self) -> str:
        return html_of(self, page=False)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes it as a page of its own, all or nothing, and returns the path. Raises OSError."""
        return write_atomically(path, html_of(self, page=True).encode())


class Named:
    """A feature by index, and by label where it has one (empty otherwise)."""

    index: int
    label: str
    #: Which of ``label_count`` features with its label it is; the first is the one that the label means. 0: not told.
    label_rank = 0
    label_count = 0

    @property
    def told_apart(self) -> str:
        """Its label, and for one that the label does not mean which one it is: "balloon (2nd of 14)"."""
        rank = self.label_rank
        if rank < 2:
            return self.label
        ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
        return f"{self.label} ({rank}{ending} of {self.label_count})"

    @property
    def name(self) -> str:
        """Its label, or "#412"."""
        return self.label or f"#{self.index}"

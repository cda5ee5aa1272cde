"""A feature's icon: a strip of pictures of what turning the feature up causes.

Knows nothing of calls, nor of how icons are made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from faceteer._writing import write_atomically


@dataclass(frozen=True)
class FeatureIcon:
    """What turning a feature up causes: the template at the left, the feature at rising strength to the right.

    Attributes:
        image: the whole strip.
        strengths: SCALED, left to right.
        data: the strip as the server sent it, a whole WebP file.
    """

    image: Image.Image
    strengths: tuple[float, ...]
    data: bytes = field(repr=False, compare=False)

    @property
    def tiles(self) -> tuple[Image.Image, ...]:
        """The strip's pictures, left to right: the template, then one for each strength."""
        width, height = self.image.size
        n = len(self.strengths) + 1
        # Squares may stand a little apart; pictures of another shape are taken as equal shares of the strip.
        apart = width - n * height
        side = float(height) if 0 <= apart <= n * height // 8 else width / n
        step = (width - side) / max(1, n - 1)
        lefts = [round(place * step) for place in range(n)]
        return tuple(self.image.crop((left, 0, left + round(side), height)) for left in lefts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the strip, all or nothing, and returns the path: the file as it came where ``path`` ends in .webp,
        else converted to what the ending says.

        Raises:
            OSError: the file cannot be written.
            ValueError: the ending names no format.
        """
        target = Path(path)
        if target.suffix.lower() == ".webp":
            return write_atomically(target, self.data)
        from io import BytesIO

        formats = Image.registered_extensions()
        if target.suffix.lower() not in formats:
            raise ValueError(f"{target} has no ending that names a picture format; end it with .webp, .png or .jpg")
        buffer = BytesIO()
        self.image.convert("RGB").save(buffer, formats[target.suffix.lower()])
        return write_atomically(target, buffer.getvalue())

    def _repr_html_(self) -> str:
        from faceteer._feature_views import icon_view

        return icon_view(self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the icon as a page of its own, and returns the path."""
        from faceteer._feature_views import icon_view
        from faceteer._html import save_page

        return save_page(path, "Icon", icon_view(self))

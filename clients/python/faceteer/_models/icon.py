"""A feature's icon: a strip of pictures of what turning the feature up causes."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from faceteer._files import write_atomically
from faceteer._models.pictures import decode_picture
from faceteer._models.shown import Shown
from faceteer.v1 import library_pb2


@dataclass(frozen=True)
class FeatureIcon(Shown):
    """What turning a feature up causes: the template at the left, the feature at rising strength to the right.

    Attributes:
        image: the whole strip.
        strengths: SCALED, left to right.
        data: the strip as the server sent it, a whole WebP file.
    """

    image: Image.Image
    strengths: tuple[float, ...]
    data: bytes = field(repr=False, compare=False)

    @classmethod
    def from_proto(cls, message: library_pb2.GetFeatureIconResponse) -> FeatureIcon:
        """From the wire. Raises InternalError when the strip cannot be read."""
        strengths = tuple(message.strengths)
        return cls(decode_picture(message.icon, strengths=strengths), strengths, message.icon)

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
        formats = Image.registered_extensions()
        if target.suffix.lower() not in formats:
            raise ValueError(f"{target} has no ending that names a picture format; end it with .webp, .png or .jpg")
        buffer = io.BytesIO()
        self.image.convert("RGB").save(buffer, formats[target.suffix.lower()])
        return write_atomically(target, buffer.getvalue())

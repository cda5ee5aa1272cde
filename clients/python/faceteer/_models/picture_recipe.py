"""The recipe inside a picture's file: the one writer and reader of where it stands.

PNG holds it in an iTXt chunk with the keyword ``faceteer:recipe``; WebP and JPEG hold it in their XMP packet, as the
attribute ``recipe`` of the namespace ``urn:faceteer:recipe``. Both are UTF-8, and any other program may read them.
"""

from __future__ import annotations

import io
import json
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEYWORD = "faceteer:recipe"
NAMESPACE = "urn:faceteer:recipe"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
#: What a recipe can be read out of, for messages.
FORMATS = "PNG, WebP and JPEG"
# A JPEG's packet is one segment, whose length is two bytes; Pillow refuses more.
_JPEG_MOST = 65_000
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"RIFF", b"\xff\xd8\xff")


def save_options(recipe: str, format: str) -> dict[str, Any]:
    """Pillow's options that write ``recipe`` (JSON) into a file of this format; none where the format has no place."""
    if format == "PNG":
        chunks = PngInfo()
        chunks.add_itxt(KEYWORD, recipe)
        return {"pnginfo": chunks}
    if format in ("WEBP", "JPEG"):
        packet = _packet(recipe)
        return {"xmp": packet} if format == "WEBP" or len(packet) <= _JPEG_MOST else {}
    return {}


def is_picture(data: bytes) -> bool:
    """Whether a file is of a kind that may hold a recipe."""
    return data.startswith(_MAGIC)


def recipe_in(data: bytes) -> str | None:
    """The recipe (JSON) in a picture's file; None where it has none, or is no picture that can be read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            text, packet = image.info.get(KEYWORD), image.info.get("xmp")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if isinstance(text, str):
        return str(text)
    return _from_packet(packet) if isinstance(packet, bytes) else None


class RenderedPicture(Image.Image):
    """A drawn picture, whose ``save`` writes its recipe into the file. What is made from it is a plain image."""

    @classmethod
    def of(cls, image: Image.Image) -> RenderedPicture:
        """A copy of ``image``, with its ``info``."""
        picture = cls()
        picture.__setstate__(image.__getstate__())
        picture.format = image.format
        return picture

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As Pillow's; options given win."""
        kind = format or Image.registered_extensions().get(_ending(fp), "")
        recipe = self.info.get("recipe")
        own = save_options(recipe, kind.upper()) if isinstance(recipe, str) else {}
        super().save(fp, format, **(own | params))


def _ending(fp: Any) -> str:
    name = str(getattr(fp, "name", fp))
    return f".{name.rpartition('.')[2].lower()}"


def _packet(recipe: str) -> bytes:
    # JSON's own escapes, since a label may hold what XML cannot.
    recipe = "".join(letter if letter.isascii() else json.dumps(letter)[1:-1] for letter in recipe)
    return (
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about="" xmlns:faceteer="{NAMESPACE}" '
        f'faceteer:recipe={quoteattr(recipe, {chr(10): "&#10;"})}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def _from_packet(packet: bytes) -> str | None:
    # A packet has no use for a document type, which could define entities that grow without bound.
    if b"<!DOCTYPE" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.rstrip(b"\0").decode())
    except (ElementTree.ParseError, UnicodeDecodeError):
        return None
    found = (one.get(f"{{{NAMESPACE}}}recipe") for one in root.iter(f"{{{_RDF}}}Description"))
    return next((recipe for recipe in found if recipe is not None), None)

"""Self-contained HTML: escaped text, pictures as data URLs within a budget, one style throughout.

No script, no request: a view works in any notebook, light or dark, and offline.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

#: Bytes of pictures in one view: a notebook, which keeps every output, and a file of one's own.
NOTEBOOK_BYTES = 1_500_000
#: Seconds that a view in a notebook may wait for what it lacks: a cell should not hang because a server is gone.
NOTEBOOK_SECONDS = 3.0
FILE_BYTES = 16_000_000
_SIDE = 144
_LARGEST_AS_IS = 12_000
_KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"))


def _css(name: str) -> str:
    rules = (Path(__file__).parent / name).read_text()
    return re.sub(r"/\*.*?\*/", "", rules, flags=re.DOTALL).replace("\n", "")


_STYLE, _PAGE = _css("notebook.css"), _css("page.css")


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: str) -> Markup:
    """Other people's words as HTML: nothing in them is markup, whatever they say."""
    return value if isinstance(value, Markup) else Markup(html.escape(value, quote=True))


def join(parts: Sequence[str]) -> Markup:
    """Parts, escaped unless they are HTML already, one after another."""
    return Markup("".join(map(text, parts)))


def budget_of(page: bool) -> int:
    """Bytes of pictures that a view may hold."""
    return FILE_BYTES if page else NOTEBOOK_BYTES


class Pictures:
    """Pictures of one view as data URLs, until their bytes are spent; what comes after is left out.

    Attributes:
        left_out: how many had no room.
    """

    def __init__(self, *, page: bool = False, budget: int | None = None) -> None:
        self._left = budget if budget is not None else budget_of(page)
        self.left_out = 0

    def img(self, picture: bytes | Image.Image, *, alt: str, kind: str = "", side: int = _SIDE) -> Markup:
        """An <img> of a file's bytes or a picture, at most ``side`` pixels high and wide twice over (for sharp
        screens); its words in a box where there is no room or no picture."""
        url = self._url(picture, 2 * side)
        if url is None:
            return Markup(f'<span class="ft-img ft-none {kind}">{text(alt)}</span>')
        return Markup(
            f'<img class="ft-img {kind}" loading="lazy" decoding="async" src="{url}" '
            f'alt="{text(alt)}" title="{text(alt)}">'
        )

    def _url(self, picture: bytes | Image.Image, side: int) -> str | None:
        data = picture if isinstance(picture, bytes) else b""
        kind = _kind(data)
        if not kind or len(data) > _LARGEST_AS_IS:
            try:
                data, kind = _small(picture, side)
            except (OSError, ValueError):
                return None
        if len(data) > self._left:
            self.left_out += 1
            return None
        self._left -= len(data)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def div(kind: str, parts: Sequence[str]) -> Markup:
    """Parts in a box of this class."""
    return Markup(f'<div class="{kind}">{join(parts)}</div>')


def dim(words: str) -> Markup:
    """A paragraph of lesser weight."""
    return Markup(f'<p class="ft-dim">{text(words)}</p>')


def figure(image: Markup, caption: str, *, kind: str = "") -> Markup:
    """A picture above its caption, if it has one."""
    words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Markup(f'<figure class="{kind}">{image}{words}</figure>' if kind else f"<figure>{image}{words}</figure>")


def bar(share: float, *, kind: str = "") -> Markup:
    """A share, 0 to 1, as a bar."""
    percent = 100 * min(1.0, max(0.0, share))
    return Markup(f'<span class="ft-bar {kind}"><i style="width:{percent:.1f}%"></i></span>')


def chip(words: str, *, kind: str = "") -> Markup:
    """A few words in a frame."""
    return Markup(f'<span class="ft-chip {kind}">{text(words)}</span>')


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> Markup:
    """A table: the first ``left`` columns to the left, the rest to the right; cells escaped unless :class:`Markup`."""

    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{"ft-l" if column < left else "ft-r"}">{text(cell)}</{tag}>'
            for column, cell in enumerate(line)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return Markup(f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>")


def view(title: str, parts: Sequence[str], *, page: bool) -> str:
    """A whole view with its style: for a notebook, or as a page of its own with a title."""
    body = f'<div class="faceteer"><style>{_STYLE}</style>{join(parts)}</div>'
    if not page:
        return body
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Anything that slipped through the escaping could still neither run nor send a request.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_PAGE}</style></head><body>{body}</body></html>\n"
    )


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in _KINDS if data.startswith(magic)), "")


def _small(picture: bytes | Image.Image, side: int) -> tuple[bytes, str]:
    """A copy within ``side`` pixels as a WebP. Raises OSError or ValueError when it cannot be read."""
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture.copy()
    # Wide strips keep their height.
    image.thumbnail((side * max(1, round(image.width / max(1, image.height))), side))
    buffer = io.BytesIO()
    image.convert("RGBA" if "A" in image.getbands() else "RGB").save(buffer, "WEBP", quality=82)
    return buffer.getvalue(), "webp"

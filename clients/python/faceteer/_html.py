"""HTML that stands by itself: escaped text, pictures as data URLs within a budget, one style for notebooks and files.

Knows nothing of what is shown. No script, no request: a view works in any notebook, on light and on dark, and offline.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from faceteer._writing import write_atomically

#: Bytes of pictures in one view: a notebook, which keeps every output, and a file of one's own.
NOTEBOOK_BYTES = 1_500_000
FILE_BYTES = 16_000_000
_SIDE = 144
_LARGEST_AS_IS = 12_000
_KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"))


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: str) -> Markup:
    """Other people's words as HTML: nothing in them is markup, whatever they say."""
    return value if isinstance(value, Markup) else Markup(html.escape(value, quote=True))


def join(parts: Sequence[str]) -> Markup:
    """Parts, escaped unless they are HTML already, one after another."""
    return Markup("".join(map(text, parts)))


class Pictures:
    """Pictures of one view as data URLs, until their bytes are spent; what comes after is left out.

    Attributes:
        left_out: how many had no room.
    """

    def __init__(self, budget: int = NOTEBOOK_BYTES) -> None:
        self._left = budget
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


def view(*parts: str) -> str:
    """A whole view with its style, for a notebook."""
    return f'<div class="faceteer"><style>{_STYLE}</style>{join(parts)}</div>'


def save_page(path: str | os.PathLike[str], title: str, body: str) -> Path:
    """Writes a view as a page of its own, all or nothing, and returns the path. Raises OSError."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Should anything ever slip through the escaping, it still could neither run nor phone home.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_PAGE}</style></head><body>{body}</body></html>\n"
    )
    return write_atomically(path, page.encode())


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


# Every colour is the text's own, thinned, or one that is readable on white and on black: a notebook's theme need not be
# known. Notebooks style tables and images themselves, so the rules name the class twice where they must win.
_STYLE = """
.faceteer{font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:inherit;max-width:64rem;
margin:.4rem 0;font-variant-numeric:tabular-nums;--ft-line:rgba(128,128,128,.28);--ft-soft:rgba(128,128,128,.13);
--ft-hue:#2f8fd0;--ft-warm:#d9822b;--ft-good:#2f9e6a;--ft-bad:#d6494f}
.faceteer *{box-sizing:border-box}
.faceteer h3{font:600 17px/1.3 inherit;font-size:17px;font-weight:600;margin:0;display:inline}
.faceteer h4{font-size:11px;font-weight:600;letter-spacing:.06em;text-transform:uppercase;opacity:.62;
margin:1rem 0 .35rem}
.faceteer p{margin:.35rem 0}
.faceteer .ft-dim{opacity:.62}
.faceteer .ft-head{display:flex;flex-wrap:wrap;align-items:baseline;gap:.3rem .6rem;margin-bottom:.45rem}
.faceteer .ft-chip{display:inline-block;border:1px solid var(--ft-line);border-radius:999px;padding:0 .55em;
font-size:11.5px;line-height:1.65;white-space:nowrap;max-width:100%;overflow:hidden;text-overflow:ellipsis;
vertical-align:bottom}
.faceteer .ft-chip.ft-warn{border-color:var(--ft-warm);color:var(--ft-warm)}
.faceteer .ft-chip.ft-solid{background:var(--ft-soft);border-color:transparent}
.faceteer .ft-chips{display:flex;flex-wrap:wrap;gap:.3rem}
.faceteer .ft-cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.7rem}
.faceteer .ft-card{border:1px solid var(--ft-line);border-radius:10px;overflow:hidden;display:flex;
flex-direction:column;min-width:0}
.faceteer .ft-card>.ft-body{padding:.55rem .7rem .65rem}
.faceteer .ft-strip{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;background:var(--ft-soft)}
.faceteer .ft-strip .ft-img{width:100%;aspect-ratio:1;height:auto;border-radius:0}
.faceteer .ft-grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.2rem,1fr));gap:.6rem}
.faceteer figure{margin:0;min-width:0}
.faceteer figure .ft-img{width:100%;aspect-ratio:1;height:auto}
.faceteer figcaption{font-size:11.5px;line-height:1.35;margin-top:.2rem;overflow:hidden;text-overflow:ellipsis;
display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow-wrap:anywhere}
.faceteer img.ft-img,.faceteer .ft-img{object-fit:cover;border-radius:7px;background:var(--ft-soft);margin:0;
max-width:100%;display:block}
.faceteer .ft-none{display:flex;align-items:center;justify-content:center;text-align:center;font-size:10.5px;
opacity:.6;padding:.3rem;overflow:hidden;overflow-wrap:anywhere;aspect-ratio:1}
.faceteer .ft-name{font-weight:600;font-size:14px;overflow-wrap:anywhere}
.faceteer .ft-bar{display:inline-block;width:100%;min-width:4.5rem;height:6px;border-radius:3px;
background:var(--ft-soft);overflow:hidden;vertical-align:middle}
.faceteer .ft-bar>i{display:block;height:100%;border-radius:3px;background:var(--ft-hue)}
.faceteer .ft-bar.ft-good>i{background:var(--ft-good)}
.faceteer .ft-bar.ft-warm>i{background:var(--ft-warm)}
.faceteer .ft-bar.ft-bad>i{background:var(--ft-bad)}
.faceteer .ft-bars{display:grid;grid-template-columns:auto 1fr auto;gap:.12rem .6rem;align-items:center;
font-size:12px;margin-top:.35rem}
.faceteer .ft-facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(6.2rem,1fr));gap:.5rem;margin:.5rem 0}
.faceteer .ft-facts>div{border:1px solid var(--ft-line);border-radius:8px;padding:.35rem .6rem;min-width:0}
.faceteer .ft-facts b{display:block;font-size:15px;font-weight:600}
.faceteer .ft-facts span{font-size:11px;opacity:.62}
.faceteer .ft-hist{display:flex;align-items:flex-end;gap:2px;height:64px;border-bottom:1px solid var(--ft-line)}
.faceteer .ft-hist>i{flex:1;background:var(--ft-hue);border-radius:2px 2px 0 0;min-height:1px;opacity:.85}
.faceteer .ft-axis{display:flex;justify-content:space-between;font-size:11px;opacity:.62;margin-top:.15rem}
.faceteer .ft-split{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;align-items:flex-start}
.faceteer .ft-split>.ft-grow{flex:1 1 22rem;min-width:0}
.faceteer .ft-photo{width:13rem;max-width:100%}
.faceteer .ft-photo .ft-img{width:100%;height:auto;object-fit:contain}
.faceteer .ft-icon{display:flex;gap:.4rem;flex-wrap:wrap}
.faceteer .ft-icon figure{width:8.2rem}
.faceteer .ft-icon figcaption{text-align:center}
.faceteer table{border-collapse:collapse;border:0;margin:.3rem 0;font-size:12.5px;background:none;width:auto;
max-width:100%}
.faceteer table th{font-weight:600;opacity:.62;font-size:11px;border:0;border-bottom:1px solid var(--ft-line);
padding:.2rem .7rem .2rem 0;background:none;white-space:nowrap}
.faceteer table td{border:0;border-bottom:1px solid var(--ft-soft);padding:.22rem .7rem .22rem 0;background:none;
overflow-wrap:anywhere}
.faceteer table tr,.faceteer table tbody tr:nth-child(odd){background:none}
.faceteer table .ft-l{text-align:left}
.faceteer table .ft-r{text-align:right;white-space:nowrap}
.faceteer table td .ft-bar{width:9rem}
.faceteer .ft-warning{border-left:3px solid var(--ft-warm);padding:.1rem .6rem;margin:.4rem 0}
""".replace("\n", "")
_PAGE = """
:root{color-scheme:light dark}
body{margin:0 auto;max-width:66rem;padding:1.6rem 1.2rem 3rem;background:#fff;color:#1c1e21}
@media(prefers-color-scheme:dark){body{background:#15171a;color:#e7e9ec}}
""".replace("\n", "")

"""The web page's files, from the folder ``page`` here; without them, a page that says what this address is."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"

_UNBUILT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Faceteer</title>
<h1>Faceteer</h1>
<p>This address serves Faceteer's calls over HTTP: Connect (JSON and binary) and gRPC-Web. The web page is not built
into this copy.</p>
<p>Whether everything is up: <a href="/healthz">/healthz</a>. To try a call:</p>
<pre>curl -H 'content-type: application/json' -d '{}' HERE/faceteer.v1.StudioService/GetStudio</pre>
"""


def page_routes(directory: Path = PAGE) -> list[BaseRoute]:
    """Routes that serve the page in ``directory``, or say that there is none. To be added last."""
    if (directory / "index.html").is_file():
        return [Mount("/", app=_Page(directory=directory))]

    async def unbuilt(request: Request) -> Response:
        here = escape(str(request.base_url).rstrip("/"))
        return HTMLResponse(_UNBUILT.replace("HERE", here), headers={"cache-control": "no-cache"})

    return [Route("/", unbuilt, methods=["GET"])]


class _Page(StaticFiles):
    """Files under assets/ have their hash in the name and are kept for ever; all else is asked about again.

    An address without a dot in its last part is one of the page's own (/features/41), and gets index.html.
    """

    async def get_response(self, path: str, scope: Any) -> Response:
        if path.startswith("faceteer."):
            # A call that the contract does not have.
            raise HTTPException(404)
        if path in ("", "."):
            path = "index.html"
        try:
            response = await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code != 404 or "." in path.rpartition("/")[2] or path.startswith("assets/"):
                raise
            response = await super().get_response("index.html", scope)
        kept = path.startswith("assets/")
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if kept else "no-cache"
        return response

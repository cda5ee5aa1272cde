"""Icons and examples of features as addresses that a browser can cache: /icons/41.webp, /examples/41/0.webp.

An <img> sends no access key, so gated features have no picture here.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from faceteer.v1 import library_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from faceteer_gateway.upstream import Caller, CallFailed, Upstream

_SERVICE = "/faceteer.v1.LibraryService"
# How long the library's revision is believed: it changes when the server starts with another bundle.
_REVISION_S = 5.0
_MOST_EXAMPLES = 100
_HTTP_STATUS = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400, "RESOURCE_EXHAUSTED": 429, "DEADLINE_EXCEEDED": 504}


class Pictures:
    """The routes of pictures, over the library's calls."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._revision = ""
        self._asked = -_REVISION_S

    def routes(self) -> list[Route]:
        """What to add to an application."""
        return [
            Route("/icons/{index:int}.webp", self.icon, methods=["GET"]),
            Route("/examples/{index:int}/{rank:int}.webp", self.example, methods=["GET"]),
        ]

    async def icon(self, request: Request) -> Response:
        """A feature's icon."""
        question = library_pb2.GetFeatureIconRequest()
        question.feature.index = _index(request)

        async def load() -> bytes | None:
            answer = library_pb2.GetFeatureIconResponse()
            await self._call("GetFeatureIcon", question, answer)
            return answer.icon

        return await self._answer(request, load)

    async def example(self, request: Request) -> Response:
        """One of the pictures on which a feature fires most, 0 the strongest."""
        rank: int = request.path_params["rank"]
        question = library_pb2.ListFeatureExamplesRequest(page_size=min(rank + 1, _MOST_EXAMPLES))
        question.feature.index = _index(request)

        async def load() -> bytes | None:
            answer = library_pb2.ListFeatureExamplesResponse()
            await self._call("ListFeatureExamples", question, answer)
            return answer.examples[rank].thumbnail if rank < len(answer.examples) else None

        return await self._answer(request, load)

    async def _answer(self, request: Request, load: Callable[[], Awaitable[bytes | None]]) -> Response:
        try:
            revision = await self._library_revision()
            etag = f'"{revision}"'
            # With the revision in its address a picture never changes; without, it is asked about again.
            fresh = request.query_params.get("v") == revision
            caching = "public, max-age=31536000, immutable" if fresh else "public, max-age=60"
            headers = {"etag": etag, "cache-control": caching}
            if etag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            picture = await load()
        except CallFailed as failed:
            name = code_pb2.Code.Name(failed.status.code)
            return _failure(_HTTP_STATUS.get(name, 503), name.lower(), failed.status.message)
        if not picture:
            return _failure(404, "not_found", "the feature has no such picture")
        return Response(picture, media_type="image/webp", headers=headers)

    async def _library_revision(self) -> str:
        now = time.monotonic()
        if now - self._asked >= _REVISION_S:
            answer = library_pb2.GetLibraryResponse()
            await self._call("GetLibrary", library_pb2.GetLibraryRequest(), answer)
            self._revision, self._asked = answer.revision, now
        return self._revision

    async def _call(self, method: str, question: Message, answer: Message) -> None:
        data = await self._upstream.unary(f"{_SERVICE}/{method}", question.SerializeToString(), Caller())
        answer.ParseFromString(data)


def _index(request: Request) -> int:
    # The contract's index has 32 bits.
    return min(int(request.path_params["index"]), 2**32 - 1)


def _failure(status: int, code: str, message: str) -> Response:
    return JSONResponse({"code": code, "message": message}, status, headers={"cache-control": "no-store"})

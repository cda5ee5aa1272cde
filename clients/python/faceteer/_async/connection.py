"""What all objects of one client share: the channel, the deadlines, and calls that are tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from faceteer._errors import EmbeddingExpiredError, FaceteerError, InternalError
from faceteer._models.photo import OpenedPhoto
from faceteer._models.pictures import Picture, picture_bytes
from faceteer._transport.aio import Transport, sleep, work
from faceteer._transport.channels import Endpoint
from faceteer._transport.methods import GET_STUDIO, OPEN_IMAGE, Method
from faceteer._transport.retries import Attempts, Retries, Timeouts, check_timeout
from faceteer._transport.status import error_from_item
from faceteer.v1 import studio_pb2

R = TypeVar("R", bound=Message)


class AsyncConnection:
    """One client's connection to its server."""

    def __init__(self, endpoint: Endpoint, retries: Retries, timeouts: Timeouts) -> None:
        self.address = endpoint.address
        self.retries = retries
        self.timeouts = timeouts
        self.transport = Transport(endpoint)

    def attempts(self, timeout: float | None, default: float | None) -> Attempts:
        """A new operation's deadline: the caller's, or the default of its kind."""
        check_timeout(timeout)
        return Attempts(self.retries, default if timeout is None else timeout)

    async def call(self, method: Method[R], request: Message, attempts: Attempts) -> R:
        """One unary call with retries, within the operation's deadline."""
        while True:
            try:
                return await self.transport.unary(method, request, attempts.remaining)
            except FaceteerError as error:
                await sleep(attempts.pause(error))

    async def facts(self, attempts: Attempts) -> studio_pb2.GetStudioResponse:
        """What the server runs, and its limits."""
        return await self.call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)

    async def call_with_photos(
        self, method: Method[R], build: Callable[[], Message], photos: Sequence[OpenedPhoto], attempts: Attempts
    ) -> R:
        """A call that names ``photos``; when the server has let one go, they are opened again and sent whole, once."""
        try:
            return await self.call(method, build(), attempts)
        except EmbeddingExpiredError as error:
            await self.reopen(photos, attempts, error)
        return await self.call(method, build(), attempts)

    async def reopen(self, photos: Sequence[OpenedPhoto], attempts: Attempts, error: EmbeddingExpiredError) -> None:
        """Encodes the photos again.

        Raises:
            EmbeddingExpiredError: all of them were sent inline already.
            RevisionMismatchError: the server has other models now, so the photos' features mean something else.
        """
        # By identity, so that one passed twice is opened once.
        lost = {id(photo): photo for photo in photos if not photo.inline}
        if not lost:
            raise error
        for photo in lost.values():
            request = studio_pb2.OpenImageRequest(input=photo.source, max_features=1)
            photo.reopened(await self.call(OPEN_IMAGE, request, attempts))

    async def call_in_batches(
        self,
        method: Method[Any],
        items: Sequence[Any],
        build: Callable[[Any], Message],
        limit: int,
        attempts: Attempts,
        *,
        keep_errors: bool = False,
    ) -> list[Any]:
        """The results of many items, ``limit`` a call; an item's error, with its index, is raised or kept in place."""
        found: list[Any] = []
        for start in range(0, len(items), limit):
            batch = items[start : start + limit]
            answer = await self.call(method, build(batch), attempts)
            if len(answer.results) != len(batch):
                raise InternalError(f"the server sent {len(answer.results)} results for {len(batch)} items")
            for offset, result in enumerate(answer.results):
                if result.WhichOneof("result") != "error":
                    found.append(result)
                    continue
                error = error_from_item(result.error, address=self.address)
                error.index = start + offset
                if not keep_errors:
                    raise error
                found.append(error)
        return found


async def read_picture(picture: Picture) -> bytes:
    """The picture as a whole file; slow reads run on a thread."""
    return picture_bytes(picture) if isinstance(picture, bytes) else await work(partial(picture_bytes, picture))

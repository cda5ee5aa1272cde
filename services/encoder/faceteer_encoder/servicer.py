"""EncoderService over gRPC: messages to bytes and texts, embeddings to messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from faceteer.v1 import encoder_pb2, encoder_pb2_grpc, tensor_pb2
from faceteer_runtime.errors import BatchTooLarge, ImageTooLarge, InvalidField, NotInBundle, UnreadableImage
from faceteer_runtime.execution import execution
from faceteer_runtime.outcome import Failed, attempt
from faceteer_runtime.status import error_to_item
from faceteer_runtime.tensors import to_tensor

from faceteer_encoder.application import Encoded, EncoderApplication

_ELEMENT_TYPES = frozenset(tensor_pb2.ElementType.values())
# Longer than any tokenizer's context; refused rather than tokenized for seconds and cut.
_LONGEST_TEXT = 10_000


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """See protos/faceteer/v1/encoder.proto."""

    def __init__(
        self, application: EncoderApplication, card: encoder_pb2.GetEncoderResponse, *, stream_window: int
    ) -> None:
        """
        Args:
            application: what does the work.
            card: what GetEncoder answers; its limits are those that are kept here.
            stream_window: pictures of one stream in progress at once.
        """
        self._application = application
        self._card = card
        self._stream_window = stream_window

    async def GetEncoder(self, request: encoder_pb2.GetEncoderRequest, context: Any) -> encoder_pb2.GetEncoderResponse:
        return self._card

    async def EncodeImages(
        self, request: encoder_pb2.EncodeImagesRequest, context: Any
    ) -> encoder_pb2.EncodeImagesResponse:
        self._check("images", len(request.images), request.element_type)
        encoded, cost = await self._application.encode_images(request.images)
        return encoder_pb2.EncodeImagesResponse(
            results=[_result(one, request.element_type, f"images[{at}]") for at, one in enumerate(encoded)],
            execution=execution(self._card.revision, *cost),
        )

    async def EncodeTexts(
        self, request: encoder_pb2.EncodeTextsRequest, context: Any
    ) -> encoder_pb2.EncodeTextsResponse:
        if not self._card.has_text_tower:
            raise NotInBundle("text_tower", "this bundle's encoder has no text tower; only pictures can be encoded")
        self._check("texts", len(request.texts), request.element_type)
        texts = [attempt(_text, text, f"texts[{at}]") for at, text in enumerate(request.texts)]
        encoded, cost = await self._application.encode_texts(texts)
        results = [_result(one, request.element_type, f"texts[{at}]") for at, one in enumerate(encoded)]
        for text, result in zip(texts, results, strict=True):
            if isinstance(text, str):
                result.unknown_words.extend(self._application.unknown_words(text))
        return encoder_pb2.EncodeTextsResponse(
            results=results,
            execution=execution(self._card.revision, *cost),
        )

    async def StreamEncodeImages(
        self, requests: AsyncIterator[encoder_pb2.StreamEncodeImagesRequest], context: Any
    ) -> AsyncIterator[encoder_pb2.StreamEncodeImagesResponse]:
        answers: asyncio.Queue[encoder_pb2.StreamEncodeImagesResponse | None] = asyncio.Queue()
        window = asyncio.Semaphore(self._stream_window)

        async def answer(request: encoder_pb2.StreamEncodeImagesRequest) -> None:
            answers.put_nowait(await self._stream_one(request))

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    # A place in the window is free again when its answer has gone out: whoever does not read answers
                    # is not read from either.
                    await window.acquire()
                    async for request in requests:
                        group.create_task(answer(request))
                        await window.acquire()
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (ready := await answers.get()) is not None:
                yield ready
                window.release()
            try:
                await reader
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _stream_one(
        self, request: encoder_pb2.StreamEncodeImagesRequest
    ) -> encoder_pb2.StreamEncodeImagesResponse:
        if request.element_type not in _ELEMENT_TYPES:
            fault = InvalidField("element_type", "must be ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16")
            return encoder_pb2.StreamEncodeImagesResponse(
                sequence=request.sequence, result=encoder_pb2.EncodeResult(error=error_to_item(fault))
            )
        encoded = await self._application.encode_streamed_image(request.image)
        return encoder_pb2.StreamEncodeImagesResponse(
            sequence=request.sequence, result=_result(encoded, request.element_type, "image")
        )

    def _check(self, field: str, items: int, element_type: int) -> None:
        if items == 0:
            raise InvalidField(field, "is empty; give at least one")
        if items > self._card.max_batch:
            raise BatchTooLarge(field, items, self._card.max_batch)
        if element_type not in _ELEMENT_TYPES:
            raise InvalidField("element_type", "must be ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16")


def _result(encoded: Encoded, element_type: tensor_pb2.ElementType.ValueType, field: str) -> encoder_pb2.EncodeResult:
    if isinstance(encoded, Failed):
        error = encoded.error
        if isinstance(error, UnreadableImage | ImageTooLarge):
            # Two calls may share the decoding of one picture, and each has it in a field of its own.
            error = error.at(field)
        return encoder_pb2.EncodeResult(error=error_to_item(error))
    embedding_id, x = encoded.value
    return encoder_pb2.EncodeResult(
        embedding=tensor_pb2.Embedding(embedding_id=embedding_id, embeds=to_tensor(x, element_type)),
        cached=encoded.cached,
    )


def _text(text: str, field: str) -> str:
    if not text.strip():
        raise InvalidField(field, "is empty; give a text or leave it out")
    if len(text) > _LONGEST_TEXT:
        raise InvalidField(
            field, f"{len(text)} characters are more than the {_LONGEST_TEXT} that are taken; shorten it"
        )
    return text

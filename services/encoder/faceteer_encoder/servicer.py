"""EncoderService over gRPC: messages to bytes and texts, embeddings to messages.

Knows nothing of pictures or models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc, execution_pb2, tensor_pb2
from faceteer_runtime.errors import (
    BatchTooLarge,
    FaceteerError,
    ImageTooLarge,
    InvalidField,
    NotInBundle,
    UnreadableImage,
)
from faceteer_runtime.execution import execution
from faceteer_runtime.status import error_to_status
from faceteer_runtime.tensors import to_tensor

from faceteer_encoder.embeddings import Embedded, Embeddings
from faceteer_encoder.settings import EncoderSettings

_ELEMENT_TYPES = frozenset(tensor_pb2.ElementType.values())
# Beyond this no tokenizer's context has room; refused rather than tokenized for seconds and cut.
_LONGEST_TEXT = 10_000


class EncoderIdentity(NamedTuple):
    """What the Get call tells about the model."""

    revision: str
    bundle: str
    embed_dim: int
    image_size: int
    context_length: int
    has_text_tower: bool


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """See protos/faceteer/v1/encoder.proto."""

    def __init__(self, embeddings: Embeddings, identity: EncoderIdentity, settings: EncoderSettings) -> None:
        self._embeddings = embeddings
        self._identity = identity
        self._settings = settings
        # Enough for the model to work on one batch while the next is decoded.
        self._stream_window = 2 * settings.encoder_model_batch

    async def GetEncoder(self, request: encoder_pb2.GetEncoderRequest, context: Any) -> encoder_pb2.GetEncoderResponse:
        return encoder_pb2.GetEncoderResponse(
            **self._identity._asdict(),
            max_batch=self._settings.encoder_max_batch,
            max_image_bytes=self._settings.encoder_max_image_bytes,
            max_image_pixels=self._settings.encoder_max_image_pixels,
        )

    async def EncodeImages(
        self, request: encoder_pb2.EncodeImagesRequest, context: Any
    ) -> encoder_pb2.EncodeImagesResponse:
        self._check("images", len(request.images), request.element_type)
        embedded, cache_us = await self._embeddings.of_images(request.images)
        return encoder_pb2.EncodeImagesResponse(
            results=[_result(one, request.element_type, f"images[{at}]") for at, one in enumerate(embedded)],
            execution=self._execution(embedded, cache_us),
        )

    async def EncodeTexts(
        self, request: encoder_pb2.EncodeTextsRequest, context: Any
    ) -> encoder_pb2.EncodeTextsResponse:
        if not self._identity.has_text_tower:
            raise NotInBundle("text_tower", "this bundle's encoder has no text tower; only pictures can be encoded")
        self._check("texts", len(request.texts), request.element_type)
        faults = {at: _text_fault(text, f"texts[{at}]") for at, text in enumerate(request.texts)}
        embedded, cache_us = await self._embeddings.of_texts(
            [t for at, t in enumerate(request.texts) if not faults[at]]
        )
        rest = iter(embedded)
        results = []
        for at, fault in faults.items():
            one = Embedded("", fault, True) if fault is not None else next(rest)
            results.append(_result(one, request.element_type, f"texts[{at}]"))
        return encoder_pb2.EncodeTextsResponse(results=results, execution=self._execution(embedded, cache_us))

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
                sequence=request.sequence, result=encoder_pb2.EncodeResult(error=error_to_status(fault))
            )
        embedded = await self._embeddings.of_streamed_image(request.image)
        return encoder_pb2.StreamEncodeImagesResponse(
            sequence=request.sequence, result=_result(embedded, request.element_type, "image")
        )

    def _check(self, field: str, items: int, element_type: int) -> None:
        if items == 0:
            raise InvalidField(field, "is empty; give at least one")
        if items > self._settings.encoder_max_batch:
            raise BatchTooLarge(field, items, self._settings.encoder_max_batch)
        if element_type not in _ELEMENT_TYPES:
            raise InvalidField("element_type", "must be ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16")

    def _execution(self, embedded: Sequence[Embedded], cache_us: int) -> execution_pb2.Execution:
        return execution(
            self._identity.revision,
            cached=all(one.cached for one in embedded),
            queue_us=max((one.queue_us for one in embedded), default=0),
            compute_us=max((one.compute_us for one in embedded), default=0),
            cache_us=cache_us,
        )


def _result(one: Embedded, element_type: tensor_pb2.ElementType.ValueType, field: str) -> encoder_pb2.EncodeResult:
    if isinstance(one.embeds, np.ndarray):
        embeds = to_tensor(one.embeds, element_type)
        return encoder_pb2.EncodeResult(
            embedding=tensor_pb2.Embedding(embedding_id=one.embedding_id, embeds=embeds), cached=one.cached
        )
    error = one.embeds
    if isinstance(error, UnreadableImage | ImageTooLarge):
        # Two calls may share the decoding of one picture, and each has it in a field of its own.
        error = type(error)(field, error.description)
    return encoder_pb2.EncodeResult(error=error_to_status(error))


def _text_fault(text: str, field: str) -> FaceteerError | None:
    if not text.strip():
        return InvalidField(field, "is empty; give a text or leave it out")
    if len(text) > _LONGEST_TEXT:
        return InvalidField(
            field, f"{len(text)} characters are more than the {_LONGEST_TEXT} that are taken; shorten it"
        )
    return None

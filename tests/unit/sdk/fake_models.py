"""The fake server's encoder, SAE and prior.

Knows nothing of the SDK. What the server's parts share is declared here and made in :mod:`unit.sdk.fake_server`.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    encoder_pb2_grpc,
    generator_pb2,
    generator_pb2_grpc,
    sae_pb2,
    sae_pb2_grpc,
    tensor_pb2,
)
from unit.sdk.fake_world import P99, D, Failing, Failure, Fault, embeds_of


class FakePart:
    """What every part needs of the whole."""

    calls: list[tuple[str, Any]]
    _labels: dict[int, str]
    _faults: defaultdict[str, deque[Fault]]
    answer_seconds: float
    most_waiting: int

    def _enter(self, name: str, request: Any, context: grpc.ServicerContext) -> None: ...
    def _count(self, request: Any, context: grpc.ServicerContext, name: str) -> None: ...
    def _failing(self, context: grpc.ServicerContext) -> Failing: ...
    def _input(self, source: Any) -> np.ndarray: ...
    def _remember(self, x: np.ndarray) -> tensor_pb2.Embedding: ...
    def _resolve(self, ref: edits_pb2.FeatureRef) -> int: ...


class FakeModels(
    encoder_pb2_grpc.EncoderServiceServicer,
    sae_pb2_grpc.SaeServiceServicer,
    generator_pb2_grpc.GeneratorServiceServicer,
    FakePart,
):
    """Encoder, SAE and prior."""

    # -- encoder -----------------------------------------------------------------------------------------------

    def EncodeTexts(self, request: Any, context: grpc.ServicerContext) -> encoder_pb2.EncodeTextsResponse:
        self._enter("EncodeTexts", request, context)
        results = []
        for text in request.texts:
            if not text:
                fault = Fault("INVALID_ARGUMENT", "INVALID_FIELD", "an empty text", "texts")
                results.append(encoder_pb2.EncodeResult(error=fault.item()))
                continue
            x = np.zeros(D, np.float32)
            x[len(text)] = 1
            results.append(encoder_pb2.EncodeResult(embedding=self._remember(x)))
        return encoder_pb2.EncodeTextsResponse(results=results)

    def StreamEncodeImages(
        self, request_iterator: Any, context: grpc.ServicerContext
    ) -> Iterator[encoder_pb2.StreamEncodeImagesResponse]:
        self._count(None, context, "StreamEncodeImages")
        fault = self._faults["StreamEncodeImages"].popleft() if self._faults["StreamEncodeImages"] else None
        with self._failing(context):
            held: list[Any] = []
            sent = 0
            for request in request_iterator:
                held.append(request)
                self.most_waiting = max(self.most_waiting, len(held))
                # Answers come in pairs and out of order, as a batching server's may.
                if len(held) == 2:
                    for each in reversed(held):
                        if fault is not None and sent >= fault.after:
                            if fault.code == "OK":
                                return
                            raise Failure(fault)
                        yield self._stream_answer(each)
                        sent += 1
                    held.clear()
            for each in held:
                yield self._stream_answer(each)
            if fault is not None:
                raise Failure(fault)

    def _stream_answer(self, request: Any) -> encoder_pb2.StreamEncodeImagesResponse:
        self.calls.append(("item", request))
        time.sleep(self.answer_seconds)
        if self._faults["item"]:
            error = self._faults["item"].popleft().item()
            result = encoder_pb2.EncodeResult(error=error)
        else:
            try:
                result = encoder_pb2.EncodeResult(embedding=self._remember(embeds_of(request.image)))
            except OSError:
                fault = Fault("INVALID_ARGUMENT", "UNREADABLE_IMAGE", "not a picture", "image")
                result = encoder_pb2.EncodeResult(error=fault.item())
        return encoder_pb2.StreamEncodeImagesResponse(sequence=request.sequence, result=result)

    # -- sae ---------------------------------------------------------------------------------------------------

    def DiffFeatures(self, request: Any, context: grpc.ServicerContext) -> sae_pb2.DiffFeaturesResponse:
        self._enter("DiffFeatures", request, context)
        with self._failing(context):
            source, target = self._input(request.source), self._input(request.target)
            edits, covered = self._difference(source, target, request.coverage, request.max_edits)
            differing = int(np.count_nonzero(np.maximum(source, 0) != np.maximum(target, 0)))
            return sae_pb2.DiffFeaturesResponse(
                edits=edits, coverage=covered, differing_features=differing, unexplained=0.25
            )

    def EncodeFeatures(self, request: Any, context: grpc.ServicerContext) -> sae_pb2.EncodeFeaturesResponse:
        self._enter("EncodeFeatures", request, context)
        results = []
        for source in request.inputs:
            x = self._input(source)
            if len(x) != D:
                fault = Fault("INVALID_ARGUMENT", "INVALID_FIELD", f"has {len(x)} values, not {D}", "inputs.embeds")
                results.append(sae_pb2.EncodeFeaturesResult(error=fault.item()))
                continue
            # The identity on what is positive: the error is what is negative.
            f = np.maximum(x, 0)
            firing = [int(i) for i in np.argsort(-f, kind="stable") if f[i] > 0]
            kept = firing[: request.max_features] if request.max_features else firing
            features = tensor_pb2.SparseFeatures(indices=kept, activations=f[kept], scaled=f[kept] / P99)
            encoding = sae_pb2.FeatureEncoding(
                embedding_id=self._remember(x).embedding_id, features=features, l0=len(firing), cosine=1.0
            )
            if request.include_error:
                encoding.error.CopyFrom(self._remember(x - f).embeds)
            results.append(sae_pb2.EncodeFeaturesResult(encoding=encoding))
        return sae_pb2.EncodeFeaturesResponse(results=results)

    def DecodeFeatures(self, request: Any, context: grpc.ServicerContext) -> sae_pb2.DecodeFeaturesResponse:
        self._enter("DecodeFeatures", request, context)
        results = []
        for item in request.items:
            if any(index >= D for index in item.features.indices):
                fault = Fault("INVALID_ARGUMENT", "INVALID_FIELD", f"features end at {D - 1}", "items.features")
                results.append(sae_pb2.DecodeFeaturesResult(error=fault.item()))
                continue
            x = np.zeros(D, np.float32)
            x[list(item.features.indices)] = item.features.activations
            if item.HasField("error"):
                x += np.frombuffer(item.error.data, "<f4")
            results.append(sae_pb2.DecodeFeaturesResult(embedding=self._remember(x)))
        return sae_pb2.DecodeFeaturesResponse(results=results)

    # -- generator ---------------------------------------------------------------------------------------------

    def EmbedPrompt(self, request: Any, context: grpc.ServicerContext) -> generator_pb2.EmbedPromptResponse:
        """Imagines the features whose labels are words of the prompt, as strong as the seed says."""
        self._enter("EmbedPrompt", request, context)
        x = np.zeros(D, np.float32)
        for index, label in self._labels.items():
            if label in request.prompt.split():
                x[index] = 1 + request.seed
        return generator_pb2.EmbedPromptResponse(embedding=self._remember(x))

    # -- what sae and studio share -----------------------------------------------------------------------------

    def _difference(
        self, source: np.ndarray, target: np.ndarray, coverage: float, max_edits: int
    ) -> tuple[list[edits_pb2.Edit], float]:
        change = np.maximum(target, 0) - np.maximum(source, 0)
        whole = float((change**2).sum())
        edits: list[edits_pb2.Edit] = []
        covered = 0.0
        for index in np.argsort(-np.abs(change), kind="stable"):
            if not change[index] or covered >= (coverage or 0.9) or len(edits) == (max_edits or 300):
                break
            covered += float(change[index] ** 2) / whole
            edits.append(
                edits_pb2.Edit(
                    feature=edits_pb2.FeatureRef(index=int(index)),
                    operation=edits_pb2.EDIT_OPERATION_ADD,
                    value=float(change[index]),
                    unit=edits_pb2.EDIT_UNIT_RAW,
                )
            )
        return edits, covered

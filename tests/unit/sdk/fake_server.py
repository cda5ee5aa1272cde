"""A small real Faceteer server over arithmetic that can be done by hand: the SDK's and the CLI's test double.

Knows nothing of the SDK. The "encoder" puts the mean brightness of a picture's 4 x 4 tiles (0 to 1) into the first 16
of 512 dimensions; the "SAE" is the identity, so feature i is max(0, x[i]); every p99 is 2, so scaled = activation / 2;
the "generator" paints one flat colour that its seed picks. Calls are recorded, and can be made to fail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    encoder_pb2_grpc,
    execution_pb2,
    generator_pb2,
    library_pb2,
    library_pb2_grpc,
    sae_pb2,
    sae_pb2_grpc,
    studio_pb2,
    studio_pb2_grpc,
    tensor_pb2,
)
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image

D = 512
P99 = 2.0
LABELS = {3: "night", 4: "day", 5: "snow", 7: "red", 12: "fog", 13: "[bold]odd & <b>label</b>"}
RIVALS = {3: [4, 15], 4: [3]}
REVISIONS = {"encoder": "enc0", "sae": "sae0", "generator": "gen0", "library": "lib0"}
MAX_BATCH = 4


def png(*brightness: int, size: int = 16) -> bytes:
    """A PNG whose 4 x 4 tiles have these brightnesses, 0 to 255, row by row; the rest are black."""
    tiles = np.zeros(16, np.uint8)
    tiles[: len(brightness)] = brightness
    pixels = np.kron(tiles.reshape(4, 4), np.ones((size // 4, size // 4), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def embeds_of(data: bytes) -> np.ndarray:
    """The fake encoder: float32 [512]."""
    image = Image.open(io.BytesIO(data)).convert("L")
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST), np.float32) / 255
    x = np.zeros(D, np.float32)
    x[:16] = pixels.reshape(4, 4, 4, 4).mean((1, 3)).reshape(16)
    return x


@dataclass
class Fault:
    """One answer that fails. ``after`` messages of a stream come first."""

    code: str = "UNAVAILABLE"
    reason: str = ""
    message: str = "as the test asked"
    field: str = ""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    retry_after: float | None = None
    after: int = 0
    plain: bool = False  # without google.rpc.Status, as a proxy or gRPC itself fails

    def status(self) -> status_pb2.Status:
        details = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain="faceteer", metadata=self.metadata)
            details.append(_packed(info))
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
            details.append(_packed(retry))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code), message=self.message, details=details)


class _Failure(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class FakeServer(
    studio_pb2_grpc.StudioServiceServicer,
    encoder_pb2_grpc.EncoderServiceServicer,
    sae_pb2_grpc.SaeServiceServicer,
    library_pb2_grpc.LibraryServiceServicer,
):
    """All that the SDK calls, on one port of 127.0.0.1. Use as a context manager.

    Attributes:
        calls: (call, request) in order; streams of requests record each message.
        metadata: the last call's metadata.
        remembers: whether embedding ids are found again; False is a server without a shared cache.
        step_seconds: how long a denoising step takes.
        steps_done: denoising steps taken, over all requests.
        cancelled: set when a drawing noticed that its caller is gone.
        picked_seed: the seed drawn when none is given.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.metadata: dict[str, str] = {}
        self.remembers = True
        self.step_seconds = 0.0
        self.answer_seconds = 0.0
        self.steps_done = 0
        self.cancelled = threading.Event()
        self.picked_seed = 2**63 + 5
        self.revisions = dict(REVISIONS)
        self.most_waiting = 0
        self._embeds: dict[str, np.ndarray] = {}
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._labels = dict(LABELS)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        for add in (
            studio_pb2_grpc.add_StudioServiceServicer_to_server,
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
            sae_pb2_grpc.add_SaeServiceServicer_to_server,
            library_pb2_grpc.add_LibraryServiceServicer_to_server,
        ):
            add(self, self._server)  # type: ignore[no-untyped-call]
        self.health = health.HealthServicer()
        for name in ("Encoder", "Sae", "Generator", "Library", "Studio"):
            self.health.set(f"faceteer.v1.{name}Service", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(0).wait()

    def fail(self, call: str, *faults: Fault) -> None:
        """The next calls (or, for "item", pictures of a stream) fail like this."""
        self._faults[call].extend(faults)

    def expire(self) -> None:
        """Forgets every embedding."""
        self._embeds.clear()

    def names(self) -> list[str]:
        """The calls so far, by name."""
        return [name for name, _ in self.calls]

    # -- studio ------------------------------------------------------------------------------------------------

    def GetStudio(self, request: Any, context: grpc.ServicerContext) -> studio_pb2.GetStudioResponse:
        self._enter("GetStudio", request, context)
        r = self.revisions
        defaults = generator_pb2.GenerationSettings(
            width=8, height=8, steps=4, guidance_scale=2.0, scheduler=generator_pb2.SCHEDULER_DDIM
        )
        return studio_pb2.GetStudioResponse(
            bundle="fake",
            version="0.0",
            revisions=self._revisions(),
            encoder=encoder_pb2.GetEncoderResponse(
                revision=r["encoder"], embed_dim=D, image_size=16, max_batch=MAX_BATCH, has_text_tower=True
            ),
            sae=sae_pb2.GetSaeResponse(
                revision=r["sae"], architecture="standard", d_in=D, d_sae=D, has_statistics=True, max_edits=300
            ),
            generator=generator_pb2.GetGeneratorResponse(
                revision=r["generator"],
                sizes=[generator_pb2.Size(width=8, height=8)],
                defaults=defaults,
                max_steps=100,
                max_seeds=4,
                schedulers=[generator_pb2.SCHEDULER_DDIM, generator_pb2.SCHEDULER_DDPM],
            ),
        )

    def OpenImage(self, request: Any, context: grpc.ServicerContext) -> studio_pb2.OpenImageResponse:
        self._enter("OpenImage", request, context)
        with self._failing(context):
            x = self._image_input(request.input)
            f = np.maximum(x, 0)
            firing = [int(i) for i in np.argsort(-f, kind="stable") if f[i] > 0]
            features = [
                studio_pb2.NamedFeature(
                    index=i, label=self._labels.get(i, ""), activation=f[i], scaled=f[i] / P99, firing_share=0.25
                )
                for i in (firing[: request.max_features] if request.max_features else firing)
            ]
            return studio_pb2.OpenImageResponse(
                embedding=self._remember(x),
                features=features,
                l0=len(firing),
                explained_variance=1.0,
                cosine=1.0,
                norm=float(np.linalg.norm(x)),
                revisions=self._revisions(),
                encoder_execution=execution_pb2.Execution(model_revision=self.revisions["encoder"], compute_us=10),
                sae_execution=execution_pb2.Execution(model_revision=self.revisions["sae"]),
            )

    def EditImage(self, request: Any, context: grpc.ServicerContext) -> Iterator[studio_pb2.EditImageResponse]:
        self._count(request, context, "EditImage")
        fault = self._faults["EditImage"].popleft() if self._faults["EditImage"] else None
        with self._failing(context):
            for sent, message in enumerate(self._edit_events(request, context)):
                if fault is not None and sent >= fault.after:
                    raise _Failure(fault)
                yield message
            if fault is not None:
                raise _Failure(fault)

    def TransferFeatures(self, request: Any, context: grpc.ServicerContext) -> studio_pb2.TransferFeaturesResponse:
        self._enter("TransferFeatures", request, context)
        with self._failing(context):
            target, source = self._image_input(request.target), self._image_input(request.source)
            reference = self._image_input(request.reference) if request.HasField("reference") else target
            edits, covered = self._difference(reference, source, request.coverage, request.max_edits)
            report, after, resolved = self._apply(target, edits, measure=True)
            return studio_pb2.TransferFeaturesResponse(
                edits=resolved,
                target=self._remember(target),
                embedding=self._remember(after),
                report=report,
                coverage=covered,
                revisions=self._revisions(),
            )

    # -- encoder -----------------------------------------------------------------------------------------------

    def EncodeTexts(self, request: Any, context: grpc.ServicerContext) -> encoder_pb2.EncodeTextsResponse:
        self._enter("EncodeTexts", request, context)
        results = []
        for text in request.texts:
            if not text:
                fault = Fault("INVALID_ARGUMENT", "INVALID_FIELD", "an empty text", "texts")
                results.append(encoder_pb2.EncodeResult(error=fault.status()))
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
                            raise _Failure(fault)
                        yield self._stream_answer(each)
                        sent += 1
                    held.clear()
            for each in held:
                yield self._stream_answer(each)
            if fault is not None:
                raise _Failure(fault)

    def _stream_answer(self, request: Any) -> encoder_pb2.StreamEncodeImagesResponse:
        self.calls.append(("item", request))
        time.sleep(self.answer_seconds)
        if self._faults["item"]:
            error = self._faults["item"].popleft().status()
            result = encoder_pb2.EncodeResult(error=error)
        else:
            try:
                result = encoder_pb2.EncodeResult(embedding=self._remember(embeds_of(request.image)))
            except OSError:
                fault = Fault("INVALID_ARGUMENT", "UNREADABLE_IMAGE", "not a picture", "image")
                result = encoder_pb2.EncodeResult(error=fault.status())
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

    # -- library -----------------------------------------------------------------------------------------------

    def GetFeature(self, request: Any, context: grpc.ServicerContext) -> library_pb2.GetFeatureResponse:
        self._enter("GetFeature", request, context)
        with self._failing(context):
            index = self._resolve(request.feature)
            detail = library_pb2.FeatureDetail(
                histogram_edges=[1.0, 2.0],
                histogram_counts=[30, 10],
                rivals=[
                    library_pb2.RelatedFeature(index=i, label=LABELS[i], score=0.0) for i in RIVALS.get(index, [])[:1]
                ],
                nearest=[library_pb2.RelatedFeature(index=5, label="snow", score=0.5)],
            )
            return library_pb2.GetFeatureResponse(feature=self._feature(index), detail=detail)

    def BatchGetFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.BatchGetFeaturesResponse:
        self._enter("BatchGetFeatures", request, context)
        with self._failing(context):
            features = [self._feature(self._resolve(ref)) for ref in request.features]
            return library_pb2.BatchGetFeaturesResponse(features=features)

    def ListFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.ListFeaturesResponse:
        self._enter("ListFeatures", request, context)
        wanted = [i for i in range(D) if not request.filter.labelled or i in self._labels]
        start, size = int(request.page_token or 0), min(request.page_size or 50, 3)
        end = start + size
        return library_pb2.ListFeaturesResponse(
            features=[self._feature(i) for i in wanted[start:end]],
            next_page_token=str(end) if end < len(wanted) else "",
            total_size=len(wanted),
        )

    def SearchFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.SearchFeaturesResponse:
        self._enter("SearchFeatures", request, context)
        with self._failing(context):
            kind = request.WhichOneof("query")
            if kind == "words":
                found = [i for i, label in self._labels.items() if request.words.lower() in label]
            elif kind == "picture":
                found = [int(i) for i in np.flatnonzero(self._input(request.picture) > 0)]
            else:
                found = [5, 7] if self._resolve(request.similar_to) else []
            hits = [library_pb2.FeatureHit(feature=self._feature(i), score=1 / (n + 1)) for n, i in enumerate(found)]
            return library_pb2.SearchFeaturesResponse(hits=hits[: request.page_size or 50], total_size=len(hits))

    def ListFeatureExamples(
        self, request: Any, context: grpc.ServicerContext
    ) -> library_pb2.ListFeatureExamplesResponse:
        self._enter("ListFeatureExamples", request, context)
        names = ["a", "b", "c"][: request.page_size or 12]
        examples = [
            library_pb2.FeatureExample(picture=name, activation=3.0 - n, thumbnail=png(200), caption=f"picture {name}")
            for n, name in enumerate(names)
        ]
        return library_pb2.ListFeatureExamplesResponse(examples=examples, total_size=3)

    def GetFeatureIcon(self, request: Any, context: grpc.ServicerContext) -> library_pb2.GetFeatureIconResponse:
        self._enter("GetFeatureIcon", request, context)
        with self._failing(context):
            if self._resolve(request.feature) != 3:
                raise _Failure(Fault("NOT_FOUND", "ICON_NOT_MADE", "no icon yet"))
            return library_pb2.GetFeatureIconResponse(icon=png(9), strengths=[0, 1, 2])

    def SetFeatureLabel(self, request: Any, context: grpc.ServicerContext) -> library_pb2.SetFeatureLabelResponse:
        self._enter("SetFeatureLabel", request, context)
        index = self._resolve(request.feature)
        self._labels[index] = request.label
        feature = self._feature(index)
        feature.label_source = library_pb2.LABEL_SOURCE_PERSON
        return library_pb2.SetFeatureLabelResponse(feature=feature)

    # -- what they share ---------------------------------------------------------------------------------------

    def _edit_events(self, request: Any, context: grpc.ServicerContext) -> Iterator[studio_pb2.EditImageResponse]:
        for part in ("encoder", "sae", "generator"):
            expected = getattr(request.expected_revisions, part)
            if expected and expected != self.revisions[part]:
                metadata = {"part": part, "expected": expected, "actual": self.revisions[part]}
                raise _Failure(Fault("FAILED_PRECONDITION", "REVISION_MISMATCH", "other models", metadata=metadata))
        x = self._image_input(request.input)
        report, after, resolved = self._apply(x, request.edits, measure=not request.skip_measuring)
        edited = studio_pb2.Edited(
            embedding=self._remember(after), report=report, revisions=self._revisions(), edits=resolved
        )
        yield studio_pb2.EditImageResponse(edited=edited)
        if request.report_only:
            return
        settings = generator_pb2.GenerationSettings()
        settings.CopyFrom(request.settings)
        settings.width, settings.height = settings.width or 8, settings.height or 8
        settings.steps = settings.steps or 4
        settings.scheduler = settings.scheduler or generator_pb2.SCHEDULER_DDIM
        if not settings.HasField("guidance_scale"):
            settings.guidance_scale = 2.0
        if not settings.seeds:
            settings.seeds.append(self.picked_seed)
        finished = threading.Event()
        if not context.add_callback(lambda: finished.is_set() or self.cancelled.set()):
            self.cancelled.set()  # gone already
            return
        yield studio_pb2.EditImageResponse(queued=generator_pb2.Queued(position=1))
        yield studio_pb2.EditImageResponse(started=generator_pb2.Started(seeds=settings.seeds, settings=settings))
        for index, seed in enumerate(settings.seeds):
            picture = io.BytesIO()
            colour = (seed % 256, int(255 * min(1.0, float(np.abs(after).max()))), 0)
            Image.new("RGB", (settings.width, settings.height), colour).save(picture, "PNG")
            for step in range(1, settings.steps + 1):
                time.sleep(self.step_seconds)
                if not context.is_active():
                    return
                self.steps_done += 1
                progress = generator_pb2.Progress(index=index, step=step, steps=settings.steps)
                yield studio_pb2.EditImageResponse(progress=progress)
                if request.preview_every and step % request.preview_every == 0 and step < settings.steps:
                    preview = generator_pb2.Preview(index=index, step=step, data=picture.getvalue())
                    yield studio_pb2.EditImageResponse(preview=preview)
            image = generator_pb2.Image(
                index=index, seed=seed, data=picture.getvalue(), width=settings.width, height=settings.height
            )
            yield studio_pb2.EditImageResponse(image=image)
        finished.set()
        yield studio_pb2.EditImageResponse(finished=generator_pb2.Finished())

    def _apply(self, x: np.ndarray, edits: Any, *, measure: bool) -> tuple[Any, np.ndarray, list[edits_pb2.Edit]]:
        f, after = np.maximum(x, 0), x.copy()
        outcomes, resolved, named = [], [], set()
        for edit in edits:
            index = self._resolve(edit.feature)
            if index in named:
                raise _Failure(Fault("INVALID_ARGUMENT", "INVALID_FIELD", f"feature {index} twice", "edits"))
            named.add(index)
            unit = 1.0 if edit.unit == edits_pb2.EDIT_UNIT_RAW else P99
            value = {
                edits_pb2.EDIT_OPERATION_SET: edit.value * unit,
                edits_pb2.EDIT_OPERATION_SWITCH: edit.value * unit,
                edits_pb2.EDIT_OPERATION_ADD: f[index] + edit.value * unit,
                edits_pb2.EDIT_OPERATION_SCALE: f[index] * edit.value,
                edits_pb2.EDIT_OPERATION_ABLATE: 0.0,
            }[edit.operation]
            outcomes.append((index, edit.operation, float(value), None))
            copy = edits_pb2.Edit()
            copy.CopyFrom(edit)
            copy.feature.index = index
            resolved.append(copy)
        for index, operation, _, _ in list(outcomes):
            for rival in RIVALS.get(index, []) if operation == edits_pb2.EDIT_OPERATION_SWITCH else []:
                if rival not in named:
                    outcomes.append((rival, edits_pb2.EDIT_OPERATION_ABLATE, 0.0, index))
        for index, _, value, _ in outcomes:
            after[index] += value - f[index]
        report = edits_pb2.EditReport(
            outcomes=[self._outcome(f, after, *outcome, measure) for outcome in outcomes],
            delta_norm=float(np.linalg.norm(after - x)),
            cosine=float(after @ x / max(1e-9, np.linalg.norm(after) * np.linalg.norm(x))),
            measured=measure,
        )
        if measure:
            report.drift = 0.05
            report.drifted.add(feature_index=12, label=self._labels[12], before=0.0, after=0.1)
        return report, after, resolved

    def _outcome(
        self, f: np.ndarray, after: np.ndarray, index: int, operation: Any, value: float, rival: Any, measure: bool
    ) -> edits_pb2.EditOutcome:
        achieved = float(max(0.0, after[index])) if measure else None
        return edits_pb2.EditOutcome(
            feature_index=index,
            label=self._labels.get(index, ""),
            operation=operation,
            before=f[index],
            requested=value,
            achieved=achieved,
            before_scaled=f[index] / P99,
            requested_scaled=value / P99,
            achieved_scaled=None if achieved is None else achieved / P99,
            rival_of=rival,
        )

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

    def _feature(self, index: int) -> library_pb2.Feature:
        label = self._labels.get(index, "")
        return library_pb2.Feature(
            index=index,
            label=label,
            label_source=library_pb2.LABEL_SOURCE_AUTOMATIC if label else library_pb2.LABEL_SOURCE_UNSPECIFIED,
            alive=index < 16,
            firing_share=0.25,
            mean_activation=0.5,
            p50=0.4,
            p99=P99,
            max_activation=2.5,
            detection_score=0.9 if label else None,
        )

    def _resolve(self, ref: edits_pb2.FeatureRef) -> int:
        if ref.WhichOneof("feature") == "index":
            if ref.index >= D:
                raise _Failure(Fault("NOT_FOUND", "UNKNOWN_FEATURE", f"no feature {ref.index}; the last is {D - 1}"))
            return int(ref.index)
        for index, label in self._labels.items():
            if label.lower() == ref.label.lower():
                return index
        metadata = {"nearest": "night, snow"}
        message = f"no feature is labelled {ref.label!r}; nearest: night, snow"
        raise _Failure(Fault("NOT_FOUND", "UNKNOWN_FEATURE", message, metadata=metadata))

    def _image_input(self, source: studio_pb2.ImageInput) -> np.ndarray:
        if source.WhichOneof("source") == "image":
            try:
                return embeds_of(source.image)
            except OSError:
                fault = Fault("INVALID_ARGUMENT", "UNREADABLE_IMAGE", "not a picture that is read here", "input.image")
                raise _Failure(fault) from None
        return self._input(source)

    def _input(self, source: Any) -> np.ndarray:
        if source.WhichOneof("source") == "embeds":
            return np.frombuffer(source.embeds.data, "<f4").copy()
        if source.embedding_id not in self._embeds:
            metadata = {"embedding_id": source.embedding_id}
            raise _Failure(Fault("NOT_FOUND", "EMBEDDING_EXPIRED", "no longer cached", metadata=metadata))
        return self._embeds[source.embedding_id]

    def _remember(self, x: np.ndarray) -> tensor_pb2.Embedding:
        x = x.astype("<f4")
        name = f"{self.revisions['encoder']}-{hashlib.sha256(x.tobytes()).hexdigest()}"
        if self.remembers:
            self._embeds[name] = x
        tensor = tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())
        return tensor_pb2.Embedding(embedding_id=name, embeds=tensor)

    def _revisions(self) -> execution_pb2.Revisions:
        return execution_pb2.Revisions(**self.revisions)

    def _count(self, request: Any, context: grpc.ServicerContext, name: str) -> None:
        self.calls.append((name, request))
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}

    def _enter(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self._count(request, context, name)
        time.sleep(self.answer_seconds)
        if self._faults[name]:
            with self._failing(context):
                raise _Failure(self._faults[name].popleft())

    def _failing(self, context: grpc.ServicerContext) -> _Failing:
        return _Failing(context)


class _Failing:
    """Turns a failure into the call's status."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if not isinstance(error, _Failure):
            return
        trailing: list[tuple[str, Any]] = [("x-request-id", "request-1")]
        if not error.fault.plain:
            trailing.append(("grpc-status-details-bin", error.fault.status().SerializeToString()))
        self._context.set_trailing_metadata(tuple(trailing))
        self._context.abort(grpc.StatusCode[error.fault.code], error.fault.message)


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed

"""A small real Faceteer server over arithmetic that can be done by hand: the SDK's and the CLI's test double.

Knows nothing of the SDK. The "encoder" puts the mean brightness of a picture's 4 x 4 tiles (0 to 1) into the first 16
of 512 dimensions; the "SAE" is the identity, so feature i is max(0, x[i]); every p99 is 2, so scaled = activation / 2;
the "generator" paints one flat colour that its seed picks. Calls are recorded, and can be made to fail.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    encoder_pb2_grpc,
    execution_pb2,
    generator_pb2,
    generator_pb2_grpc,
    library_pb2_grpc,
    sae_pb2,
    sae_pb2_grpc,
    studio_pb2,
    studio_pb2_grpc,
    tensor_pb2,
)
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image
from unit.sdk.fake_library import FakeLibrary
from unit.sdk.fake_models import FakeModels
from unit.sdk.fake_world import LABELS, MAX_BATCH, P99, REVISIONS, RIVALS, D, Failing, Failure, Fault, embeds_of, png

__all__ = ["LABELS", "MAX_BATCH", "P99", "D", "FakeServer", "Fault", "embeds_of", "png"]


class FakeServer(FakeModels, FakeLibrary, studio_pb2_grpc.StudioServiceServicer):
    """All that the SDK calls, on one port of 127.0.0.1. Use as a context manager.

    Attributes:
        calls: (call, request) in order; streams of requests record each message.
        metadata: the last call's metadata.
        deadlines: seconds that the last call of each name was given.
        remembers: whether embedding ids are found again; False is a server without a shared cache.
        step_seconds: how long a denoising step takes.
        steps_done: denoising steps taken, over all requests.
        cancelled: set when a drawing noticed that its caller is gone.
        picked_seed: the seed drawn when none is given.
        down: why a part does not answer, as GetStudio is to say, by part.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.metadata: dict[str, str] = {}
        self.deadlines: dict[str, float] = {}
        self.remembers = True
        self.step_seconds = 0.0
        self.answer_seconds = 0.0
        self.steps_done = 0
        self.cancelled = threading.Event()
        self.picked_seed = 2**63 + 5
        self.revisions = dict(REVISIONS)
        self.most_waiting = 0
        self.down: dict[str, str] = {}
        self._embeds: dict[str, np.ndarray] = {}
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self._labels = dict(LABELS)
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        for add in (
            studio_pb2_grpc.add_StudioServiceServicer_to_server,
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
            sae_pb2_grpc.add_SaeServiceServicer_to_server,
            generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
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
                revision=r["sae"],
                architecture="standard",
                d_in=D,
                d_sae=D,
                has_statistics=True,
                max_edits=300,
                max_batch=MAX_BATCH,
            ),
            generator=generator_pb2.GetGeneratorResponse(
                revision=r["generator"],
                sizes=[generator_pb2.Size(width=8, height=8)],
                defaults=defaults,
                max_steps=100,
                max_seeds=4,
                schedulers=[generator_pb2.SCHEDULER_DDIM, generator_pb2.SCHEDULER_DDPM],
                has_prior=True,
                kind="kandinsky-2-2",
                reads_images=True,
                size_multiple=8,
                max_pixels=4096,
            ),
            library=self.GetLibraryAnswer,
            parts=[
                studio_pb2.PartStatus(
                    name=name,
                    state=studio_pb2.PART_STATE_DOWN if name in self.down else studio_pb2.PART_STATE_UP,
                    reason=self.down.get(name, ""),
                )
                for name in ("encoder", "sae", "generator", "library")
            ],
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
                    raise Failure(fault)
                yield message
            if fault is not None:
                raise Failure(fault)

    def TransferFeatures(self, request: Any, context: grpc.ServicerContext) -> studio_pb2.TransferFeaturesResponse:
        self._enter("TransferFeatures", request, context)
        with self._failing(context):
            target, source = self._image_input(request.target), self._image_input(request.source)
            reference = self._image_input(request.reference) if request.HasField("reference") else target
            found, covered = self._difference(reference, source, request.coverage, request.max_edits)
            only, without = ({self._resolve(one) for one in refs} for refs in (request.only, request.without))
            edits = [
                one for one in found if (not only or one.feature.index in only) and one.feature.index not in without
            ]
            report, after, resolved = self._apply(target, edits, measure=True)
            parts = [
                studio_pb2.TransferPart(
                    feature_index=one.feature.index,
                    label=self._labels.get(one.feature.index, ""),
                    share=0.5,
                    taken=one in edits,
                )
                for one in found
            ]
            return studio_pb2.TransferFeaturesResponse(
                edits=resolved,
                target=self._remember(target),
                embedding=self._remember(after),
                report=report,
                coverage=covered,
                revisions=self._revisions(),
                parts=parts,
            )

    # -- what they share ---------------------------------------------------------------------------------------

    def _edit_events(self, request: Any, context: grpc.ServicerContext) -> Iterator[studio_pb2.EditImageResponse]:
        for part in ("encoder", "sae", "generator"):
            expected = getattr(request.expected_revisions, part)
            if expected and expected != self.revisions[part]:
                metadata = {"part": part, "expected": expected, "actual": self.revisions[part]}
                raise Failure(Fault("FAILED_PRECONDITION", "REVISION_MISMATCH", "other models", metadata=metadata))
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
            if request.measure_picture:
                # The decoder makes half of what the embedding holds.
                seen = [
                    studio_pb2.PictureOutcome(
                        feature_index=one.feature_index, activation=one.requested / 2, scaled=one.requested_scaled / 2
                    )
                    for one in report.outcomes
                ]
                measured = studio_pb2.MeasuredPicture(index=index, seed=seed, outcomes=seen)
                yield studio_pb2.EditImageResponse(measured=measured)
        finished.set()
        yield studio_pb2.EditImageResponse(finished=generator_pb2.Finished())

    def _apply(self, x: np.ndarray, edits: Any, *, measure: bool) -> tuple[Any, np.ndarray, list[edits_pb2.Edit]]:
        f, after = np.maximum(x, 0), x.copy()
        outcomes, resolved, named = [], [], set()
        for edit in edits:
            index = self._resolve(edit.feature)
            if index in named:
                raise Failure(Fault("INVALID_ARGUMENT", "INVALID_FIELD", f"feature {index} twice", "edits"))
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

    def _resolve(self, ref: edits_pb2.FeatureRef) -> int:
        if ref.WhichOneof("feature") == "index":
            if ref.index >= D:
                raise Failure(Fault("NOT_FOUND", "UNKNOWN_FEATURE", f"no feature {ref.index}; the last is {D - 1}"))
            return int(ref.index)
        for index, label in self._labels.items():
            if label.lower() == ref.label.lower():
                return index
        metadata = {"nearest": "night, snow"}
        message = f"no feature is labelled {ref.label!r}; nearest: night, snow"
        raise Failure(Fault("NOT_FOUND", "UNKNOWN_FEATURE", message, metadata=metadata))

    def _image_input(self, source: studio_pb2.ImageInput) -> np.ndarray:
        if source.WhichOneof("source") == "image":
            try:
                return embeds_of(source.image)
            except OSError:
                fault = Fault("INVALID_ARGUMENT", "UNREADABLE_IMAGE", "not a picture that is read here", "input.image")
                raise Failure(fault) from None
        return self._input(source)

    def _input(self, source: Any) -> np.ndarray:
        if source.WhichOneof("source") == "embeds":
            return np.frombuffer(source.embeds.data, "<f4").copy()
        if source.embedding_id not in self._embeds:
            metadata = {"embedding_id": source.embedding_id}
            raise Failure(Fault("NOT_FOUND", "EMBEDDING_EXPIRED", "no longer cached", metadata=metadata))
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
        self.deadlines[name] = context.time_remaining() or 0.0
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}

    def _enter(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self._count(request, context, name)
        time.sleep(self.answer_seconds)
        if self._faults[name]:
            with self._failing(context):
                raise Failure(self._faults[name].popleft())

    def _failing(self, context: grpc.ServicerContext) -> Failing:
        return Failing(context)

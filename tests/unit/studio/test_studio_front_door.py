"""The front door against small real upstreams: errors, deadlines and leaving callers pass through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    encoder_pb2_grpc,
    execution_pb2,
    generator_pb2,
    generator_pb2_grpc,
    library_pb2,
    library_pb2_grpc,
    sae_pb2,
    sae_pb2_grpc,
    studio_pb2,
    studio_pb2_grpc,
    tensor_pb2,
)
from faceteer_runtime.errors import InvalidField, QueueFull, UnknownFeature, UnreadableImage
from faceteer_runtime.server import RunningServer, start
from faceteer_runtime.service import Resources, Service
from faceteer_runtime.settings import ServiceSettings
from faceteer_runtime.status import error_to_item
from faceteer_runtime.tensors import to_tensor
from faceteer_studio.service import build
from faceteer_studio.settings import StudioSettings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rpc_errors import read_error


class UpstreamSettings(ServiceSettings):
    needs_bundle = False


GATED = 7
EMBEDS = to_tensor(np.ones(4, np.float32))


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    async def GetEncoder(self, request: Any, context: Any) -> encoder_pb2.GetEncoderResponse:
        return encoder_pb2.GetEncoderResponse(revision="enc1", bundle="fake", embed_dim=4)

    async def EncodeImages(self, request: Any, context: Any) -> encoder_pb2.EncodeImagesResponse:
        if request.images[0] == b"full":
            raise QueueFull(1.5)
        if request.images[0] == b"bad":
            error = error_to_item(UnreadableImage("images[0]", "no picture"))
            return encoder_pb2.EncodeImagesResponse(results=[encoder_pb2.EncodeResult(error=error)])
        embedding = tensor_pb2.Embedding(embedding_id="enc1-" + "0" * 64, embeds=EMBEDS)
        return encoder_pb2.EncodeImagesResponse(
            results=[encoder_pb2.EncodeResult(embedding=embedding)],
            execution=execution_pb2.Execution(model_revision="enc1"),
        )

    async def StreamEncodeImages(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if request.image == b"broken stream":
                raise InvalidField("image", "stop")
            yield encoder_pb2.StreamEncodeImagesResponse(sequence=request.sequence)


class Sae(sae_pb2_grpc.SaeServiceServicer):
    async def EncodeFeatures(self, request: Any, context: Any) -> sae_pb2.EncodeFeaturesResponse:
        return sae_pb2.EncodeFeaturesResponse(
            results=[sae_pb2.EncodeFeaturesResult(encoding=sae_pb2.FeatureEncoding(l0=1))],
            execution=execution_pb2.Execution(model_revision="sae1"),
        )

    async def GetSae(self, request: Any, context: Any) -> sae_pb2.GetSaeResponse:
        return sae_pb2.GetSaeResponse(revision="sae1", encoder_revision="enc1", d_in=4, d_sae=10)

    async def EditEmbeds(self, request: Any, context: Any) -> sae_pb2.EditEmbedsResponse:
        assert request.input.WhichOneof("source") == "embeds", "the studio sends embeddings inline"
        outcomes = [
            edits_pb2.EditOutcome(feature_index=edit.feature.index, operation=edit.operation) for edit in request.edits
        ]
        return sae_pb2.EditEmbedsResponse(
            embedding=tensor_pb2.Embedding(embedding_id="enc1-" + "1" * 64, embeds=request.input.embeds),
            report=edits_pb2.EditReport(outcomes=outcomes, measured=request.measure),
            execution=execution_pb2.Execution(model_revision="sae1"),
        )


class Generator(generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self) -> None:
        self.deadlines: list[float | None] = []
        self.running = 0
        self.ended = asyncio.Event()

    async def GetGenerator(self, request: Any, context: Any) -> generator_pb2.GetGeneratorResponse:
        return generator_pb2.GetGeneratorResponse(revision="gen1")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.deadlines.append(context.time_remaining())
        self.running += 1
        try:
            yield generator_pb2.GenerateResponse(queued=generator_pb2.Queued(position=0))
            await asyncio.sleep(60)
        finally:
            self.running -= 1
            self.ended.set()


class Library(library_pb2_grpc.LibraryServiceServicer):
    async def GetLibrary(self, request: Any, context: Any) -> library_pb2.GetLibraryResponse:
        return library_pb2.GetLibraryResponse(revision="lib1")

    async def ListFeatures(self, request: Any, context: Any) -> library_pb2.ListFeaturesResponse:
        return library_pb2.ListFeaturesResponse(execution=execution_pb2.Execution(model_revision="lib1"))

    async def BatchGetFeatures(self, request: Any, context: Any) -> library_pb2.BatchGetFeaturesResponse:
        labels = {"night": 3, "snow": 5}
        features, missing = [], []
        for at, reference in enumerate(request.features):
            if reference.label and reference.label not in labels:
                if request.allow_missing:
                    missing.append(at)
                    continue
                raise UnknownFeature(f"no feature is labelled {reference.label!r}", ["night"]).at(
                    f"features[{at}].label"
                )
            if reference.index == GATED:
                assert request.allow_missing
                continue
            index = labels.get(reference.label, reference.index)
            label = next((label for label, i in labels.items() if i == index), "")
            features.append(library_pb2.Feature(index=index, label=label))
        matches = [edits_pb2.FeatureMatch(text=feature.label) for feature in features]
        return library_pb2.BatchGetFeaturesResponse(features=features, missing=missing, matches=matches)


@contextlib.asynccontextmanager
async def serving(name: str, register: Any, servicer: Any) -> AsyncIterator[RunningServer]:
    def build_one(resources: Resources) -> Service:
        return Service(f"faceteer.v1.{name}", lambda server: register(servicer, server))

    server = await start(UpstreamSettings(listen="127.0.0.1:0"), build_one)
    try:
        yield server
    finally:
        await server.stop(0.1)


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The address of a process that takes connections and never answers, as a stopped one does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
async def door() -> AsyncIterator[SimpleNamespace]:
    """A front door over four small upstreams, and a channel to it."""
    async with open_door() as opened:
        yield opened


@contextlib.asynccontextmanager
async def open_door(**settings: Any) -> AsyncIterator[SimpleNamespace]:
    generator = Generator()
    async with contextlib.AsyncExitStack() as stack:
        upstream = {
            "encoder": ("EncoderService", encoder_pb2_grpc.add_EncoderServiceServicer_to_server, Encoder()),
            "sae": ("SaeService", sae_pb2_grpc.add_SaeServiceServicer_to_server, Sae()),
            "generator": ("GeneratorService", generator_pb2_grpc.add_GeneratorServiceServicer_to_server, generator),
            "library": ("LibraryService", library_pb2_grpc.add_LibraryServiceServicer_to_server, Library()),
        }
        servers = {name: await stack.enter_async_context(serving(*parts)) for name, parts in upstream.items()}
        addresses = {f"studio_{name}_address": server.address for name, server in servers.items()}
        studio = await start(StudioSettings(listen="127.0.0.1:0", **(addresses | settings)), build)
        stack.push_async_callback(studio.stop, 0.1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(studio.address))
        yield SimpleNamespace(
            studio=studio_pb2_grpc.StudioServiceStub(channel),
            encoder=encoder_pb2_grpc.EncoderServiceStub(channel),
            generator=generator_pb2_grpc.GeneratorServiceStub(channel),
            library=library_pb2_grpc.LibraryServiceStub(channel),
            health=health_pb2_grpc.HealthStub(channel),
            generator_servicer=generator,
            servers=servers,
        )


def edit_request(*labels: str, image: bytes = b"picture", **fields: Any) -> studio_pb2.EditImageRequest:
    edits = [
        edits_pb2.Edit(feature=edits_pb2.FeatureRef(label=label), operation=edits_pb2.EDIT_OPERATION_SET, value=1.0)
        for label in labels
    ]
    return studio_pb2.EditImageRequest(input=studio_pb2.ImageInput(image=image), edits=edits, **fields)


async def test_labels_are_resolved_and_filled_in(door: SimpleNamespace) -> None:
    events = [event async for event in door.studio.EditImage(edit_request("snow", "night", report_only=True))]
    edited = events[0].edited
    assert [(outcome.feature_index, outcome.label) for outcome in edited.report.outcomes] == [(5, "snow"), (3, "night")]
    assert [edit.feature.index for edit in edited.edits] == [5, 3]
    assert edited.revisions == execution_pb2.Revisions(encoder="enc1", sae="sae1", generator="gen1", library="lib1")


async def test_a_feature_that_the_library_does_not_show_can_only_be_turned_off(door: SimpleNamespace) -> None:
    def request(operation: int) -> studio_pb2.EditImageRequest:
        edit = edits_pb2.Edit(feature=edits_pb2.FeatureRef(index=GATED), operation=operation)
        return studio_pb2.EditImageRequest(input=studio_pb2.ImageInput(image=b"x"), edits=[edit], report_only=True)

    (event,) = [event async for event in door.studio.EditImage(request(edits_pb2.EDIT_OPERATION_ABLATE))]
    assert [(outcome.feature_index, outcome.label) for outcome in event.edited.report.outcomes] == [(GATED, "")]
    for operation in (edits_pb2.EDIT_OPERATION_SET, edits_pb2.EDIT_OPERATION_ADD, edits_pb2.EDIT_OPERATION_SCALE):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in door.studio.EditImage(request(operation))]
        failure = read_error(caught.value)
        assert (failure.reason, failure.fields) == ("UNKNOWN_FEATURE", ["edits[0].feature.index"])
        assert not door.generator_servicer.deadlines, "nothing was drawn"


async def test_an_unknown_label_names_its_edit_and_the_nearest(door: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio.EditImage(edit_request("snow", "nihgt"))]
    failure = read_error(caught.value)
    assert (failure.code, failure.reason) == ("NOT_FOUND", "UNKNOWN_FEATURE")
    assert failure.fields == ["edits[1].feature.label"]
    assert failure.metadata["nearest"] == "night"


async def test_an_upstreams_refusal_reaches_the_caller_whole(door: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio.EditImage(edit_request(image=b"full"))]
    failure = read_error(caught.value)
    assert (failure.code, failure.reason, failure.retry_after) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.5)


async def test_the_field_at_fault_is_named_in_the_callers_words(door: SimpleNamespace) -> None:
    request = studio_pb2.TransferFeaturesRequest(
        target=studio_pb2.ImageInput(image=b"picture"), source=studio_pb2.ImageInput(image=b"bad")
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.studio.TransferFeatures(request)
    failure = read_error(caught.value)
    assert (failure.reason, failure.fields) == ("UNREADABLE_IMAGE", ["source.image"])
    assert failure.message.startswith("source.image: ")


async def test_another_revision_is_refused_before_any_work(door: SimpleNamespace) -> None:
    request = edit_request(image=b"full", expected_revisions=execution_pb2.Revisions(sae="sae0"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio.EditImage(request)]
    assert read_error(caught.value).metadata == {"part": "sae", "expected": "sae0", "actual": "sae1"}


async def test_the_remaining_deadline_is_passed_on(door: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio.EditImage(edit_request(), timeout=2.0)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    (deadline,) = door.generator_servicer.deadlines
    assert deadline is not None
    # On the wire a timeout is rounded up, so the child may see a few milliseconds more; never no deadline at all.
    assert 0 < deadline < 2.1


@pytest.mark.parametrize("through", ["studio", "gateway"])
async def test_a_caller_that_leaves_takes_its_child_call_with_it(door: SimpleNamespace, through: str) -> None:
    if through == "studio":
        call = door.studio.EditImage(edit_request())
        await call.read()  # the report
        await call.read()  # queued
    else:
        call = door.generator.Generate(generator_pb2.GenerateRequest())
        await call.read()
    assert door.generator_servicer.running == 1
    call.cancel()
    await asyncio.wait_for(door.generator_servicer.ended.wait(), 5)
    assert door.generator_servicer.running == 0


async def test_a_service_that_is_gone_is_named(door: SimpleNamespace) -> None:
    await door.servers["sae"].stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio.EditImage(edit_request())]
    failure = read_error(caught.value)
    assert (failure.code, failure.reason) == ("UNAVAILABLE", "UPSTREAM_UNAVAILABLE")
    assert failure.metadata == {"service": "sae"}
    # The others go on.
    assert (await door.encoder.GetEncoder(encoder_pb2.GetEncoderRequest())).revision == "enc1"


async def test_the_gateway_forwards_every_shape_of_call(door: SimpleNamespace) -> None:
    assert (await door.library.ListFeatures(library_pb2.ListFeaturesRequest())).execution.model_revision == "lib1"
    requests = (encoder_pb2.StreamEncodeImagesRequest(sequence=n, image=b"x") for n in range(5))
    answers = [answer.sequence async for answer in door.encoder.StreamEncodeImages(requests)]
    assert answers == list(range(5))
    broken = iter([encoder_pb2.StreamEncodeImagesRequest(image=b"broken stream")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [answer async for answer in door.encoder.StreamEncodeImages(broken)]
    assert read_error(caught.value).fields == ["image"]
    unknown = library_pb2.BatchGetFeaturesRequest(features=[edits_pb2.FeatureRef(label="nihgt")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.library.BatchGetFeatures(unknown)
    assert read_error(caught.value).metadata["nearest"] == "night"


async def test_one_request_id_goes_through_all_services(door: SimpleNamespace) -> None:
    call = door.library.ListFeatures(library_pb2.ListFeaturesRequest(), metadata=(("x-request-id", "from-the-test"),))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "from-the-test"


HEALTHY, ILL = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
OPEN = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"picture"))


async def health(door: SimpleNamespace, service: str) -> int:
    name = f"faceteer.v1.{service}Service"
    return int((await door.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)).status)


async def test_with_one_service_dead_the_others_work_and_status_and_health_name_it(door: SimpleNamespace) -> None:
    assert await health(door, "Generator") == HEALTHY
    watch = door.health.Watch(health_pb2.HealthCheckRequest(service="faceteer.v1.GeneratorService"))
    while (await watch.read()).status != HEALTHY:
        pass
    await door.servers["generator"].stop(0)
    assert (await door.studio.OpenImage(OPEN)).l0 == 1
    events = [event async for event in door.studio.EditImage(edit_request("snow", report_only=True))]
    assert events[0].edited.report.outcomes[0].label == "snow"
    await asyncio.sleep(0.6)  # for so long a part's state is remembered
    about = await door.studio.GetStudio(studio_pb2.GetStudioRequest())
    down = {part.name: part.reason for part in about.parts if part.state == studio_pb2.PART_STATE_DOWN}
    assert list(down) == ["generator"]
    assert "cannot be reached" in down["generator"]
    states = {name: await health(door, name) for name in ("Studio", "Encoder", "Sae", "Generator", "Library")}
    assert states == {"Studio": HEALTHY, "Encoder": HEALTHY, "Sae": HEALTHY, "Generator": ILL, "Library": HEALTHY}
    assert (await asyncio.wait_for(watch.read(), 10)).status == ILL
    watch.cancel()


async def test_a_service_that_hangs_since_before_the_start_holds_up_nobody_for_long() -> None:
    with hanging() as address:
        async with open_door(studio_generator_address=address, studio_wait_seconds=0.3) as door:
            started = time.monotonic()
            answers = await asyncio.gather(*(door.studio.OpenImage(OPEN) for _ in range(8)))
            assert [answer.l0 for answer in answers] == [1] * 8
            assert time.monotonic() - started < 3.5, "one wait of two seconds for all of them"
            started = time.monotonic()
            await door.studio.OpenImage(OPEN)
            assert time.monotonic() - started < 1
            about = await door.studio.GetStudio(studio_pb2.GetStudioRequest(), timeout=5)
            (reason,) = [part.reason for part in about.parts if part.state == studio_pb2.PART_STATE_DOWN]
            assert reason.startswith("generator: ")
            assert await health(door, "Generator") == ILL
            assert await health(door, "Studio") == HEALTHY

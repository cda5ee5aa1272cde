"""What the door adds to the library and to EditImage, against small real upstreams that note what they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable
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
from faceteer_runtime.errors import FaceteerError, IconNotMade, InvalidField, NotInBundle, QueueFull
from faceteer_runtime.server import start
from faceteer_runtime.service import Resources, Service
from faceteer_runtime.settings import ServiceSettings
from faceteer_runtime.tensors import to_array, to_tensor
from faceteer_studio.service import build
from faceteer_studio.settings import StudioSettings
from PIL import Image
from rpc_errors import read_error


class UpstreamSettings(ServiceSettings):
    needs_bundle = False


TEXT = to_tensor(np.array([1, 2, 3, 4], np.float32))
TEMPLATE_EMBEDS = np.array([0.5, 1, 1.5, 2], np.float32)


class Upstream:
    """Writes down (method, request, access key) of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, str]] = []
        self.failure: FaceteerError | None = None

    def note(self, method: str, request: Any, context: Any) -> None:
        keys = dict(context.invocation_metadata())
        self.calls.append((method, request, keys.get("x-faceteer-access", "")))

    def asked(self, method: str) -> list[Any]:
        return [request for name, request, _ in self.calls if name == method]


class Encoder(Upstream, encoder_pb2_grpc.EncoderServiceServicer):
    has_text_tower = True

    async def GetEncoder(self, request: Any, context: Any) -> encoder_pb2.GetEncoderResponse:
        return encoder_pb2.GetEncoderResponse(revision="enc1", embed_dim=4, has_text_tower=self.has_text_tower)

    async def EncodeTexts(self, request: Any, context: Any) -> encoder_pb2.EncodeTextsResponse:
        self.note("EncodeTexts", request, context)
        if self.failure is not None:
            raise self.failure
        if request.texts[0] == "slow":
            await asyncio.sleep(60)
        embedding = tensor_pb2.Embedding(embedding_id="t", embeds=TEXT)
        return encoder_pb2.EncodeTextsResponse(results=[encoder_pb2.EncodeResult(embedding=embedding)])

    async def EncodeImages(self, request: Any, context: Any) -> encoder_pb2.EncodeImagesResponse:
        embedding = tensor_pb2.Embedding(embedding_id="enc1-" + "0" * 64, embeds=TEXT)
        return encoder_pb2.EncodeImagesResponse(results=[encoder_pb2.EncodeResult(embedding=embedding)])


class Sae(Upstream, sae_pb2_grpc.SaeServiceServicer):
    async def GetSae(self, request: Any, context: Any) -> sae_pb2.GetSaeResponse:
        return sae_pb2.GetSaeResponse(revision="sae1", d_in=4, d_sae=10)

    async def EncodeFeatures(self, request: Any, context: Any) -> sae_pb2.EncodeFeaturesResponse:
        self.note("EncodeFeatures", request, context)
        features = tensor_pb2.SparseFeatures(indices=[5, 3], activations=[2.0, 1.0], scaled=[1.0, 0.5])
        encoding = sae_pb2.FeatureEncoding(features=features, l0=2)
        return sae_pb2.EncodeFeaturesResponse(results=[sae_pb2.EncodeFeaturesResult(encoding=encoding)])

    async def EditEmbeds(self, request: Any, context: Any) -> sae_pb2.EditEmbedsResponse:
        self.note("EditEmbeds", request, context)
        moved = to_array(request.input.embeds, field="embeds") + sum(edit.value for edit in request.edits)
        outcomes = [
            edits_pb2.EditOutcome(feature_index=edit.feature.index, operation=edit.operation) for edit in request.edits
        ]
        return sae_pb2.EditEmbedsResponse(
            embedding=tensor_pb2.Embedding(embedding_id="enc1-" + "1" * 64, embeds=to_tensor(moved)),
            report=edits_pb2.EditReport(outcomes=outcomes),
            execution=execution_pb2.Execution(model_revision="sae1"),
        )


class Generator(Upstream, generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self) -> None:
        super().__init__()
        self.running, self.seconds = 0, 0.0

    async def GetGenerator(self, request: Any, context: Any) -> generator_pb2.GetGeneratorResponse:
        defaults = generator_pb2.GenerationSettings(steps=25, guidance_scale=2.0)
        sizes = [generator_pb2.Size(width=64, height=64)]
        return generator_pb2.GetGeneratorResponse(revision="gen1", sizes=sizes, defaults=defaults)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.note("Generate", request, context)
        if self.failure is not None:
            raise self.failure
        self.running += 1
        try:
            yield generator_pb2.GenerateResponse(queued=generator_pb2.Queued(position=0))
            await asyncio.sleep(self.seconds)
            grey = int(to_array(request.input.embeds, field="embeds").sum()) * 10 % 256
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), (grey, grey, grey)).save(buffer, "PNG")
            yield generator_pb2.GenerateResponse(image=generator_pb2.Image(data=buffer.getvalue()))
        finally:
            self.running -= 1

    async def InvertImage(self, request: Any, context: Any) -> generator_pb2.InvertImageResponse:
        self.note("InvertImage", request, context)
        if self.failure is not None:
            raise self.failure
        return generator_pb2.InvertImageResponse(noise_id="noise-7")


class Library(Upstream, library_pb2_grpc.LibraryServiceServicer):
    searches_meaning = True
    template: np.ndarray | None = TEMPLATE_EMBEDS

    async def GetLibrary(self, request: Any, context: Any) -> library_pb2.GetLibraryResponse:
        self.note("GetLibrary", request, context)
        classes = ["violence"] if self.calls[-1][2] == "key" else []
        return library_pb2.GetLibraryResponse(
            revision="lib1", searches_meaning=self.searches_meaning, safety_classes=classes
        )

    async def SearchFeatures(self, request: Any, context: Any) -> library_pb2.SearchFeaturesResponse:
        self.note("SearchFeatures", request, context)
        indices = request.activations.indices if request.HasField("activations") else [1]
        hits = [
            library_pb2.FeatureHit(feature=library_pb2.Feature(index=index, label=f"f{index}")) for index in indices
        ]
        return library_pb2.SearchFeaturesResponse(hits=hits)

    async def GetFeatureIcon(self, request: Any, context: Any) -> library_pb2.GetFeatureIconResponse:
        self.note("GetFeatureIcon", request, context)
        if request.feature.index == 9:
            return library_pb2.GetFeatureIconResponse(icon=b"from the library")
        if self.template is None:
            raise IconNotMade(request.feature.index)
        recipe = library_pb2.IconRecipe(feature_index=request.feature.index, template=to_tensor(self.template))
        return library_pb2.GetFeatureIconResponse(recipe=recipe, strengths=[0.5, 1.0, 1.5])

    async def BatchGetFeatures(self, request: Any, context: Any) -> library_pb2.BatchGetFeaturesResponse:
        self.note("BatchGetFeatures", request, context)
        features = [library_pb2.Feature(index=each.index, label=f"f{each.index}") for each in request.features]
        return library_pb2.BatchGetFeaturesResponse(features=features)

    async def GetFeature(self, request: Any, context: Any) -> library_pb2.GetFeatureResponse:
        self.note("GetFeature", request, context)
        return library_pb2.GetFeatureResponse()


def served(service: str, register: Any, servicer: Any) -> Callable[[Resources], Service]:
    return lambda _: Service(f"faceteer.v1.{service}", lambda server: register(servicer, server))


async def until(ready: Callable[[], bool]) -> None:
    """Returns when something holds that nobody announces."""
    async with asyncio.timeout(5):
        while not ready():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def door() -> AsyncIterator[SimpleNamespace]:
    """A front door over four small upstreams."""
    fakes = SimpleNamespace(encoder=Encoder(), sae=Sae(), generator=Generator(), library=Library())
    modules = {
        "encoder": encoder_pb2_grpc,
        "sae": sae_pb2_grpc,
        "generator": generator_pb2_grpc,
        "library": library_pb2_grpc,
    }
    async with contextlib.AsyncExitStack() as stack:
        addresses = {}
        for name, module in modules.items():
            service = f"{name.capitalize()}Service"
            register = getattr(module, f"add_{service}Servicer_to_server")
            server = await start(
                UpstreamSettings(listen="127.0.0.1:0"), served(service, register, getattr(fakes, name))
            )
            stack.push_async_callback(server.stop, 0.1)
            addresses[f"studio_{name}_address"] = server.address
        studio = await start(StudioSettings(listen="127.0.0.1:0", **addresses), build)
        stack.push_async_callback(studio.stop, 0.1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(studio.address))
        fakes.studio_stub = studio_pb2_grpc.StudioServiceStub(channel)
        fakes.library_stub = library_pb2_grpc.LibraryServiceStub(channel)
        yield fakes


def words(text: str) -> library_pb2.SearchFeaturesRequest:
    return library_pb2.SearchFeaturesRequest(words=text)


def icon(index: int) -> library_pb2.GetFeatureIconRequest:
    return library_pb2.GetFeatureIconRequest(feature=edits_pb2.FeatureRef(index=index))


async def test_words_are_searched_with_their_meaning(door: SimpleNamespace) -> None:
    await door.library_stub.SearchFeatures(words("night sky"))
    (request,) = door.library.asked("SearchFeatures")
    assert (request.words, request.words_embeds) == ("night sky", TEXT)
    assert [list(each.texts) for each in door.encoder.asked("EncodeTexts")] == [["night sky"]]
    # A caller's own embedding is left alone.
    own = to_tensor(np.ones(4, np.float32))
    await door.library_stub.SearchFeatures(library_pb2.SearchFeaturesRequest(words="x", words_embeds=own))
    assert door.library.asked("SearchFeatures")[1].words_embeds == own
    assert len(door.encoder.asked("EncodeTexts")) == 1


@pytest.mark.parametrize("trouble", ["no text tower", "no meanings", "full", "slow", "blank"])
async def test_without_a_meaning_the_search_goes_by_words_alone(door: SimpleNamespace, trouble: str) -> None:
    door.encoder.has_text_tower = trouble != "no text tower"
    door.library.searches_meaning = trouble != "no meanings"
    door.encoder.failure = QueueFull(1.0) if trouble == "full" else None
    text = {"slow": "slow", "blank": "  "}.get(trouble, "night")
    answer = await door.library_stub.SearchFeatures(words(text), timeout=1.0)
    assert [hit.feature.index for hit in answer.hits] == [1]
    (request,) = door.library.asked("SearchFeatures")
    assert not request.HasField("words_embeds")


async def test_a_picture_is_turned_into_its_features(door: SimpleNamespace) -> None:
    request = library_pb2.SearchFeaturesRequest(picture=tensor_pb2.EmbedsInput(embeds=TEXT), page_size=7)
    request.filter.alive = True
    answer = await door.library_stub.SearchFeatures(request)
    assert [hit.feature.index for hit in answer.hits] == [5, 3]
    (forwarded,) = door.library.asked("SearchFeatures")
    assert forwarded.WhichOneof("query") == "activations"
    assert (list(forwarded.activations.activations), forwarded.page_size, forwarded.filter.alive) == ([2, 1], 7, True)


async def test_the_access_key_goes_to_the_library_and_to_nobody_else(door: SimpleNamespace) -> None:
    key = (("x-faceteer-access", "key"),)
    await door.library_stub.SearchFeatures(words("night"), metadata=key)
    await door.library_stub.GetFeature(library_pb2.GetFeatureRequest(), metadata=key)
    await door.library_stub.GetFeatureIcon(icon(2), metadata=key)
    opened = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"x"))
    await door.studio_stub.OpenImage(opened, metadata=key)
    for method, _, given in door.library.calls:
        # What is shared by all callers is asked without a key.
        assert given == ("" if method == "GetLibrary" else "key"), method
    for upstream in (door.encoder, door.sae, door.generator):
        assert upstream.calls
        assert {given for _, _, given in upstream.calls} == {""}
    shown = await door.studio_stub.GetStudio(studio_pb2.GetStudioRequest(), metadata=key)
    assert list(shown.library.safety_classes) == ["violence"]
    hidden = await door.studio_stub.GetStudio(studio_pb2.GetStudioRequest())
    assert not hidden.library.safety_classes


async def test_the_librarys_own_icon_is_passed_on(door: SimpleNamespace) -> None:
    assert (await door.library_stub.GetFeatureIcon(icon(9))).icon == b"from the library"
    assert not door.generator.calls


async def test_many_who_want_an_icon_at_once_have_it_drawn_once(door: SimpleNamespace) -> None:
    door.generator.seconds = 0.2
    answers = await asyncio.gather(*(door.library_stub.GetFeatureIcon(icon(2)) for _ in range(8)))
    assert len({answer.icon for answer in answers}) == 1
    drawn = door.generator.asked("Generate")
    assert len(drawn) == 4
    for request in drawn:
        # As icons are drawn everywhere: 12 steps, guidance 4, or the bundle's own where lower.
        assert (request.settings.steps, request.settings.guidance_scale, list(request.settings.seeds)) == (12, 2.0, [1])
    sums = sorted(float(to_array(request.input.embeds, field="embeds").sum()) for request in drawn)
    plain = float(TEMPLATE_EMBEDS.sum())
    assert sums == [plain, plain + 2, plain + 4, plain + 6], "the template, then switched on at 0.5, 1 and 1.5"
    for request in door.sae.asked("EditEmbeds"):
        (edit,) = request.edits
        assert (edit.feature.index, edit.operation, edit.unit) == (2, edits_pb2.EDIT_OPERATION_SWITCH, 0)
    with Image.open(io.BytesIO(answers[0].icon)) as strip:
        assert strip.size == (4 * 64 + 3 * 2, 64)
        greys = [np.asarray(strip.convert("L"))[32, 32 + 66 * at] for at in range(4)]
    assert np.allclose(greys, [50, 70, 90, 110], atol=3), "left to right"
    again = await door.library_stub.GetFeatureIcon(icon(2))
    assert again.execution.cached
    assert len(door.generator.asked("Generate")) == 4


async def test_an_icon_is_no_longer_drawn_when_everybody_has_left(door: SimpleNamespace) -> None:
    door.generator.seconds = 60
    calls = [door.library_stub.GetFeatureIcon(icon(2)) for _ in range(2)]
    await until(lambda: door.generator.running == 4)
    calls[0].cancel()
    await asyncio.sleep(0.2)
    assert door.generator.running == 4, "the other one still waits"
    calls[1].cancel()
    await until(lambda: door.generator.running == 0)


async def test_who_has_more_time_gets_the_icon_that_another_had_no_time_for(door: SimpleNamespace) -> None:
    door.generator.seconds = 0.6
    hasty = door.library_stub.GetFeatureIcon(icon(2), timeout=0.4)
    await asyncio.sleep(0.1)
    patient = door.library_stub.GetFeatureIcon(icon(2), timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hasty
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await patient).icon


async def test_a_refusal_while_drawing_reaches_the_caller_and_is_not_kept(door: SimpleNamespace) -> None:
    door.generator.failure = QueueFull(1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.library_stub.GetFeatureIcon(icon(2))
    assert (read_error(caught.value).reason, read_error(caught.value).retry_after) == ("QUEUE_FULL", 1.5)
    door.generator.failure = None
    assert (await door.library_stub.GetFeatureIcon(icon(2))).icon


@pytest.mark.parametrize("template", [None, np.ones(3, np.float32), np.full(4, np.nan, np.float32)])
async def test_without_a_template_that_fits_no_icon_is_made(door: SimpleNamespace, template: np.ndarray | None) -> None:
    door.library.template = template
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.library_stub.GetFeatureIcon(icon(2))
    failure = read_error(caught.value)
    assert (failure.code, failure.reason, failure.metadata) == ("NOT_FOUND", "ICON_NOT_MADE", {"feature_index": "2"})
    assert not door.generator.calls


def keeping(**keep: Any) -> studio_pb2.EditImageRequest:
    edit = edits_pb2.Edit(feature=edits_pb2.FeatureRef(index=3), operation=edits_pb2.EDIT_OPERATION_SET, value=1.0)
    return studio_pb2.EditImageRequest(
        input=studio_pb2.ImageInput(image=b"photo"),
        edits=[edit],
        settings=generator_pb2.GenerationSettings(width=64, height=64, steps=9, guidance_scale=3.0, seeds=[4]),
        keep_layout=studio_pb2.KeepLayout(**keep),
    )


async def test_image_to_image_starts_from_the_photo(door: SimpleNamespace) -> None:
    request = keeping(method=studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, image=b"another", strength=0.25)
    [event async for event in door.studio_stub.EditImage(request)]
    (drawing,) = door.generator.asked("Generate")
    assert drawing.start == generator_pb2.GenerationStart(image=b"another", strength=0.25)
    assert drawing.settings == request.settings
    request = keeping(method=studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE)
    [event async for event in door.studio_stub.EditImage(request)]
    start = door.generator.asked("Generate")[1].start
    assert (start.image, start.HasField("strength")) == (b"photo", False)


async def test_inversion_inverts_with_the_unedited_embedding_and_draws_with_the_edited(door: SimpleNamespace) -> None:
    request = keeping(method=studio_pb2.LAYOUT_METHOD_INVERSION)
    [event async for event in door.studio_stub.EditImage(request)]
    (inversion,), (drawing,) = door.generator.asked("InvertImage"), door.generator.asked("Generate")
    assert (inversion.image, inversion.input.embeds) == (b"photo", TEXT)
    assert inversion.settings == generator_pb2.GenerationSettings(width=64, height=64, steps=9)
    assert drawing.start == generator_pb2.GenerationStart(noise_id="noise-7")
    assert drawing.settings.scheduler == generator_pb2.SCHEDULER_DDIM
    assert (drawing.settings.guidance_scale, list(drawing.settings.seeds)) == (3.0, [4])
    assert np.allclose(to_array(drawing.input.embeds, field="x"), to_array(TEXT, field="x") + 1)


@pytest.mark.parametrize("method", [studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, studio_pb2.LAYOUT_METHOD_INVERSION])
async def test_what_the_generator_refuses_is_named_in_the_callers_words(door: SimpleNamespace, method: int) -> None:
    inverts = method == studio_pb2.LAYOUT_METHOD_INVERSION
    door.generator.failure = InvalidField("image" if inverts else "start.image", "no picture")
    for request, field in (
        (keeping(method=method), "input.image"),
        (keeping(method=method, image=b"x"), "keep_layout.image"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in door.studio_stub.EditImage(request)]
        assert read_error(caught.value).fields == [field]
    door.generator.failure = NotInBundle("inversion", "this decoder cannot read pictures")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in door.studio_stub.EditImage(keeping(method=method))]
    assert read_error(caught.value).reason == "NOT_IN_BUNDLE"

"""The studio's jobs over ports within the process: what is asked of whom, what is kept, which field is at fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

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
    tensor_pb2,
)
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from faceteer_runtime.errors import (
    DeadlineExceeded,
    EmbeddingExpired,
    FaceteerError,
    InvalidField,
    RevisionMismatch,
    UnknownFeature,
    UpstreamUnavailable,
)
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.status import error_to_item
from faceteer_runtime.tensors import to_array, to_tensor
from faceteer_studio.application import Studio
from faceteer_studio.layout import Layout
from faceteer_studio.ports import Call, Local, Ports
from faceteer_studio.servicer import StudioServicer
from files_entered import files_entered

GATED = 7
PARTS = {"encoder": "GetEncoder", "sae": "GetSae", "generator": "GetGenerator", "library": "GetLibrary"}
EDIT = studio_pb2.EditImageRequest
OPEN = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"abc"))
SET, ABLATE = edits_pb2.EDIT_OPERATION_SET, edits_pb2.EDIT_OPERATION_ABLATE


class Upstream:
    """Writes down (method, request) of every call, and fails as told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.failures: dict[str, FaceteerError] = {}

    def note(self, method: str, request: Any) -> None:
        self.calls.append((method, request))
        if method in self.failures:
            raise self.failures[method]

    def asked(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]


class Encoder(Upstream, encoder_pb2_grpc.EncoderServiceServicer):
    async def GetEncoder(self, request: Any, context: Any) -> encoder_pb2.GetEncoderResponse:
        self.note("GetEncoder", request)
        return encoder_pb2.GetEncoderResponse(revision="enc1", bundle="fake", embed_dim=4)

    async def EncodeImages(self, request: Any, context: Any) -> encoder_pb2.EncodeImagesResponse:
        self.note("EncodeImages", request)
        if request.images[0] == b"bad":
            error = error_to_item(InvalidField("images[0]", "no picture"))
            return encoder_pb2.EncodeImagesResponse(results=[encoder_pb2.EncodeResult(error=error)])
        x = np.arange(4, dtype=np.float32) + len(request.images[0])
        embedding = tensor_pb2.Embedding(embedding_id=embeds_content_id("enc2", x), embeds=to_tensor(x))
        return encoder_pb2.EncodeImagesResponse(
            results=[encoder_pb2.EncodeResult(embedding=embedding)],
            execution=execution_pb2.Execution(model_revision="enc2"),
        )


class Sae(Upstream, sae_pb2_grpc.SaeServiceServicer):
    """Feature i adds its value to dimension i % 4; the error of a reconstruction is 0.5 everywhere."""

    fired = ([3, 5], [1.0, 2.0], [0.5, 0.25])
    drifted: tuple[int, ...] = ()
    diff = ((1, 3.0), (GATED, 4.0))

    async def GetSae(self, request: Any, context: Any) -> sae_pb2.GetSaeResponse:
        self.note("GetSae", request)
        return sae_pb2.GetSaeResponse(revision="sae1", encoder_revision="enc1", d_in=4, d_sae=9000)

    async def EncodeFeatures(self, request: Any, context: Any) -> sae_pb2.EncodeFeaturesResponse:
        self.note("EncodeFeatures", request)
        indices, activations, scaled = self.fired
        features = tensor_pb2.SparseFeatures(indices=indices, activations=activations, scaled=scaled)
        error = to_tensor(np.full(4, 0.5, np.float32)) if request.include_error else None
        encoding = sae_pb2.FeatureEncoding(
            features=features, l0=9, explained_variance=0.5, cosine=0.25, norm=2.0, error=error
        )
        return sae_pb2.EncodeFeaturesResponse(
            results=[sae_pb2.EncodeFeaturesResult(encoding=encoding) for _ in request.inputs],
            execution=execution_pb2.Execution(model_revision="sae2"),
        )

    async def EditEmbeds(self, request: Any, context: Any) -> sae_pb2.EditEmbedsResponse:
        self.note("EditEmbeds", request)
        x = to_array(request.input.embeds, field="input.embeds").copy()
        for edit in request.edits:
            x[edit.feature.index % 4] += edit.value
        outcomes = [
            edits_pb2.EditOutcome(feature_index=edit.feature.index, operation=edit.operation) for edit in request.edits
        ]
        drifted = [edits_pb2.FeatureDrift(feature_index=index) for index in self.drifted]
        return sae_pb2.EditEmbedsResponse(
            embedding=tensor_pb2.Embedding(embedding_id=embeds_content_id("enc1", x), embeds=to_tensor(x)),
            report=edits_pb2.EditReport(outcomes=outcomes, drifted=drifted, measured=request.measure),
            execution=execution_pb2.Execution(model_revision="sae2"),
        )

    async def DiffFeatures(self, request: Any, context: Any) -> sae_pb2.DiffFeaturesResponse:
        self.note("DiffFeatures", request)
        edits = [
            edits_pb2.Edit(
                feature=edits_pb2.FeatureRef(index=index), operation=edits_pb2.EDIT_OPERATION_ADD, value=value
            )
            for index, value in self.diff
        ]
        shares = [value / 8 for _, value in self.diff]
        return sae_pb2.DiffFeaturesResponse(edits=edits, coverage=0.875, shares=shares)


class Generator(Upstream, generator_pb2_grpc.GeneratorServiceServicer):
    async def GetGenerator(self, request: Any, context: Any) -> generator_pb2.GetGeneratorResponse:
        self.note("GetGenerator", request)
        return generator_pb2.GetGeneratorResponse(revision="gen1")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.note("Generate", request)
        yield generator_pb2.GenerateResponse(queued=generator_pb2.Queued(position=2))
        for index, seed in enumerate(request.settings.seeds):
            image = generator_pb2.Image(index=index, seed=seed, data=b"drawn")
            yield generator_pb2.GenerateResponse(image=image)
        yield generator_pb2.GenerateResponse(finished=generator_pb2.Finished())


class Library(Upstream, library_pb2_grpc.LibraryServiceServicer):
    """Feature i is labelled "f<i>"; nobody sees the gated one."""

    async def GetLibrary(self, request: Any, context: Any) -> library_pb2.GetLibraryResponse:
        self.note("GetLibrary", request)
        return library_pb2.GetLibraryResponse(revision="lib1")

    async def BatchGetFeatures(self, request: Any, context: Any) -> library_pb2.BatchGetFeaturesResponse:
        self.note("BatchGetFeatures", request)
        assert 1 <= len(request.features) <= 1000
        features, matches, missing = [], [], []
        for at, reference in enumerate(request.features):
            index = int(reference.label[1:]) if reference.label else reference.index
            if index == GATED:
                missing.append(at)
                if not request.allow_missing:
                    raise UnknownFeature("no such feature", ["f8"]).at(f"features[{at}].label")
            else:
                features.append(library_pb2.Feature(index=index, label=f"f{index}", firing_share=index / 8))
                matches.append(edits_pb2.FeatureMatch(note=f"f{index} is meant" if reference.label else ""))
        return library_pb2.BatchGetFeaturesResponse(features=features, matches=matches, missing=missing)


@pytest.fixture
async def house() -> SimpleNamespace:
    """Four fakes, the studio over them, and a call."""
    fakes = SimpleNamespace(encoder=Encoder(), sae=Sae(), generator=Generator(), library=Library())
    add = {
        "encoder": encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
        "sae": sae_pb2_grpc.add_SaeServiceServicer_to_server,
        "generator": generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
        "library": library_pb2_grpc.add_LibraryServiceServicer_to_server,
    }

    def port(name: str) -> Local:
        return Local(name, lambda server: add[name](getattr(fakes, name), server))

    fakes.cache = Cache(1 << 20, Metrics())
    fakes.studio = Studio(fakes.cache)
    fakes.call = Call(Ports(*(port(name) for name in add)))
    return fakes


def inline(*values: float) -> studio_pb2.ImageInput:
    return studio_pb2.ImageInput(embeds=to_tensor(np.array(values, np.float32)))


def by_id(embedding: tensor_pb2.Embedding) -> studio_pb2.ImageInput:
    return studio_pb2.ImageInput(embedding_id=embedding.embedding_id)


def edit(feature: int | str, value: float = 1.0, operation: int = SET) -> edits_pb2.Edit:
    reference = edits_pb2.FeatureRef(label=feature) if isinstance(feature, str) else edits_pb2.FeatureRef(index=feature)
    return edits_pb2.Edit(feature=reference, operation=operation, value=value)


async def edited(house: SimpleNamespace, **fields: Any) -> list[studio_pb2.EditImageResponse]:
    request = EDIT(**({"input": inline(1, 2, 3, 4), "report_only": True} | fields))
    return [event async for event in house.studio.edit_image(request, house.call)]


async def failure_of(work: Any) -> FaceteerError:
    with pytest.raises(FaceteerError) as caught:
        await work
    return caught.value


# -- opening -------------------------------------------------------------------------------------


async def test_an_opened_picture_says_everything_that_its_features_and_services_say(house: SimpleNamespace) -> None:
    request = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"abc"), max_features=6)
    answer = await house.studio.open_image(request, house.call)
    shown = [(one.index, one.label, one.activation, one.scaled, one.firing_share) for one in answer.features]
    assert shown == [(3, "f3", 1.0, 0.5, 3 / 8), (5, "f5", 2.0, 0.25, 5 / 8)]
    assert (answer.l0, answer.explained_variance, answer.cosine, answer.norm) == (9, 0.5, 0.25, 2.0)
    # Encoder and SAE as they really ran, the others as the studio knows them.
    assert answer.revisions == execution_pb2.Revisions(encoder="enc2", sae="sae2", generator="gen1", library="lib1")
    assert (answer.encoder_execution.model_revision, answer.sae_execution.model_revision) == ("enc2", "sae2")
    (asked,) = house.sae.asked("EncodeFeatures")
    assert (asked.max_features, asked.include_error) == (6, False)
    assert asked.inputs[0].embeds == answer.embedding.embeds
    again = await house.studio.open_image(studio_pb2.OpenImageRequest(input=by_id(answer.embedding)), house.call)
    assert again.embedding == answer.embedding
    assert again.encoder_execution.cached
    assert again.revisions.encoder == "enc1"
    assert len(house.encoder.asked("EncodeImages")) == 1


async def test_an_embedding_that_came_inline_is_named_by_its_values_and_kept(house: SimpleNamespace) -> None:
    half = to_tensor(np.array([1, 2, 3, 4], np.float32), tensor_pb2.ELEMENT_TYPE_FLOAT16)
    opened = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(embeds=half))
    answer = await house.studio.open_image(opened, house.call)
    assert answer.embedding.embedding_id == embeds_content_id("enc1", np.array([1, 2, 3, 4], np.float32))
    assert answer.embedding.embeds == half
    again = await house.studio.open_image(studio_pb2.OpenImageRequest(input=by_id(answer.embedding)), house.call)
    assert to_array(again.embedding.embeds, field="x").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("scaled", [True, False])
async def test_all_of_many_features_are_named_but_for_the_gated_one(house: SimpleNamespace, scaled: bool) -> None:
    # More than two batches of the library, in no order.
    indices = [(n * 7) % 2311 for n in range(2311)]
    house.sae.fired = (indices, [float(n) for n in indices], [n / 2 for n in indices] if scaled else [])
    answer = await house.studio.open_image(studio_pb2.OpenImageRequest(input=inline(1, 2, 3, 4)), house.call)
    wanted = [index for index in indices if index != GATED]
    assert [feature.index for feature in answer.features] == wanted
    assert [feature.label for feature in answer.features] == [f"f{index}" for index in wanted]
    assert [feature.activation for feature in answer.features] == wanted
    assert [feature.scaled for feature in answer.features] == [index / 2 if scaled else 0.0 for index in wanted]


async def test_faults_of_an_input_are_told_at_the_callers_field(house: SimpleNamespace) -> None:
    def opened(given: studio_pb2.ImageInput | None) -> Any:
        return house.studio.open_image(studio_pb2.OpenImageRequest(input=given), house.call)

    assert (await failure_of(opened(None))).field == "input"
    assert (await failure_of(opened(inline(1, 2, 3)))).field == "input.embeds.shape"
    assert (await failure_of(opened(inline(1, 2, 3, np.inf)))).field == "input.embeds.data"
    bad = await failure_of(opened(studio_pb2.ImageInput(image=b"bad")))
    assert (bad.field, bad.message, bad.description) == ("input.image", "input.image: no picture", "no picture")
    house.sae.failures["EncodeFeatures"] = InvalidField("inputs[0].embeds.data", "holds values beyond 1e6")
    failure = await failure_of(opened(inline(1, 2, 3, 4)))
    assert failure.message == "input.embeds.data: holds values beyond 1e6"
    house.encoder.failures["EncodeImages"] = InvalidField("images", "too many")
    assert (await failure_of(opened(studio_pb2.ImageInput(image=b"x")))).field == "input.image"


async def test_an_id_that_is_not_cached_has_expired_and_a_long_one_is_cut(house: SimpleNamespace) -> None:
    for given, told in (("x" * 129, "x" * 129), ("x" * 130, "x" * 128 + "…")):
        with pytest.raises(EmbeddingExpired) as caught:
            await house.studio.look_up(given)
        assert caught.value.metadata == {"embedding_id": told}
    # What lies under an id but is no vector is as good as nothing.
    embedding_id = embeds_content_id("enc1", np.ones(4, np.float32))
    for record in ({"embeds": np.ones((1, 4), np.float32)}, {"embeds": b"bytes"}, {"other": np.ones(4, np.float32)}):
        house.cache.put(embeds_key(embedding_id), record)
        with pytest.raises(EmbeddingExpired):
            await house.studio.look_up(embedding_id)


# -- what runs -----------------------------------------------------------------------------------


async def test_what_runs_is_asked_again_when_it_is_a_few_seconds_old(house: SimpleNamespace) -> None:
    sae = house.studio.upstreams.sae
    assert (await sae.get(house.call)).revision == "sae1"
    sae._asked -= 4.5
    await sae.get(house.call)
    assert len(house.sae.asked("GetSae")) == 1
    sae._asked -= 1.0
    await sae.get(house.call)
    await sae.get(house.call)
    assert len(house.sae.asked("GetSae")) == 2
    about = await house.studio.describe(house.call)
    assert (about.bundle, about.revisions.library) == ("fake", "lib1")
    assert about.version


async def test_callers_who_ask_at_once_cause_one_round_of_asking(house: SimpleNamespace) -> None:
    await asyncio.gather(*(house.studio.describe(house.call) for _ in range(20)))
    for service, method in PARTS.items():
        assert len(getattr(house, service).asked(method)) == 1


@pytest.mark.parametrize("dead", ["encoder", "sae", "generator", "library"])
async def test_each_part_that_is_down_is_named_and_the_others_are_described(house: SimpleNamespace, dead: str) -> None:
    getattr(house, dead).failures[PARTS[dead]] = UpstreamUnavailable(dead, "cannot be reached")
    about = await house.studio.describe(house.call)
    states = {part.name: (part.state, part.reason) for part in about.parts}
    down = (studio_pb2.PART_STATE_DOWN, f"{dead}: cannot be reached")
    assert states == {name: down if name == dead else (studio_pb2.PART_STATE_UP, "") for name in PARTS}
    assert {name for name in PARTS if getattr(about.revisions, name)} == set(PARTS) - {dead}
    assert about.bundle == ("fake" if dead != "encoder" else "")


async def test_with_the_generator_down_since_the_start_pictures_open_and_edits_report(house: SimpleNamespace) -> None:
    gone = UpstreamUnavailable("generator", "cannot be reached")
    house.generator.failures |= {"GetGenerator": gone, "Generate": gone}
    opened = await house.studio.open_image(
        studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"abc")), house.call
    )
    assert (opened.revisions.sae, opened.revisions.generator) == ("sae2", "")
    wanted = execution_pb2.Revisions(sae="sae1", generator="gen1")
    assert await edited(house, expected_revisions=wanted, report_only=True)
    # What would be drawn with cannot be checked, so nothing is drawn.
    with pytest.raises(UpstreamUnavailable, match="generator"):
        await edited(house, expected_revisions=wanted, report_only=False)


async def test_a_part_that_has_gone_is_still_known_and_found_again(house: SimpleNamespace) -> None:
    generator = house.studio.upstreams.generator
    await house.studio.describe(house.call)
    house.generator.failures["GetGenerator"] = UpstreamUnavailable("generator", "cannot be reached")
    generator._asked -= 6
    assert (
        await house.studio.open_image(
            studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"abc")), house.call
        )
    ).revisions.generator == "gen1"
    assert generator.error is not None
    del house.generator.failures["GetGenerator"]
    generator._asked -= 2
    about = await house.studio.describe(house.call)
    assert [part.state for part in about.parts] == [studio_pb2.PART_STATE_UP] * 4


async def test_a_part_that_hangs_is_waited_for_once_and_then_asked_in_the_background(
    house: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faceteer_studio.upstreams.ASK_S", 0.2)
    generator, asked = house.studio.upstreams.generator, 0

    async def hang(call: Call) -> Any:
        nonlocal asked
        asked += 1
        try:
            async with asyncio.timeout_at(call.deadline):
                await asyncio.sleep(60)
        except TimeoutError:
            raise DeadlineExceeded("generator") from None

    monkeypatch.setattr(generator, "_ask", hang)
    started = time.monotonic()
    await asyncio.gather(
        *(
            house.studio.open_image(studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=b"abc")), house.call)
            for _ in range(5)
        )
    )
    assert (asked, time.monotonic() - started > 0.15) == (1, True)
    generator._asked -= 2
    started = time.monotonic()
    await house.studio.open_image(OPEN, house.call)
    assert time.monotonic() - started < 0.15
    about = await house.studio.describe(house.call)
    assert asked == 2
    assert [part.reason for part in about.parts if part.reason] == ["generator: does not answer within 0.2 s"]


@pytest.mark.parametrize(("part", "actual"), [("encoder", "enc1"), ("sae", "sae1"), ("generator", "gen1")])
async def test_an_edit_made_for_another_model_is_refused_before_any_work(
    house: SimpleNamespace, part: str, actual: str
) -> None:
    assert await edited(house, expected_revisions=execution_pb2.Revisions(**{part: actual}))
    house.sae.calls.clear()
    with pytest.raises(RevisionMismatch) as caught:
        await edited(house, expected_revisions=execution_pb2.Revisions(**{part: "other"}))
    assert caught.value.metadata == {"part": part, "expected": "other", "actual": actual}
    assert not house.sae.calls
    # A library is no condition: a recipe does not depend on it.
    assert await edited(house, expected_revisions=execution_pb2.Revisions(library="other"))


# -- editing -------------------------------------------------------------------------------------


async def test_an_edit_is_kept_under_its_id_and_told_with_what_ran(house: SimpleNamespace) -> None:
    (event,) = await edited(house, edits=[edit(1, 5.0)])
    answer = event.edited
    assert to_array(answer.embedding.embeds, field="x").tolist() == [1, 7, 3, 4]
    assert answer.revisions == execution_pb2.Revisions(encoder="enc1", sae="sae2", generator="gen1", library="lib1")
    assert answer.sae_execution.model_revision == "sae2"
    # Later calls know it, whatever becomes of the SAE service's own cache.
    assert (await house.studio.look_up(answer.embedding.embedding_id)).embeds == answer.embedding.embeds
    assert (await edited(house, input=studio_pb2.ImageInput(image=b"abc")))[0].edited.revisions.encoder == "enc2"


@pytest.mark.parametrize("skip", [False, True])
async def test_an_edit_is_measured_unless_that_is_skipped(house: SimpleNamespace, skip: bool) -> None:
    (event,) = await edited(house, edits=[edit(1)], skip_measuring=skip)
    assert event.edited.report.measured is not skip


async def test_labels_among_indices_are_resolved_in_batches(house: SimpleNamespace) -> None:
    edits = [edit(n, value=n) if n % 3 == 0 else edit(f"f{n}", value=n) for n in range(8, 3500)]
    request = EDIT(input=inline(1, 2, 3, 4), edits=edits, report_only=True)
    (event,) = [event async for event in house.studio.edit_image(request, house.call)]
    assert [one.feature.index for one in event.edited.edits] == list(range(8, 3500))
    assert [one.value for one in event.edited.edits] == list(range(8, 3500))
    assert [outcome.label for outcome in event.edited.report.outcomes] == [f"f{n}" for n in range(8, 3500)]
    resolving = [asked for asked in house.library.asked("BatchGetFeatures") if asked.features[0].label]
    assert [len(asked.features) for asked in resolving] == [1000, 1000, 328]
    assert list(request.edits) == edits, "the request itself is left alone"


@pytest.mark.parametrize("at", [1, 11, 1600])
async def test_the_edit_with_an_unknown_label_is_named_with_what_is_near(house: SimpleNamespace, at: int) -> None:
    edits = [edit(100 + n) if n % 5 == 0 else edit(f"f{100 + n}") for n in range(2000)]
    edits[at] = edit(f"f{GATED}")
    failure = await failure_of(edited(house, edits=edits))
    assert (failure.reason, failure.field) == ("UNKNOWN_FEATURE", f"edits[{at}].feature.label")
    assert failure.metadata == {"nearest": "f8"}
    assert not house.sae.asked("EditEmbeds")


async def test_a_gated_feature_is_turned_off_by_anyone_and_drifts_without_a_name(house: SimpleNamespace) -> None:
    house.sae.drifted = (GATED, 3)
    (event,) = await edited(house, edits=[edit(2), edit(GATED, 0.0, ABLATE)])
    report = event.edited.report
    assert [outcome.label for outcome in report.outcomes] == ["f2", ""]
    assert [drift.label for drift in report.drifted] == ["", "f3"]
    failure = await failure_of(edited(house, edits=[edit(2), edit(3), edit(GATED)]))
    assert (failure.reason, failure.field) == ("UNKNOWN_FEATURE", "edits[2].feature.index")


async def test_what_the_sae_refuses_is_told_at_the_callers_field(house: SimpleNamespace) -> None:
    house.sae.failures["EditEmbeds"] = InvalidField("input.embeds.data", "too large")
    assert (await failure_of(edited(house))).field == "input.embeds.data"
    house.sae.failures["EditEmbeds"] = InvalidField("edits[1].value", "must be finite")
    assert (await failure_of(edited(house))).field == "edits[1].value"


async def test_the_edited_embedding_is_drawn_as_the_request_says(house: SimpleNamespace) -> None:
    settings = generator_pb2.GenerationSettings(steps=7, seeds=[3, 4])
    events = await edited(house, edits=[edit(1, 5.0)], report_only=False, settings=settings, preview_every=3)
    assert [event.WhichOneof("event") for event in events] == ["edited", "queued", "image", "image", "finished"]
    assert events[1].queued.position == 2
    (drawing,) = house.generator.asked("Generate")
    assert (drawing.settings, drawing.preview_every) == (settings, 3)
    assert drawing.input.embeds == events[0].edited.embedding.embeds
    assert not drawing.HasField("start")
    await edited(house)
    assert len(house.generator.asked("Generate")) == 1, "a report draws nothing"


# -- keeping a layout ----------------------------------------------------------------------------

IMAGE, INVERSION = studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, studio_pb2.LAYOUT_METHOD_INVERSION


def layout(keep: dict[str, Any], scheduler: int = 0, given: studio_pb2.ImageInput | None = None) -> Layout:
    return Layout.of(
        EDIT(
            input=given or studio_pb2.ImageInput(image=b"photo"),
            keep_layout=studio_pb2.KeepLayout(**keep),
            settings=generator_pb2.GenerationSettings(scheduler=scheduler),  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize(
    ("keep", "scheduler", "field"),
    [
        ({}, 0, "keep_layout.method"),
        ({"method": 9}, 0, "keep_layout.method"),
        ({"method": IMAGE, "strength": 0.0}, 0, "keep_layout.strength"),
        ({"method": IMAGE, "strength": 1.01}, 0, "keep_layout.strength"),
        ({"method": IMAGE, "strength": float("nan")}, 0, "keep_layout.strength"),
        ({"method": INVERSION, "strength": 0.5}, 0, "keep_layout.strength"),
        ({"method": INVERSION}, generator_pb2.SCHEDULER_LCM, "settings.scheduler"),
    ],
)
def test_a_layout_that_cannot_be_kept_is_refused_at_its_field(keep: dict[str, Any], scheduler: int, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        layout(keep, scheduler)
    assert caught.value.field == field


def test_a_layout_comes_from_its_own_photo_or_from_the_input() -> None:
    own = layout({"method": IMAGE, "image": b"own", "strength": 1.0}, generator_pb2.SCHEDULER_LCM)
    assert own == Layout(b"own", "keep_layout.image", False, 1.0)
    assert layout({"method": INVERSION}, generator_pb2.SCHEDULER_DDIM) == Layout(b"photo", "input.image", True, None)
    with pytest.raises(InvalidField, match=r"keep_layout\.image: is missing"):
        layout({"method": IMAGE}, given=inline(1, 2, 3, 4))


def test_the_generators_fields_of_a_layout_are_told_as_the_requests() -> None:
    assert layout({"method": IMAGE, "image": b"own"}).fields == {
        "image": "keep_layout.image",
        "start.image": "keep_layout.image",
        "start.strength": "keep_layout.strength",
        "start": "keep_layout",
    }


async def test_each_finished_picture_goes_back_through_encoder_and_sae_when_it_is_to_be_measured(
    house: SimpleNamespace,
) -> None:
    drawing = {
        "edits": [edit(5), edit(6)],
        "settings": generator_pb2.GenerationSettings(seeds=[40, 41]),
        "report_only": False,
    }
    events = await edited(house, **drawing, measure_picture=True)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["edited", "queued", "image", "measured", "image", "measured", "finished"]
    assert [request.images[0] for request in house.encoder.asked("EncodeImages")] == [b"drawn", b"drawn"]
    last = events[-2].measured
    assert (last.index, last.seed) == (1, 41)
    # Feature 5 fires on whatever is encoded, 6 on nothing.
    shown = [(one.feature_index, one.activation, one.scaled) for one in last.outcomes]
    assert shown == [(5, 2.0, 0.25), (6, 0.0, 0.0)]
    assert "measured" not in [event.WhichOneof("event") for event in await edited(house, **drawing)]


# -- transfer ------------------------------------------------------------------------------------


def transfer(house: SimpleNamespace, **fields: Any) -> Any:
    request = studio_pb2.TransferFeaturesRequest(
        **({"target": inline(1, 1, 1, 1), "source": inline(1, 4, 1, 5)} | fields)
    )
    return house.studio.transfer_features(request, house.call)


async def test_a_transfer_carries_over_only_what_the_caller_may_set_and_says_how_much_that_is(
    house: SimpleNamespace,
) -> None:
    answer = await transfer(house, coverage=0.5, max_edits=9)
    (difference,) = house.sae.asked("DiffFeatures")
    assert (difference.coverage, difference.max_edits) == (0.5, 9)
    assert to_array(difference.source.embeds, field="x").tolist() == [1, 1, 1, 1]
    assert to_array(difference.target.embeds, field="x").tolist() == [1, 4, 1, 5]
    assert [one.feature.index for one in answer.edits] == [1]
    # The difference is (0, 3, 0, 4); of it (0, 3, 0, 0) is carried: 1 - 16 / 25.
    assert answer.coverage == pytest.approx(0.36)
    assert to_array(answer.embedding.embeds, field="x").tolist() == [1, 4, 1, 1]
    assert [outcome.label for outcome in answer.report.outcomes] == ["f1"]
    assert answer.report.measured
    assert answer.revisions == execution_pb2.Revisions(encoder="enc1", sae="sae2", generator="gen1", library="lib1")
    # Both embeddings are known by their ids from now on.
    assert answer.target.embedding_id == embeds_content_id("enc1", np.ones(4, np.float32))
    for embedding in (answer.target, answer.embedding):
        assert (await house.studio.look_up(embedding.embedding_id)).embeds == embedding.embeds
    # One edit to apply, one to see how much the rest carries; none that edits nothing.
    assert all(asked.edits for asked in house.sae.asked("EditEmbeds"))


async def test_a_transfer_of_open_features_has_the_coverage_of_the_difference(house: SimpleNamespace) -> None:
    house.sae.diff = ((1, 3.0), (3, 4.0))
    answer = await transfer(house)
    assert answer.coverage == 0.875
    assert [one.feature.index for one in answer.edits] == [1, 3]
    assert not house.sae.asked("EncodeFeatures")
    assert len(house.sae.asked("EditEmbeds")) == 1


async def test_a_transfer_lists_its_parts_and_carries_those_that_are_wanted(house: SimpleNamespace) -> None:
    house.sae.diff = ((1, 3.0), (GATED, 1.0), (3, 4.0))
    answer = await transfer(house)
    assert house.sae.asked("DiffFeatures")[-1].for_another
    parts = [(part.feature_index, part.label, part.share, part.taken) for part in answer.parts]
    assert parts == [(1, "f1", 0.375, True), (3, "f3", 0.5, True)]
    ref = edits_pb2.FeatureRef
    for fields in ({"only": [ref(label="F1")]}, {"without": [ref(index=3)]}, {"only": [ref(index=1), ref(index=3)],
                   "without": [ref(label="f3")]}):  # fmt: skip
        answer = await transfer(house, **fields)
        assert [one.feature.index for one in answer.edits] == [1]
        assert [part.taken for part in answer.parts] == [True, False]
        # (0, 3, 0, 0) of (0, 3, 0, 4).
        assert answer.coverage == pytest.approx(0.36)
    failure = await failure_of(transfer(house, only=[ref(index=1), ref(label="f5")]))
    assert failure.message == "only[1]: is no part of the difference; its parts are f1, f3"
    failure = await failure_of(transfer(house, without=[ref(label="f7")]))
    assert failure.field == "without[0].label"


async def test_a_transfer_from_a_reference_starts_there_and_edits_the_target(house: SimpleNamespace) -> None:
    answer = await transfer(house, reference=inline(1, 2, 1, 1))
    (difference,) = house.sae.asked("DiffFeatures")
    assert to_array(difference.source.embeds, field="x").tolist() == [1, 2, 1, 1]
    # (0, 2, 0, 4) is to be carried, (0, 3, 0, 0) is: 1 - (1 + 16) / 20.
    assert answer.coverage == pytest.approx(0.15)
    assert to_array(answer.embedding.embeds, field="x").tolist() == [1, 4, 1, 1]


async def test_without_any_difference_everything_is_carried_and_a_wrong_edit_carries_nothing(
    house: SimpleNamespace,
) -> None:
    assert (await transfer(house, source=inline(1, 1, 1, 1))).coverage == 1.0
    assert (await transfer(house, source=inline(1, 1, 1, 1.5))).coverage == 0.0


@pytest.mark.parametrize(
    ("theirs", "reference", "ours"),
    [
        ("source.embeds.data", False, "target.embeds.data"),
        ("source.embeds.data", True, "reference.embeds.data"),
        ("target.embeds.data", False, "source.embeds.data"),
        ("target.embeds.data", True, "source.embeds.data"),
        ("coverage", False, "coverage"),
    ],
)
async def test_a_refused_difference_is_told_at_the_callers_field(
    house: SimpleNamespace, theirs: str, reference: bool, ours: str
) -> None:
    house.sae.failures["DiffFeatures"] = InvalidField(theirs, "wrong")
    fields = {"reference": inline(1, 2, 3, 4)} if reference else {}
    failure = await failure_of(transfer(house, **fields))
    assert (failure.field, failure.message) == (ours, f"{ours}: wrong")


async def test_faults_of_a_transfers_pictures_are_told_at_the_callers_field(house: SimpleNamespace) -> None:
    for field in ("target", "source", "reference"):
        failure = await failure_of(transfer(house, **{field: studio_pb2.ImageInput(image=b"bad")}))
        assert failure.field == f"{field}.image"
    house.sae.failures["EditEmbeds"] = InvalidField("input.embeds.data", "too large")
    house.sae.diff = ((1, 3.0),)
    assert (await failure_of(transfer(house))).field == "target.embeds.data"


# -- the way through -----------------------------------------------------------------------------


async def test_a_call_goes_through_three_files_of_the_studio_and_what_it_knows_of_the_others(
    house: SimpleNamespace,
) -> None:
    servicer = StudioServicer(house.studio, house.call.ports)
    context = SimpleNamespace(time_remaining=lambda: None)
    photo = studio_pb2.ImageInput(image=b"abc")
    for name, work in (
        ("OpenImage", lambda: servicer.OpenImage(studio_pb2.OpenImageRequest(input=photo), context)),
        ("EditImage", lambda: anext(servicer.EditImage(EDIT(input=photo, edits=[edit("f9")]), context))),
        ("TransferFeatures", lambda: transfer(house, target=photo)),
    ):
        with files_entered(name if name != "TransferFeatures" else "transfer_features") as entered:
            await work()
        ours = {file for file in entered if file.startswith("faceteer_studio/")}
        expected = {f"faceteer_studio/{name}.py" for name in ("servicer", "application", "ports", "upstreams", "names")}
        assert ours <= expected, name

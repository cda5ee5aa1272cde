"""LibraryService through a real server and stub: every call, every refusal, people's labels under load."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from faceteer.v1 import edits_pb2, library_pb2, library_pb2_grpc, tensor_pb2
from faceteer_library.editor import LibraryEditor
from faceteer_library.schema import PERSON_LABELS
from faceteer_library.service import build
from faceteer_library.settings import LibrarySettings
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.bundle import Bundle, BundleError, seal, verify
from faceteer_runtime.icons import pack_template
from faceteer_runtime.server import start
from faceteer_runtime.tensors import to_array
from rpc_errors import Failure, read_error

Serve = Callable[..., Awaitable[library_pb2_grpc.LibraryServiceStub]]
LABELS = ("night", "snow", "night sky", "two boats", "Night", "", "Ночь", "café")


@pytest.fixture
def library_bundle(tmp_path: Path) -> Path:
    """A library alone in a bundle; feature 5 is dead and without a label."""
    directory = tmp_path / "bundle"
    (directory / "library").mkdir(parents=True)
    path = directory / "library" / "library.sqlite"
    with LibraryWriter(path, sae_revision="sae1", corpus="none", n_pictures=100) as writer:
        for index, label in enumerate(LABELS):
            edges, counts = np.array([1, 2], np.float32), np.array([5, 6])
            share = 0.0 if index == 5 else (index + 1) / 100
            writer.feature(FeatureRow(index, label, share, 1.0, 1.5, 2.0, 3.0, edges, counts, detection_score=0.9))
        writer.examples(0, [ExampleRow(f"picture-{n}", 3.0 - n, b"webp", "a boat") for n in range(3)])
        writer.relatives(0, "nearest", [(2, 0.75), (4, 0.5)])
        writer.relatives(0, "rivals", [(1, 0.25)])
        writer.relatives(0, "coactivating", [(3, 4.0)])
        writer.icon(1, b"webp icon", [0.0, 0.5])
    seal(directory, {"name": "tiny", "description": "", "parts": {"library": {"kind": "sqlite"}}, "licences": {}})
    return directory


@pytest.fixture
async def serve(library_bundle: Path) -> AsyncIterator[Serve]:
    """Starts servers with given settings; stops them all."""
    async with AsyncExitStack() as stack:

        async def started(**settings: Any) -> library_pb2_grpc.LibraryServiceStub:
            server = await start(LibrarySettings(listen="127.0.0.1:0", bundle=library_bundle, **settings), build)
            stack.push_async_callback(server.stop, 0.0)
            channel = grpc.aio.insecure_channel(server.address)
            stack.push_async_callback(channel.close)
            return library_pb2_grpc.LibraryServiceStub(channel)

        yield started


def at(index: int) -> edits_pb2.FeatureRef:
    return edits_pb2.FeatureRef(index=index)


def named(label: str) -> edits_pb2.FeatureRef:
    return edits_pb2.FeatureRef(label=label)


async def failure_of(call: Awaitable[Any]) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_error(caught.value)


async def test_a_feature_comes_whole_and_says_what_ran(serve: Serve, library_bundle: Path) -> None:
    answer = await (await serve()).GetFeature(library_pb2.GetFeatureRequest(feature=at(0)))
    assert (answer.feature.label, answer.feature.alive, answer.feature.mean_activation) == ("night", True, 1.0)
    assert answer.feature.label_source == library_pb2.LABEL_SOURCE_AUTOMATIC
    assert not answer.feature.HasField("causal_score")
    assert (list(answer.detail.histogram_edges), list(answer.detail.histogram_counts)) == ([1, 2], [5, 6])
    related = [(one.index, one.label, one.score) for one in answer.detail.nearest]
    assert related == [(2, "night sky", 0.75), (4, "Night", 0.5)]
    assert [one.index for one in answer.detail.rivals] == [1]
    assert [one.index for one in answer.detail.coactivating] == [3]
    assert answer.execution.model_revision == Bundle.open(library_bundle).part("library").revision


async def test_labels_outside_ascii_match_without_regard_to_case(serve: Serve) -> None:
    stub = await serve()
    for label, index in (("ночь", 6), ("НОЧЬ", 6), ("CAFÉ", 7), ("cafe\u0301", 7)):
        assert (await stub.GetFeature(library_pb2.GetFeatureRequest(feature=named(label)))).feature.index == index


async def test_many_features_are_aligned_with_the_request(serve: Serve) -> None:
    stub = await serve()
    request = library_pb2.BatchGetFeaturesRequest(features=[at(3), named("snow"), at(3)])
    assert [feature.index for feature in (await stub.BatchGetFeatures(request)).features] == [3, 1, 3]
    empty = await failure_of(stub.BatchGetFeatures(library_pb2.BatchGetFeaturesRequest()))
    assert (empty.reason, empty.fields) == ("INVALID_FIELD", ["features"])
    most = library_pb2.BatchGetFeaturesRequest(features=[at(0)] * 1000)
    assert len((await stub.BatchGetFeatures(most)).features) == 1000
    most.features.append(at(0))
    assert (await failure_of(stub.BatchGetFeatures(most))).reason == "BATCH_TOO_LARGE"


async def test_unknown_features_are_not_found_with_the_nearest_labels(serve: Serve) -> None:
    stub = await serve()
    failure = await failure_of(stub.GetFeature(library_pb2.GetFeatureRequest(feature=named("nigth sky"))))
    assert (failure.code, failure.reason) == ("NOT_FOUND", "UNKNOWN_FEATURE")
    assert failure.metadata["nearest"].split(", ")[0] == "night sky"
    failure = await failure_of(stub.GetFeature(library_pb2.GetFeatureRequest(feature=at(8))))
    assert failure.reason == "UNKNOWN_FEATURE"
    for reference in (None, named(""), named("  ")):
        failure = await failure_of(stub.GetFeature(library_pb2.GetFeatureRequest(feature=reference)))
        assert (failure.reason, failure.fields) == ("INVALID_FIELD", ["feature"])


async def test_lists_are_filtered_and_ordered_and_cut_into_pages(serve: Serve) -> None:
    stub = await serve()
    request = library_pb2.ListFeaturesRequest(
        filter=library_pb2.FeatureFilter(alive=True, min_firing_share=0.015),
        order=library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC,
        page_size=4,
    )
    seen = []
    while True:
        answer = await stub.ListFeatures(request)
        assert answer.total_size == 6
        seen += [feature.index for feature in answer.features]
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [7, 6, 4, 3, 2, 1]
    unlabelled = library_pb2.ListFeaturesRequest(filter=library_pb2.FeatureFilter(labelled=False))
    assert [feature.index for feature in (await stub.ListFeatures(unlabelled)).features] == [5]
    person = library_pb2.FeatureFilter(label_sources=[library_pb2.LABEL_SOURCE_PERSON])
    assert (await stub.ListFeatures(library_pb2.ListFeaturesRequest(filter=person))).total_size == 0


async def test_a_search_goes_by_words_or_likeness_and_refuses_the_rest(serve: Serve) -> None:
    stub = await serve()
    hits = (await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(words="night"))).hits
    assert {hit.feature.index for hit in hits[:2]} == {0, 4}
    assert [hit.feature.index for hit in hits[2:]] == [2]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    like = await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(similar_to=named("night sky")))
    assert (list(like.hits), like.total_size) == ([], 0)
    like = await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(similar_to=at(0)))
    assert [(hit.feature.index, hit.score) for hit in like.hits] == [(2, 0.75), (4, 0.5)]
    fires = tensor_pb2.SparseFeatures(indices=[3, 1], activations=[1.0, 4.0])
    hits = (await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(activations=fires))).hits
    assert [(hit.feature.index, hit.score) for hit in hits] == [(1, 2.0), (3, 0.5)]
    picture = library_pb2.SearchFeaturesRequest(picture=tensor_pb2.EmbedsInput(embedding_id="x"))
    assert (await failure_of(stub.SearchFeatures(picture))).reason == "NOT_IN_BUNDLE"
    nothing = await failure_of(stub.SearchFeatures(library_pb2.SearchFeaturesRequest()))
    assert (nothing.reason, nothing.fields) == ("INVALID_FIELD", ["query"])
    for words in (
        '"',
        "night OR",
        "NEAR(",
        "label:night",
        "*",
        "a-b",
        "()",
        "\0",
        "night\0sky",
        "^n",
        "'; DROP TABLE x",
    ):
        await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(words=words))


async def test_page_tokens_that_are_not_ours_are_refused(serve: Serve) -> None:
    stub = await serve()
    token = (await stub.ListFeatures(library_pb2.ListFeaturesRequest(page_size=2))).next_page_token
    for wrong in ("gibberish", "é", "====", token[:-4], "MTAwLjA="):
        request = library_pb2.ListFeaturesRequest(page_size=2, page_token=wrong)
        assert (await failure_of(stub.ListFeatures(request))).fields == ["page_token"]
    search = library_pb2.SearchFeaturesRequest(words="night", page_token=token)
    assert (await failure_of(stub.SearchFeatures(search))).fields == ["page_token"]


async def test_examples_come_strongest_first_and_icons_only_where_made(serve: Serve) -> None:
    stub = await serve()
    request = library_pb2.ListFeatureExamplesRequest(feature=at(0), page_size=2)
    first = await stub.ListFeatureExamples(request)
    assert [(one.picture, one.activation) for one in first.examples] == [("picture-0", 3.0), ("picture-1", 2.0)]
    assert (first.total_size, first.examples[0].thumbnail, first.examples[0].caption) == (3, b"webp", "a boat")
    request.page_token = first.next_page_token
    last = await stub.ListFeatureExamples(request)
    assert ([one.picture for one in last.examples], last.next_page_token) == (["picture-2"], "")
    icon = await stub.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(1)))
    assert (icon.icon, list(icon.strengths)) == (b"webp icon", [0.0, 0.5])
    failure = await failure_of(stub.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(0))))
    assert (failure.code, failure.reason) == ("NOT_FOUND", "ICON_NOT_MADE")


async def test_a_persons_label_lives_outside_the_sealed_parts_and_outlives_the_server(
    serve: Serve, library_bundle: Path
) -> None:
    stub = await serve()
    labels = library_bundle / "labels.sqlite"
    assert not labels.exists(), "made at the first label, not at the start"
    request = library_pb2.SetFeatureLabelRequest(feature=at(5), label="lighthouse", author="ada")
    answer = await stub.SetFeatureLabel(request)
    assert (answer.feature.label, answer.feature.label_source) == ("lighthouse", library_pb2.LABEL_SOURCE_PERSON)
    assert labels.exists()
    verify(library_bundle)
    again = await serve()
    for one in (stub, again):
        assert (await one.GetFeature(library_pb2.GetFeatureRequest(feature=named("Lighthouse")))).feature.index == 5
    for label in ("x" * 121, "two\nlines", "bell\a"):
        request = library_pb2.SetFeatureLabelRequest(feature=at(5), label=label)
        assert (await failure_of(stub.SetFeatureLabel(request))).fields == ["label"]


async def test_reading_goes_on_while_the_first_label_is_written(serve: Serve) -> None:
    stub = await serve()

    async def read() -> None:
        for _ in range(20):
            await stub.GetFeature(library_pb2.GetFeatureRequest(feature=at(0)))
            await stub.SearchFeatures(library_pb2.SearchFeaturesRequest(words="sn"))

    label = library_pb2.SetFeatureLabelRequest(feature=at(5), label="lighthouse")
    await asyncio.gather(*(read() for _ in range(8)), stub.SetFeatureLabel(label))


async def test_labels_that_cannot_be_kept_name_the_setting_that_helps(serve: Serve, tmp_path: Path) -> None:
    stub = await serve(library_labels_path=tmp_path / "nowhere" / "labels.sqlite")
    request = library_pb2.SetFeatureLabelRequest(feature=at(5), label="lighthouse")
    failure = await failure_of(stub.SetFeatureLabel(request))
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "NOT_IN_BUNDLE")
    assert "FACETEER_LIBRARY_LABELS_PATH" in failure.message
    assert (await stub.GetFeature(library_pb2.GetFeatureRequest(feature=at(5)))).feature.label == ""


async def test_an_empty_labels_file_is_filled_and_a_foreign_one_refused_by_name(serve: Serve, tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty.sqlite", tmp_path / "foreign.sqlite"
    empty.touch()
    foreign.write_bytes(b"no database, though long enough to be taken for one " * 50)
    stub = await serve(library_labels_path=empty)
    assert (await stub.GetFeature(library_pb2.GetFeatureRequest(feature=at(0)))).feature.label == "night"
    await stub.SetFeatureLabel(library_pb2.SetFeatureLabelRequest(feature=at(0), label="lighthouse"))
    assert (await stub.GetFeature(library_pb2.GetFeatureRequest(feature=at(0)))).feature.label == "lighthouse"
    with pytest.raises(BundleError, match=r"foreign\.sqlite"):
        await serve(library_labels_path=foreign)


async def test_a_labels_file_of_which_only_some_tables_are_made_yet_is_left_alone_until_it_is_whole(
    serve: Serve, tmp_path: Path
) -> None:
    # What a reader may meet while another call makes the file.
    with closing(sqlite3.connect(tmp_path / "half.sqlite")) as connection:
        connection.execute(PERSON_LABELS.split(";")[0])
    stub = await serve(library_labels_path=tmp_path / "half.sqlite")
    request = library_pb2.SearchFeaturesRequest(words="snow")
    assert [hit.feature.index for hit in (await stub.SearchFeatures(request)).hits] == [1]
    await stub.SetFeatureLabel(library_pb2.SetFeatureLabelRequest(feature=at(1), label="lighthouse"))
    assert not (await stub.SearchFeatures(request)).hits


async def test_the_operators_settings_say_who_sees_what(
    serve: Serve, library_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with LibraryEditor(library_bundle / "library" / "library.sqlite") as editor:
        editor.safety_class(0, "violence")
        editor.safety_class(1, "nudity")
    seal(library_bundle)
    ask = library_pb2.ListFeaturesRequest(page_size=1000)

    async def seen(stub: library_pb2_grpc.LibraryServiceStub, key: str, *classes: str) -> set[int]:
        request = library_pb2.ListFeaturesRequest(page_size=1000)
        request.filter.include_safety_classes.extend(classes)
        metadata = (("x-faceteer-access", key),) if key else ()
        return {feature.index for feature in (await stub.ListFeatures(request, metadata=metadata)).features}

    caplog.set_level("DEBUG")
    everything = set(range(len(LABELS)))
    stub = await serve()
    assert await seen(stub, "") == everything - {0, 1}
    denied = await failure_of(seen(stub, "anything", "violence"))
    assert (denied.code, denied.reason) == ("PERMISSION_DENIED", "NOT_PERMITTED")
    monkeypatch.setenv("FACETEER_LIBRARY_ACCESS_KEYS", "a-long-secret, another-long-secret")
    monkeypatch.setenv("FACETEER_LIBRARY_GATED_CLASSES", "violence,gore")
    stub = await serve()
    assert await seen(stub, "") == everything - {0}, "a class that is not gated needs no key"
    assert await seen(stub, "another-long-secret", "violence") == everything
    assert (await failure_of(seen(stub, "another-long-secre", "violence"))).reason == "NOT_PERMITTED"
    monkeypatch.setenv("FACETEER_LIBRARY_GATED_CLASSES", "none")
    stub = await serve()
    assert await seen(stub, "", "*") == everything
    assert (await stub.ListFeatures(ask)).total_size == len(LABELS)
    assert "long-secret" not in caplog.text
    assert "long-secret" not in repr(LibrarySettings())


async def test_the_library_says_what_it_covers(serve: Serve) -> None:
    answer = await (await serve()).GetLibrary(library_pb2.GetLibraryRequest())
    assert (answer.bundle, answer.corpus, answer.n_pictures, answer.sae_revision) == ("tiny", "none", 100, "sae1")
    assert (answer.n_features, answer.n_alive, answer.n_labelled) == (8, 7, 7)
    assert not answer.searches_meaning
    assert answer.revision
    assert answer.created


async def test_a_feature_without_an_icon_comes_with_what_one_can_be_drawn_from(
    serve: Serve, library_bundle: Path
) -> None:
    template = np.linspace(-3, 3, 1280).astype(np.float16)
    with LibraryEditor(library_bundle / "library" / "library.sqlite") as editor:
        editor.meta("icon_template", pack_template(template))
    seal(library_bundle)
    stub = await serve()
    answer = await stub.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(0)))
    assert (answer.WhichOneof("result"), answer.recipe.feature_index) == ("recipe", 0)
    assert np.array_equal(to_array(answer.recipe.template, field="template"), template)
    assert list(answer.strengths) == [0.5, 1.0, 1.5]
    stored = await stub.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(1)))
    assert stored.WhichOneof("result") == "icon"


@pytest.mark.parametrize("template", [None, "no base64", ""])
async def test_without_a_template_that_can_be_read_an_icon_is_not_made(
    serve: Serve, library_bundle: Path, template: str | None
) -> None:
    if template is not None:
        with LibraryEditor(library_bundle / "library" / "library.sqlite") as editor:
            editor.meta("icon_template", template)
        seal(library_bundle)
    failure = await failure_of((await serve()).GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(3))))
    assert (failure.reason, failure.metadata) == ("ICON_NOT_MADE", {"feature_index": "3"})


async def test_what_is_missing_is_left_out_of_many_features_where_that_is_asked_for(serve: Serve) -> None:
    stub = await serve()
    features = [at(99), at(3), named("nihgt"), named("snow"), at(8)]
    answer = await stub.BatchGetFeatures(library_pb2.BatchGetFeaturesRequest(features=features, allow_missing=True))
    assert [feature.index for feature in answer.features] == [3, 1]
    assert list(answer.missing) == [0, 2, 4]
    none = await stub.BatchGetFeatures(library_pb2.BatchGetFeaturesRequest(features=[at(99)], allow_missing=True))
    assert (list(none.features), list(none.missing)) == ([], [0])
    # Without it the first of them is named, with what is near.
    failure = await failure_of(stub.BatchGetFeatures(library_pb2.BatchGetFeaturesRequest(features=features[1:])))
    assert (failure.reason, failure.fields) == ("UNKNOWN_FEATURE", ["features[1].label"])
    assert failure.metadata["nearest"].lower().startswith("night")
    # A reference to nothing is a mistake all the same.
    request = library_pb2.BatchGetFeaturesRequest(features=[at(3), named(" ")], allow_missing=True)
    assert (await failure_of(stub.BatchGetFeatures(request))).fields == ["features[1]"]

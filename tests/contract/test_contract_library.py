"""The feature library through the door: words and meaning, pictures, filters, examples, icons, and what is gated."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from faceteer.v1 import edits_pb2, encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2, tensor_pb2
from PIL import Image
from rpc_errors import fails
from tiny_bundle import CAUSAL, DETECTION, EMBED_DIM, LABELS, N_FEATURES, picture_bytes

# As tests/contract/conftest.py has them.
GATED, GATED_LABEL, GATED_CLASS = 50, "bloodbath", "violence"
KEY = (("x-faceteer-access", "open-sesame-for-tests"),)
WRONG = (("x-faceteer-access", "open-barley"),)
ANYONE = ()


def at(index: int) -> edits_pb2.FeatureRef:
    return edits_pb2.FeatureRef(index=index)


def opened(
    server: SimpleNamespace, seed: int, metadata: tuple[tuple[str, str], ...] = ()
) -> studio_pb2.OpenImageResponse:
    request = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=picture_bytes(seed)))
    return server.studio.OpenImage(request, metadata=metadata)


def search(server: SimpleNamespace, metadata: tuple[tuple[str, str], ...] = (), **query: object) -> list[int]:
    answer = server.library.SearchFeatures(library_pb2.SearchFeaturesRequest(**query), metadata=metadata)
    assert answer.total_size >= len(answer.hits)
    return [hit.feature.index for hit in answer.hits]


def gated_picture(server: SimpleNamespace) -> int:
    """The seed of a picture on which the gated feature fires."""
    for seed in range(60):
        found = server.sae.EncodeFeatures(
            sae_pb2.EncodeFeaturesRequest(inputs=[tensor_pb2.EmbedsInput(embeds=opened(server, seed).embedding.embeds)])
        )
        if GATED in found.results[0].encoding.features.indices:
            return seed
    raise AssertionError("the gated feature fires nowhere")


def test_the_library_says_what_it_covers(server: SimpleNamespace) -> None:
    own = server.library.GetLibrary(library_pb2.GetLibraryRequest())
    through = server.studio.GetStudio(studio_pb2.GetStudioRequest())
    assert through.library == own
    assert own.revision == through.revisions.library
    assert (own.bundle, own.corpus, own.n_pictures) == ("tiny", "random pictures", 256)
    assert own.sae_revision == through.revisions.sae
    assert (own.n_features, own.n_labelled) == (N_FEATURES - 1, len(LABELS))
    assert own.searches_meaning
    assert own.created


def test_words_find_labels_and_other_words_and_what_means_the_same(server: SimpleNamespace) -> None:
    assert search(server, words="night")[0] == 0
    assert 0 in search(server, words="evening"), "one of its other words"
    # The text tower itself says what is meant: words that no label holds, and the label closest to them.
    texts = server.encoder.EncodeTexts(encoder_pb2.EncodeTextsRequest(texts=["picture at", *LABELS])).results
    vectors = np.stack([np.frombuffer(result.embedding.embeds.data, "<f4") for result in texts])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = vectors - vectors[1:].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred[1:] @ centred[0]
    found = search(server, words="picture at")
    assert found in ([], list(np.argsort(-cosines)[: len(found)]))
    # The embedding of a label finds it whatever the words are.
    embeds = texts[1 + LABELS.index("fog")].embedding.embeds
    assert search(server, words="zzz", words_embeds=embeds)[0] == LABELS.index("fog")
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "words_embeds.shape"):
        search(server, words="x", words_embeds=tensor_pb2.Tensor(element_type=1, shape=[3], data=bytes(12)))


def test_a_picture_finds_its_features_in_the_order_of_opening_it(server: SimpleNamespace) -> None:
    answer = opened(server, 3)
    wanted = [feature.index for feature in answer.features]
    for source in (
        tensor_pb2.EmbedsInput(embedding_id=answer.embedding.embedding_id),
        tensor_pb2.EmbedsInput(embeds=answer.embedding.embeds),
    ):
        request = library_pb2.SearchFeaturesRequest(picture=source)
        hits = server.library.SearchFeatures(request).hits
        assert [hit.feature.index for hit in hits] == wanted
        assert np.allclose([hit.score for hit in hits], [feature.scaled for feature in answer.features], rtol=1e-3)
    first = server.library.SearchFeatures(library_pb2.SearchFeaturesRequest(picture=source, page_size=2))
    rest = library_pb2.SearchFeaturesRequest(picture=source, page_size=100, page_token=first.next_page_token)
    pages = [*first.hits, *server.library.SearchFeatures(rest).hits]
    assert [hit.feature.index for hit in pages] == wanted
    assert first.total_size == len(wanted)
    labelled = library_pb2.FeatureFilter(labelled=True)
    assert search(server, picture=source, filter=labelled) == [index for index in wanted if index < len(LABELS)]


def test_a_picture_that_is_none_is_refused_at_its_field(server: SimpleNamespace) -> None:
    wrong = tensor_pb2.Tensor(element_type=1, shape=[3], data=bytes(12))
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "picture.embeds.shape"):
        search(server, picture=tensor_pb2.EmbedsInput(embeds=wrong))
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "picture"):
        search(server, picture=tensor_pb2.EmbedsInput())
    with fails("NOT_FOUND", "EMBEDDING_EXPIRED"):
        search(server, picture=tensor_pb2.EmbedsInput(embedding_id="gone"))
    for features, field in (
        (tensor_pb2.SparseFeatures(indices=[1, 2], activations=[1.0]), "activations.activations"),
        (tensor_pb2.SparseFeatures(indices=[1], activations=[float("nan")]), "activations.activations[0]"),
        (tensor_pb2.SparseFeatures(indices=[1, 1], activations=[1.0, 2.0]), "activations.indices[1]"),
    ):
        with fails("INVALID_ARGUMENT", "INVALID_FIELD", field):
            search(server, activations=features)


def test_features_like_one_are_its_nearest(server: SimpleNamespace) -> None:
    detail = server.library.GetFeature(library_pb2.GetFeatureRequest(feature=at(3))).detail
    nearest = [related.index for related in detail.nearest]
    assert nearest
    assert search(server, similar_to=at(3)) == nearest


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"scores_disagree": True}, [2, 4]),
        ({"scores_disagree": False}, [0, 1, 3, 5, 6]),
        ({"min_causal_score": 0.7}, [0, 1, 3, 4, 6]),
        ({"max_causal_score": 0.25}, [2]),
        ({"min_detection_score": 0.7, "max_detection_score": 0.8}, [2, 3]),
    ],
)
def test_lists_are_filtered_by_how_true_labels_are(
    server: SimpleNamespace, wanted: dict[str, float], found: list[int]
) -> None:
    answer = server.library.ListFeatures(library_pb2.ListFeaturesRequest(filter=library_pb2.FeatureFilter(**wanted)))
    assert [feature.index for feature in answer.features] == found
    assert answer.total_size == len(found)


def test_lists_are_ordered_by_scores_with_the_unmeasured_last(server: SimpleNamespace) -> None:
    def order(order: int) -> list[int]:
        answer = server.library.ListFeatures(library_pb2.ListFeaturesRequest(order=order, page_size=len(CAUSAL)))
        return [feature.index for feature in answer.features]

    assert order(library_pb2.FEATURE_ORDER_CAUSAL_SCORE_DESC) == [0, 3, 4, 1, 6, 5, 2]
    assert order(library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC) == [0, 1, 6, 2, 3, 4, 5]
    assert order(library_pb2.FEATURE_ORDER_SCORE_DISAGREEMENT_DESC)[:2] == [2, 4]
    feature = server.library.GetFeature(library_pb2.GetFeatureRequest(feature=at(0))).feature
    assert np.isclose(feature.detection_balanced_accuracy, DETECTION[0])
    assert list(feature.terms) == ["darkness", "evening"]


def test_examples_come_from_the_top_or_from_each_quantile(server: SimpleNamespace) -> None:
    feature = next(f.index for f in opened(server, 3).features)
    request = library_pb2.ListFeatureExamplesRequest(feature=at(feature))
    strongest = server.library.ListFeatureExamples(request).examples
    assert all(example.quantile_to == 0 for example in strongest)
    request.selection = library_pb2.EXAMPLE_SELECTION_QUANTILES
    quantiles = server.library.ListFeatureExamples(request)
    assert quantiles.total_size == len(quantiles.examples) > 0
    bounds = [(example.quantile_from, example.quantile_to) for example in quantiles.examples]
    assert bounds == sorted(bounds, reverse=True)
    assert all(to - start == 0.25 for start, to in bounds)
    request.selection = 9  # type: ignore[assignment]
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "selection"):
        server.library.ListFeatureExamples(request)


def test_an_icon_is_drawn_when_it_is_asked_for_and_kept(server: SimpleNamespace) -> None:
    request = library_pb2.GetFeatureIconRequest(feature=edits_pb2.FeatureRef(label="night"))
    first = server.library.GetFeatureIcon(request, timeout=60)
    with Image.open(io.BytesIO(first.icon)) as strip:
        assert strip.format == "WEBP"
        assert strip.size == (64 * 4 + 2 * 3, 64)
    assert list(first.strengths) == [0.5, 1.0, 1.5]
    again = server.library.GetFeatureIcon(request, timeout=60)
    assert (again.icon, first.execution.cached, again.execution.cached) == (first.icon, False, True)
    dead = next(
        feature.index
        for feature in server.library.ListFeatures(library_pb2.ListFeaturesRequest(page_size=1000)).features
        if feature.index == 0 or not feature.alive
    )
    if dead:
        with fails("NOT_FOUND", "ICON_NOT_MADE"):
            server.library.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(dead)))


@pytest.mark.parametrize("metadata", [ANYONE, WRONG], ids=["no-key", "wrong-key"])
def test_a_gated_feature_is_as_if_it_were_not_there(
    server: SimpleNamespace, metadata: tuple[tuple[str, str], ...]
) -> None:
    library = server.library
    for reference in (at(GATED), edits_pb2.FeatureRef(label=GATED_LABEL)):
        for call, request in (
            (library.GetFeature, library_pb2.GetFeatureRequest(feature=reference)),
            (library.BatchGetFeatures, library_pb2.BatchGetFeaturesRequest(features=[at(0), reference])),
            (library.ListFeatureExamples, library_pb2.ListFeatureExamplesRequest(feature=reference)),
            (library.GetFeatureIcon, library_pb2.GetFeatureIconRequest(feature=reference)),
            (library.SetFeatureLabel, library_pb2.SetFeatureLabelRequest(feature=reference, label="nice")),
            (library.SearchFeatures, library_pb2.SearchFeaturesRequest(similar_to=reference)),
        ):
            with fails("NOT_FOUND", "UNKNOWN_FEATURE"):
                call(request, metadata=metadata)
    with fails("NOT_FOUND", "UNKNOWN_FEATURE") as failure:
        library.GetFeature(library_pb2.GetFeatureRequest(feature=edits_pb2.FeatureRef(label="bloodbaht")))
    assert GATED_LABEL not in failure.metadata.get("nearest", "")
    listed = library.ListFeatures(library_pb2.ListFeaturesRequest(page_size=1000), metadata=metadata)
    assert GATED not in [feature.index for feature in listed.features]
    assert listed.total_size == len(listed.features) == N_FEATURES - 1
    assert GATED not in search(server, metadata, words=GATED_LABEL)
    everything = tensor_pb2.SparseFeatures(indices=range(N_FEATURES), activations=[1.0] * N_FEATURES)
    assert GATED not in search(server, metadata, activations=everything, page_size=1000)
    for index in range(N_FEATURES):
        if index != GATED:
            detail = library.GetFeature(library_pb2.GetFeatureRequest(feature=at(index)), metadata=metadata).detail
            assert GATED not in [related.index for related in detail.nearest]
    assert not library.GetLibrary(library_pb2.GetLibraryRequest(), metadata=metadata).safety_classes
    assert not server.studio.GetStudio(studio_pb2.GetStudioRequest(), metadata=metadata).library.safety_classes
    for name in (GATED_CLASS, "*", "no-such-class"):
        chosen = library_pb2.FeatureFilter(include_safety_classes=[name])
        with fails("PERMISSION_DENIED", "NOT_PERMITTED", "filter.include_safety_classes"):
            library.ListFeatures(library_pb2.ListFeaturesRequest(filter=chosen), metadata=metadata)
        with fails("PERMISSION_DENIED", "NOT_PERMITTED"):
            search(server, metadata, words="night", filter=chosen)


def test_a_key_opens_what_is_gated(server: SimpleNamespace) -> None:
    library = server.library
    feature = library.GetFeature(library_pb2.GetFeatureRequest(feature=at(GATED)), metadata=KEY).feature
    assert (feature.label, feature.safety_class) == (GATED_LABEL, GATED_CLASS)
    assert library.GetFeatureIcon(library_pb2.GetFeatureIconRequest(feature=at(GATED)), metadata=KEY, timeout=60).icon
    assert list(library.GetLibrary(library_pb2.GetLibraryRequest(), metadata=KEY).safety_classes) == [GATED_CLASS]
    studio = server.studio.GetStudio(studio_pb2.GetStudioRequest(), metadata=KEY)
    assert list(studio.library.safety_classes) == [GATED_CLASS]
    # Lists and searches show it only where they name its class.
    assert GATED not in search(server, KEY, words=GATED_LABEL)
    for name in (GATED_CLASS, "*"):
        chosen = library_pb2.FeatureFilter(include_safety_classes=[name])
        assert search(server, KEY, words=GATED_LABEL, filter=chosen)[0] == GATED
        listed = library.ListFeatures(library_pb2.ListFeaturesRequest(filter=chosen), metadata=KEY)
        assert listed.total_size == N_FEATURES
    other = library_pb2.FeatureFilter(include_safety_classes=["another"])
    assert GATED not in search(server, KEY, words=GATED_LABEL, filter=other)


@pytest.mark.parametrize(("metadata", "missing"), [(ANYONE, [1, 2]), (WRONG, [1, 2]), (KEY, [2])])
def test_what_is_gated_or_unknown_is_left_out_of_many_features_where_asked(
    server: SimpleNamespace, metadata: tuple[tuple[str, str], ...], missing: list[int]
) -> None:
    asked = [3, GATED, N_FEATURES, 0]
    request = library_pb2.BatchGetFeaturesRequest(features=[at(index) for index in asked], allow_missing=True)
    answer = server.library.BatchGetFeatures(request, metadata=metadata)
    assert list(answer.missing) == missing
    assert [one.index for one in answer.features] == [index for n, index in enumerate(asked) if n not in missing]


def test_opening_a_picture_leaves_gated_features_out_and_counts_them(server: SimpleNamespace) -> None:
    seed = gated_picture(server)
    assert opened(server, seed, WRONG).features == opened(server, seed).features
    without, with_key = opened(server, seed), opened(server, seed, KEY)
    assert without.l0 == with_key.l0 == len(with_key.features) == len(without.features) + 1
    assert GATED not in [feature.index for feature in without.features]
    assert GATED_LABEL in [feature.label for feature in with_key.features]


def test_a_gated_feature_can_be_turned_off_by_anyone_and_on_with_a_key(server: SimpleNamespace) -> None:
    seed = gated_picture(server)

    def edited(operation: int, metadata: tuple[tuple[str, str], ...], **feature: object) -> edits_pb2.EditOutcome:
        edit = edits_pb2.Edit(feature=edits_pb2.FeatureRef(**feature), operation=operation)
        if operation != edits_pb2.EDIT_OPERATION_ABLATE:
            edit.value = 1.0
        request = studio_pb2.EditImageRequest(
            input=studio_pb2.ImageInput(image=picture_bytes(seed)), edits=[edit], report_only=True
        )
        (event,) = server.studio.EditImage(request, metadata=metadata)
        return event.edited.report.outcomes[0]

    for operation in (edits_pb2.EDIT_OPERATION_SET, edits_pb2.EDIT_OPERATION_ADD, edits_pb2.EDIT_OPERATION_SWITCH):
        with fails("NOT_FOUND", "UNKNOWN_FEATURE", "edits[0].feature.index"):
            edited(operation, ANYONE, index=GATED)
        assert edited(operation, KEY, index=GATED).label == GATED_LABEL
    with fails("NOT_FOUND", "UNKNOWN_FEATURE", "edits[0].feature.label"):
        edited(edits_pb2.EDIT_OPERATION_SET, ANYONE, label=GATED_LABEL)
    off = edited(edits_pb2.EDIT_OPERATION_ABLATE, ANYONE, index=GATED)
    assert (off.feature_index, off.label, off.requested) == (GATED, "", 0.0)
    assert off.before > 0


def test_gated_features_are_not_carried_from_picture_to_picture(server: SimpleNamespace) -> None:
    source = studio_pb2.ImageInput(image=picture_bytes(gated_picture(server)))
    target = studio_pb2.ImageInput(embeds=tensor_pb2.Tensor(
        element_type=1, shape=[EMBED_DIM], data=np.linspace(-20, 20, EMBED_DIM).astype("<f4").tobytes()
    ))  # fmt: skip
    request = studio_pb2.TransferFeaturesRequest(target=target, source=source, coverage=1.0)
    whole = server.studio.TransferFeatures(request, metadata=KEY)
    assert GATED in [edit.feature.index for edit in whole.edits]
    part = server.studio.TransferFeatures(request)
    assert [e.feature.index for e in part.edits] == [e.feature.index for e in whole.edits if e.feature.index != GATED]
    assert part.coverage < whole.coverage
    # The share left out is that of the gated feature, computed from the decoder's rows.
    outcomes = whole.report.outcomes  # rivals that were turned off among them
    items = [sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[one.feature_index], activations=[1.0]))
             for one in outcomes]  # fmt: skip
    decoded = server.sae.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=[sae_pb2.DecodeItem(), *items])).results
    rows = np.stack([np.frombuffer(result.embedding.embeds.data, "<f4") for result in decoded])
    moves = (rows[1:] - rows[0]) * np.array([[one.requested - one.before] for one in outcomes])
    gated = moves[[one.feature_index for one in outcomes].index(GATED)]
    assert np.isclose(part.coverage, 1 - gated @ gated / np.sum(moves.sum(0) ** 2), atol=1e-3)


def test_a_layout_is_kept_from_the_photo(server: SimpleNamespace) -> None:
    def drawn(**keep: object) -> bytes:
        request = studio_pb2.EditImageRequest(
            input=studio_pb2.ImageInput(image=picture_bytes(4)),
            settings=generator_pb2.GenerationSettings(steps=4, seeds=[1], guidance_scale=1.0),
            skip_measuring=True,
        )
        if keep:
            request.keep_layout.CopyFrom(studio_pb2.KeepLayout(**keep))
        events = list(server.studio.EditImage(request, timeout=60))
        assert events[0].WhichOneof("event") == "edited"
        return next(event.image.data for event in events if event.WhichOneof("event") == "image")

    plain = drawn()
    image_to_image = drawn(method=studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, strength=0.5)
    inverted = drawn(method=studio_pb2.LAYOUT_METHOD_INVERSION)
    assert len({plain, image_to_image, inverted}) == 3
    assert drawn(method=studio_pb2.LAYOUT_METHOD_INVERSION, image=picture_bytes(4)) == inverted
    for keep, field in (
        ({}, "keep_layout.method"),
        ({"method": studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE, "strength": 2.0}, "keep_layout.strength"),
        ({"method": studio_pb2.LAYOUT_METHOD_INVERSION, "strength": 0.5}, "keep_layout.strength"),
        ({"method": studio_pb2.LAYOUT_METHOD_INVERSION}, "keep_layout.image"),
    ):
        request = studio_pb2.EditImageRequest(
            input=studio_pb2.ImageInput(embeds=opened(server, 4).embedding.embeds),
            keep_layout=studio_pb2.KeepLayout(**keep),
        )
        with fails("INVALID_ARGUMENT", "INVALID_FIELD", field):
            list(server.studio.EditImage(request))
    request.keep_layout.image = b"no picture"
    with fails("INVALID_ARGUMENT", "UNREADABLE_IMAGE", "keep_layout.image"):
        list(server.studio.EditImage(request))
    request.settings.scheduler = generator_pb2.SCHEDULER_LCM
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "settings.scheduler"):
        list(server.studio.EditImage(request))

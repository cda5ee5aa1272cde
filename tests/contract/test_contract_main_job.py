"""The main job through the contract's own stubs: picture in, features out, edit, picture back."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
from faceteer.v1 import edits_pb2, encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2, tensor_pb2
from PIL import Image
from rpc_errors import fails, read_item
from tiny_bundle import EMBED_DIM, N_FEATURES, picture_bytes

SET, SWITCH, RAW = edits_pb2.EDIT_OPERATION_SET, edits_pb2.EDIT_OPERATION_SWITCH, edits_pb2.EDIT_UNIT_RAW


def values(tensor: tensor_pb2.Tensor) -> np.ndarray:
    dtype = {tensor_pb2.ELEMENT_TYPE_FLOAT32: "<f4", tensor_pb2.ELEMENT_TYPE_FLOAT16: "<f2"}[tensor.element_type]
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape)).astype(np.float32)


def edit(feature: int | str, operation: int, value: float = 0.0, unit: int = 0) -> edits_pb2.Edit:
    reference = edits_pb2.FeatureRef(label=feature) if isinstance(feature, str) else edits_pb2.FeatureRef(index=feature)
    return edits_pb2.Edit(feature=reference, operation=operation, value=value, unit=unit)


def open_image(server: SimpleNamespace, seed: int) -> studio_pb2.OpenImageResponse:
    picture = studio_pb2.ImageInput(image=picture_bytes(seed))
    return server.studio.OpenImage(studio_pb2.OpenImageRequest(input=picture))


def test_the_studio_says_what_it_runs_and_its_limits(server: SimpleNamespace) -> None:
    answer = server.studio.GetStudio(studio_pb2.GetStudioRequest())
    assert answer.bundle == "tiny"
    assert answer.encoder.embed_dim == answer.sae.d_in == answer.generator.embed_dim == EMBED_DIM
    assert answer.sae.d_sae == N_FEATURES
    assert answer.sae.encoder_revision == answer.generator.encoder_revision == answer.encoder.revision
    assert answer.revisions.encoder == answer.encoder.revision
    assert answer.revisions.sae == answer.sae.revision
    assert answer.revisions.generator == answer.generator.revision
    assert answer.encoder.max_batch > 0
    assert answer.encoder.max_image_pixels > 0
    assert answer.sae.max_edits >= 300
    assert answer.generator.max_steps > 0
    assert [(size.width, size.height) for size in answer.generator.sizes] == [(64, 64), (128, 64)]


def test_opening_a_picture_names_its_features(server: SimpleNamespace) -> None:
    answer = open_image(server, 1)
    x = values(answer.embedding.embeds)
    assert x.shape == (EMBED_DIM,)
    assert answer.embedding.embedding_id.startswith(answer.revisions.encoder + "-")
    assert answer.l0 - 1 <= len(answer.features) <= answer.l0, "all that fire, but for the gated one"
    assert np.isclose(answer.norm, np.linalg.norm(x), rtol=1e-5)
    scaled = [feature.scaled for feature in answer.features]
    assert scaled == sorted(scaled, reverse=True)
    labels = {feature.index: feature.label for feature in answer.features}
    assert all((index < 8) == bool(label) for index, label in labels.items())


def test_a_picture_seen_before_runs_no_model(server: SimpleNamespace) -> None:
    first, second = open_image(server, 2), open_image(server, 2)
    assert second.encoder_execution.cached
    assert second.sae_execution.cached
    assert second.encoder_execution.compute_us == second.sae_execution.compute_us == 0
    assert second.embedding == first.embedding
    assert [(f.index, f.activation) for f in second.features] == [(f.index, f.activation) for f in first.features]


def test_encoding_through_the_studio_and_through_the_encoder_is_the_same(server: SimpleNamespace) -> None:
    request = encoder_pb2.EncodeImagesRequest(images=[picture_bytes(3), picture_bytes(4)])
    answer = server.encoder.EncodeImages(request)
    for seed, result in zip((3, 4), answer.results, strict=True):
        opened = open_image(server, seed)
        assert opened.embedding.embedding_id == result.embedding.embedding_id
        assert np.allclose(values(opened.embedding.embeds), values(result.embedding.embeds), rtol=1e-4, atol=1e-3)


def test_one_bad_picture_does_not_fail_its_neighbours(server: SimpleNamespace) -> None:
    request = encoder_pb2.EncodeImagesRequest(images=[picture_bytes(3), b"not a picture", picture_bytes(4)])
    first, bad, last = server.encoder.EncodeImages(request).results
    assert first.WhichOneof("result") == last.WhichOneof("result") == "embedding"
    failure = read_item(bad.error)
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", "UNREADABLE_IMAGE")
    assert failure.fields == ["images[1]"]


def test_streamed_pictures_come_back_under_their_numbers(server: SimpleNamespace) -> None:
    pictures = {100 + seed: picture_bytes(seed) for seed in range(20)} | {7: b"broken"}
    stream = (encoder_pb2.StreamEncodeImagesRequest(sequence=n, image=data) for n, data in pictures.items())
    answers = {answer.sequence: answer.result for answer in server.encoder.StreamEncodeImages(stream, timeout=60)}
    assert answers.keys() == pictures.keys()
    assert answers.pop(7).WhichOneof("result") == "error"
    one = server.encoder.EncodeImages(encoder_pb2.EncodeImagesRequest(images=[pictures[105]])).results[0]
    assert answers[105].embedding.embedding_id == one.embedding.embedding_id
    assert np.allclose(values(answers[105].embedding.embeds), values(one.embedding.embeds), rtol=1e-4, atol=1e-3)


def test_texts_are_encoded_into_the_same_space(server: SimpleNamespace) -> None:
    answer = server.encoder.EncodeTexts(encoder_pb2.EncodeTextsRequest(texts=["a boat at night", "two red"]))
    first, second = (values(result.embedding.embeds) for result in answer.results)
    assert first.shape == second.shape == (EMBED_DIM,)
    assert not np.allclose(first, second)


def test_features_and_error_decode_to_the_embedding(server: SimpleNamespace) -> None:
    embedding = open_image(server, 5).embedding
    source = tensor_pb2.EmbedsInput(embeds=embedding.embeds)
    encoding = (
        server.sae.EncodeFeatures(sae_pb2.EncodeFeaturesRequest(inputs=[source], include_error=True))
        .results[0]
        .encoding
    )
    item = sae_pb2.DecodeItem(features=encoding.features, error=encoding.error)
    decoded = server.sae.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=[item])).results[0].embedding
    assert np.allclose(values(decoded.embeds), values(embedding.embeds), rtol=1e-5, atol=1e-3)


def test_an_edit_moves_the_embedding_along_the_decoder_direction_only(server: SimpleNamespace) -> None:
    opened = open_image(server, 6)
    x = values(opened.embedding.embeds)
    request = sae_pb2.EditEmbedsRequest(
        input=tensor_pb2.EmbedsInput(embedding_id=opened.embedding.embedding_id),
        edits=[edit(9, SET, 5.0, RAW)],
        measure=True,
    )
    answer = server.sae.EditEmbeds(request)
    (outcome,) = answer.report.outcomes
    assert outcome.requested == 5.0
    moved = values(answer.embedding.embeds) - x
    direction = sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=[9], activations=[1.0]))
    zero = sae_pb2.DecodeItem()
    one, none = server.sae.DecodeFeatures(sae_pb2.DecodeFeaturesRequest(items=[direction, zero])).results
    d = values(one.embedding.embeds) - values(none.embedding.embeds)
    assert np.allclose(moved, (5.0 - outcome.before) * d, rtol=1e-3, atol=1e-3)
    assert np.isclose(answer.report.delta_norm, np.linalg.norm(moved), rtol=1e-3)
    assert answer.report.measured
    assert outcome.HasField("achieved")


def test_an_edited_picture_is_drawn_with_progress_and_previews(server: SimpleNamespace) -> None:
    request = studio_pb2.EditImageRequest(
        input=studio_pb2.ImageInput(image=picture_bytes(7)),
        edits=[
            edit("night", SET, 1.0),
            edit("SNOW", edits_pb2.EDIT_OPERATION_ABLATE),
            edit(12, edits_pb2.EDIT_OPERATION_ADD, 0.5),
        ],
        settings=generator_pb2.GenerationSettings(steps=4, seeds=[7, 8]),
        preview_every=2,
    )
    events = list(server.studio.EditImage(request, timeout=60))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "edited"
    assert kinds[-1] == "finished"
    assert {"queued", "started", "progress", "preview"} <= set(kinds)
    outcomes = events[0].edited.report.outcomes
    assert [outcome.label for outcome in outcomes[:2]] == ["night", "snow"]
    assert [e.feature.index for e in events[0].edited.edits] == [0, 1, 12]
    pictures = [event.image for event in events if event.WhichOneof("event") == "image"]
    assert sorted(picture.seed for picture in pictures) == [7, 8]
    for picture in pictures:
        with Image.open(io.BytesIO(picture.data)) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")


def test_the_same_seed_draws_the_same_picture_and_webp_comes_as_webp(server: SimpleNamespace) -> None:
    embedding_id = open_image(server, 8).embedding.embedding_id
    pixels = []
    for format_, name in ((generator_pb2.IMAGE_FORMAT_PNG, "PNG"), (generator_pb2.IMAGE_FORMAT_WEBP, "WEBP")):
        request = generator_pb2.GenerateRequest(
            input=tensor_pb2.EmbedsInput(embedding_id=embedding_id),
            settings=generator_pb2.GenerationSettings(steps=3, seeds=[11], format=format_, width=128, height=64),
        )
        (picture,) = (
            e.image for e in server.generator.Generate(request, timeout=60) if e.WhichOneof("event") == "image"
        )
        with Image.open(io.BytesIO(picture.data)) as image:
            assert image.format == name
            assert image.size == (128, 64)
            pixels.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_transfer_gives_edits_that_carry_the_difference(server: SimpleNamespace) -> None:
    target, source = studio_pb2.ImageInput(image=picture_bytes(9)), studio_pb2.ImageInput(image=picture_bytes(10))
    answer = server.studio.TransferFeatures(
        studio_pb2.TransferFeaturesRequest(target=target, source=source, coverage=0.9)
    )
    assert answer.coverage >= 0.9
    assert answer.edits
    start, goal = values(open_image(server, 9).embedding.embeds), values(open_image(server, 10).embedding.embeds)
    end = values(answer.embedding.embeds)
    assert np.linalg.norm(goal - end) < np.linalg.norm(goal - start)
    replayed = server.sae.EditEmbeds(
        sae_pb2.EditEmbedsRequest(input=tensor_pb2.EmbedsInput(embeds=answer.target.embeds), edits=answer.edits)
    )
    assert np.allclose(values(replayed.embedding.embeds), end, rtol=1e-5, atol=1e-3)


def test_features_are_found_by_words_and_shown_with_examples(server: SimpleNamespace) -> None:
    hits = server.library.SearchFeatures(library_pb2.SearchFeaturesRequest(words="nigh")).hits
    assert hits[0].feature.label == "night"
    reference = edits_pb2.FeatureRef(label="night")
    feature = server.library.GetFeature(library_pb2.GetFeatureRequest(feature=reference)).feature
    assert feature.index == 0
    examples = server.library.ListFeatureExamples(library_pb2.ListFeatureExamplesRequest(feature=reference)).examples
    with Image.open(io.BytesIO(examples[0].thumbnail)) as thumbnail:
        assert thumbnail.format == "WEBP"
    activations = [example.activation for example in examples]
    assert activations == sorted(activations, reverse=True)


def test_a_persons_label_can_be_used_in_an_edit_at_once(server: SimpleNamespace) -> None:
    reference = edits_pb2.FeatureRef(index=20)
    server.library.SetFeatureLabel(
        library_pb2.SetFeatureLabelRequest(feature=reference, label="lighthouse", author="ada")
    )
    request = studio_pb2.EditImageRequest(
        input=studio_pb2.ImageInput(image=picture_bytes(7)), edits=[edit("Lighthouse", SET, 1.0)], report_only=True
    )
    (event,) = server.studio.EditImage(request)
    assert event.edited.report.outcomes[0].feature_index == 20
    server.library.SetFeatureLabel(library_pb2.SetFeatureLabelRequest(feature=reference, label=""))
    with fails("NOT_FOUND", "UNKNOWN_FEATURE"):
        list(server.studio.EditImage(request))


def test_a_bundle_without_a_prior_says_so(server: SimpleNamespace) -> None:
    with fails("FAILED_PRECONDITION", "NOT_IN_BUNDLE"):
        server.generator.EmbedPrompt(generator_pb2.EmbedPromptRequest(prompt="a boat at night"))

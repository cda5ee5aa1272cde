"""Bad input: one clear error that names the field and the fix, nothing lost, nobody else notices."""

from __future__ import annotations

import io
import struct
import zlib
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from faceteer.v1 import (
    edits_pb2,
    encoder_pb2,
    execution_pb2,
    generator_pb2,
    library_pb2,
    sae_pb2,
    studio_pb2,
    tensor_pb2,
)
from PIL import Image
from rpc_errors import Failure, fails, read_item
from tiny_bundle import EMBED_DIM, N_FEATURES, picture, picture_bytes

SET = edits_pb2.EDIT_OPERATION_SET


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    array = np.asarray(array, dtype="<f4")
    return tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def good_embeds() -> tensor_pb2.Tensor:
    return tensor(np.linspace(-20, 20, EMBED_DIM))


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, and hardly any data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def encode_error(server: SimpleNamespace, data: bytes) -> Failure:
    (result,) = server.encoder.EncodeImages(encoder_pb2.EncodeImagesRequest(images=[data])).results
    assert result.WhichOneof("result") == "error"
    return read_item(result.error)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "UNREADABLE_IMAGE"),
        (b"hello, I am not a picture", "UNREADABLE_IMAGE"),
        (picture_bytes(1)[:-200], "UNREADABLE_IMAGE"),
        (picture_bytes(1, 256, "JPEG")[:600], "UNREADABLE_IMAGE"),
        (b"%PDF-1.4 nothing", "UNREADABLE_IMAGE"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "UNREADABLE_IMAGE"),
        (png_of_size(100_000, 100_000), "IMAGE_TOO_LARGE"),
        (b"http://127.0.0.1/boat.png", "UNREADABLE_IMAGE"),
        (b"file:///etc/hostname", "UNREADABLE_IMAGE"),
    ],
    ids=["empty", "text", "truncated-png", "truncated-jpeg", "pdf", "svg", "bomb", "url", "path"],
)
def test_what_is_no_picture_is_refused_by_name(server: SimpleNamespace, data: bytes, reason: str) -> None:
    failure = encode_error(server, data)
    assert (failure.code, failure.reason, failure.fields) == ("INVALID_ARGUMENT", reason, ["images[0]"])
    with fails("INVALID_ARGUMENT", reason):
        server.studio.OpenImage(studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=data)))


def embeds_of(server: SimpleNamespace, data: bytes) -> np.ndarray:
    (result,) = server.encoder.EncodeImages(encoder_pb2.EncodeImagesRequest(images=[data])).results
    assert result.WhichOneof("result") == "embedding", result.error.message
    return np.frombuffer(result.embedding.embeds.data, "<f4")


def test_unusual_pictures_are_read_as_a_person_would_see_them(server: SimpleNamespace) -> None:
    plain = picture(3)
    expected = embeds_of(server, saved(plain, "PNG"))

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    rotated = saved(plain.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    frames = saved(plain, "PNG", save_all=True, append_images=[picture(4)])
    on_white = plain.convert("RGBA")
    on_white.putalpha(255)
    wide = np.asarray(plain.convert("L"), dtype=np.uint16) * 257
    grey = saved(plain.convert("L"), "PNG")
    tolerance = {"rtol": 1e-3, "atol": 0.05}
    assert np.allclose(embeds_of(server, rotated), expected, **tolerance)
    assert np.allclose(embeds_of(server, frames), expected, **tolerance)
    assert np.allclose(embeds_of(server, saved(on_white, "PNG")), expected, **tolerance)
    assert np.allclose(embeds_of(server, saved(Image.fromarray(wide), "PNG")), embeds_of(server, grey), **tolerance)
    # JPEG and CMYK lose a little colour, not the picture.
    cmyk = embeds_of(server, saved(plain.convert("CMYK"), "JPEG", quality=95))
    other = embeds_of(server, saved(picture(4), "PNG"))
    assert np.linalg.norm(cmyk - expected) < 0.5 * np.linalg.norm(other - expected)
    transparent = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.allclose(
        embeds_of(server, saved(transparent, "PNG")),
        embeds_of(server, saved(Image.new("RGB", (64, 64), "white"), "PNG")),
        **tolerance,
    )
    assert np.isfinite(embeds_of(server, saved(Image.new("RGB", (1, 1), "teal"), "PNG"))).all()


EMBEDS_FAULTS = {
    "nan": tensor(np.full(EMBED_DIM, np.nan)),
    "infinite": tensor(np.full(EMBED_DIM, np.inf)),
    "dimension": tensor(np.zeros(EMBED_DIM + 1)),
    "matrix": tensor(np.zeros((1, EMBED_DIM))),
    "no-type": tensor_pb2.Tensor(element_type=99, shape=[EMBED_DIM], data=b"\0" * 4 * EMBED_DIM),  # type: ignore[arg-type]
    "short": tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[EMBED_DIM], data=b"\0" * 7),
    "half-the-bytes": tensor_pb2.Tensor(
        element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[EMBED_DIM], data=b"\0" * 2 * EMBED_DIM
    ),
    "negative-shape": tensor_pb2.Tensor(
        element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[-EMBED_DIM], data=b"\0" * 4 * EMBED_DIM
    ),
}


@pytest.mark.parametrize("fault", EMBEDS_FAULTS)
def test_unusable_embeds_are_refused_everywhere(server: SimpleNamespace, fault: str) -> None:
    source = tensor_pb2.EmbedsInput(embeds=EMBEDS_FAULTS[fault])
    with fails("INVALID_ARGUMENT", "INVALID_FIELD") as failure:
        server.sae.EditEmbeds(sae_pb2.EditEmbedsRequest(input=source))
    assert failure.fields[0].startswith("input")
    (result,) = server.sae.EncodeFeatures(sae_pb2.EncodeFeaturesRequest(inputs=[source])).results
    assert read_item(result.error).fields[0].startswith("inputs[0]")
    with fails("INVALID_ARGUMENT", "INVALID_FIELD"):
        list(server.generator.Generate(generator_pb2.GenerateRequest(input=source)))
    with fails("INVALID_ARGUMENT", "INVALID_FIELD"):
        picture_input = studio_pb2.ImageInput(embeds=EMBEDS_FAULTS[fault])
        list(server.studio.EditImage(studio_pb2.EditImageRequest(input=picture_input, report_only=True)))


def one_edit(**changes: object) -> edits_pb2.Edit:
    fields: dict[str, object] = {"feature": edits_pb2.FeatureRef(index=1), "operation": SET, "value": 1.0}
    return edits_pb2.Edit(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edits", "code", "reason", "field"),
    [
        ([one_edit(value=float("nan"))], "INVALID_ARGUMENT", "INVALID_FIELD", "edits[0].value"),
        (
            [one_edit(), one_edit(value=float("inf"), feature=edits_pb2.FeatureRef(index=2))],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "edits[1].value",
        ),
        ([one_edit(operation=0)], "INVALID_ARGUMENT", "INVALID_FIELD", "edits[0].operation"),
        ([one_edit(feature=None)], "INVALID_ARGUMENT", "INVALID_FIELD", "edits[0].feature"),
        ([one_edit(feature=edits_pb2.FeatureRef(index=N_FEATURES))], "NOT_FOUND", "UNKNOWN_FEATURE", None),
        (
            [one_edit(operation=edits_pb2.EDIT_OPERATION_ABLATE, value=2.0)],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "edits[0].value",
        ),
    ],
    ids=["nan", "infinite", "no-operation", "no-feature", "index", "ablate-with-a-value"],
)
def test_unusable_edits_are_refused_by_field(
    server: SimpleNamespace, edits: list[edits_pb2.Edit], code: str, reason: str, field: str | None
) -> None:
    request = studio_pb2.EditImageRequest(
        input=studio_pb2.ImageInput(embeds=good_embeds()), edits=edits, report_only=True
    )
    with fails(code, reason, field):
        list(server.studio.EditImage(request))
    source = tensor_pb2.EmbedsInput(embeds=good_embeds())
    with pytest.raises(grpc.RpcError) as caught:
        server.sae.EditEmbeds(sae_pb2.EditEmbedsRequest(input=source, edits=edits))
    assert caught.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND")


def test_of_two_edits_of_one_feature_the_last_counts_and_a_warning_says_so(server: SimpleNamespace) -> None:
    def edited(*edits: edits_pb2.Edit) -> edits_pb2.EditReport:
        source = studio_pb2.ImageInput(embeds=good_embeds())
        request = studio_pb2.EditImageRequest(input=source, edits=edits, report_only=True)
        (event,) = server.studio.EditImage(request)
        return event.edited.report

    alone, twice = edited(one_edit(value=0.5)), edited(one_edit(value=0.25), one_edit(value=0.5))
    assert list(twice.outcomes) == list(alone.outcomes)
    assert [(one.code, list(one.feature_indices)) for one in twice.warnings if one not in alone.warnings] == [
        ("EDIT_REPLACED", [1])
    ]


def test_an_unknown_label_comes_with_the_nearest_ones(server: SimpleNamespace) -> None:
    edits = [one_edit(feature=edits_pb2.FeatureRef(label="nihgt"))]
    request = studio_pb2.EditImageRequest(
        input=studio_pb2.ImageInput(embeds=good_embeds()), edits=edits, report_only=True
    )
    with fails("NOT_FOUND", "UNKNOWN_FEATURE") as failure:
        list(server.studio.EditImage(request))
    assert "night" in failure.metadata["nearest"].split(", ")
    with fails("INVALID_ARGUMENT", "INVALID_FIELD"):
        server.sae.EditEmbeds(
            sae_pb2.EditEmbedsRequest(input=tensor_pb2.EmbedsInput(embeds=good_embeds()), edits=edits)
        )


def test_empty_and_overlong_batches_are_refused(server: SimpleNamespace) -> None:
    limit = server.studio.GetStudio(studio_pb2.GetStudioRequest()).encoder.max_batch
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "images"):
        server.encoder.EncodeImages(encoder_pb2.EncodeImagesRequest())
    with fails("INVALID_ARGUMENT", "BATCH_TOO_LARGE", "images"):
        server.encoder.EncodeImages(encoder_pb2.EncodeImagesRequest(images=[b"x"] * (limit + 1)))
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "texts"):
        server.encoder.EncodeTexts(encoder_pb2.EncodeTextsRequest())
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "inputs"):
        server.sae.EncodeFeatures(sae_pb2.EncodeFeaturesRequest())
    with fails("INVALID_ARGUMENT", "INVALID_FIELD"):
        server.library.BatchGetFeatures(library_pb2.BatchGetFeaturesRequest())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"steps": 10_000}, "settings.steps"),
        ({"width": 63, "height": 64}, "settings"),
        ({"width": 4096, "height": 4096}, "settings"),
        ({"guidance_scale": float("nan")}, "settings.guidance_scale"),
        ({"guidance_scale": -1.0}, "settings.guidance_scale"),
        ({"guidance_scale": 31.0}, "settings.guidance_scale"),
        ({"seeds": list(range(1000))}, "settings.seeds"),
        ({"scheduler": 99}, "settings.scheduler"),
        ({"quality": 101, "format": generator_pb2.IMAGE_FORMAT_WEBP}, "settings.quality"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused_by_field(
    server: SimpleNamespace, settings: dict[str, object], field: str
) -> None:
    generation = generator_pb2.GenerationSettings(**settings)  # type: ignore[arg-type]
    with fails("INVALID_ARGUMENT", "INVALID_FIELD") as failure:
        source = tensor_pb2.EmbedsInput(embeds=good_embeds())
        list(server.generator.Generate(generator_pb2.GenerateRequest(input=source, settings=generation)))
    assert failure.fields[0].startswith(field)
    with fails("INVALID_ARGUMENT", "INVALID_FIELD"):
        picture_input = studio_pb2.ImageInput(embeds=good_embeds())
        list(server.studio.EditImage(studio_pb2.EditImageRequest(input=picture_input, settings=generation)))


def test_zero_steps_mean_the_default(server: SimpleNamespace) -> None:
    request = generator_pb2.GenerateRequest(
        input=tensor_pb2.EmbedsInput(embeds=good_embeds()),
        settings=generator_pb2.GenerationSettings(steps=0, seeds=[1]),
    )
    started = next(e.started for e in server.generator.Generate(request) if e.WhichOneof("event") == "started")
    assert started.settings.steps == 4


def test_an_unknown_id_says_that_it_has_expired(server: SimpleNamespace) -> None:
    for embedding_id in ("0123456789abcdef-" + "0" * 64, "nonsense"):
        with fails("NOT_FOUND", "EMBEDDING_EXPIRED"):
            source = tensor_pb2.EmbedsInput(embedding_id=embedding_id)
            server.sae.EditEmbeds(sae_pb2.EditEmbedsRequest(input=source))
        with fails("NOT_FOUND", "EMBEDDING_EXPIRED"):
            picture_input = studio_pb2.ImageInput(embedding_id=embedding_id)
            list(server.studio.EditImage(studio_pb2.EditImageRequest(input=picture_input)))


def test_a_missing_input_is_named(server: SimpleNamespace) -> None:
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "input"):
        server.sae.EditEmbeds(sae_pb2.EditEmbedsRequest())
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "input"):
        list(server.generator.Generate(generator_pb2.GenerateRequest()))
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "input"):
        server.studio.OpenImage(studio_pb2.OpenImageRequest())
    with fails("INVALID_ARGUMENT", "INVALID_FIELD", "source"):
        target = studio_pb2.ImageInput(embeds=good_embeds())
        server.studio.TransferFeatures(studio_pb2.TransferFeaturesRequest(target=target))


def test_a_recipe_of_another_bundle_is_refused(server: SimpleNamespace) -> None:
    for part in ("encoder", "sae", "generator"):
        request = studio_pb2.EditImageRequest(
            input=studio_pb2.ImageInput(embeds=good_embeds()),
            expected_revisions=execution_pb2.Revisions(**{part: "feedfeedfeedfeed"}),
            report_only=True,
        )
        with fails("FAILED_PRECONDITION", "REVISION_MISMATCH") as failure:
            list(server.studio.EditImage(request))
        assert part in failure.message


def test_bad_labels_are_refused(server: SimpleNamespace) -> None:
    for label in ("x" * 121, "two\nlines", "bell\a"):
        with fails("INVALID_ARGUMENT", "INVALID_FIELD", "label"):
            reference = edits_pb2.FeatureRef(index=3)
            server.library.SetFeatureLabel(library_pb2.SetFeatureLabelRequest(feature=reference, label=label))


def test_page_tokens_of_another_request_are_refused(server: SimpleNamespace) -> None:
    first = server.library.ListFeatures(library_pb2.ListFeaturesRequest(page_size=10))
    assert len(first.features) == 10
    assert first.total_size == N_FEATURES - 1  # one is gated
    second = server.library.ListFeatures(
        library_pb2.ListFeaturesRequest(page_size=10, page_token=first.next_page_token)
    )
    assert [f.index for f in second.features] == list(range(10, 20))
    changed = library_pb2.ListFeaturesRequest(
        order=library_pb2.FEATURE_ORDER_LABEL, page_size=10, page_token=first.next_page_token
    )
    for request in (changed, library_pb2.ListFeaturesRequest(page_token="gibberish")):
        with fails("INVALID_ARGUMENT", "INVALID_FIELD", "page_token"):
            server.library.ListFeatures(request)


def test_hostile_search_words_are_harmless(server: SimpleNamespace) -> None:
    for words in ('"', "night OR", "NEAR(", "label:night", "*", "a-b", "'; DROP TABLE features; --", "()", "\0"):
        server.library.SearchFeatures(library_pb2.SearchFeaturesRequest(words=words))
    assert server.library.ListFeatures(library_pb2.ListFeaturesRequest()).total_size == N_FEATURES - 1

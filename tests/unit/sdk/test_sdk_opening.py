"""Opening pictures of every kind, and what an opened photo knows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import faceteer
import numpy as np
import pytest
from PIL import Image
from unit.sdk.fake_server import FakeServer, embeds_of, png

BOAT = png(10, 20, 30, 40, 50, 250, 0, 0, 80)


def as_path(data: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "boat.png"
    path.write_bytes(data)
    return path


KINDS: dict[str, Any] = {
    "path": as_path,
    "string": lambda data, tmp: str(as_path(data, tmp)),
    "bytes": lambda data, tmp: data,
    "bytearray": lambda data, tmp: bytearray(data),
    "memoryview": lambda data, tmp: memoryview(data),
    "PIL": lambda data, tmp: Image.open(io.BytesIO(data)),
    "PIL palette": lambda data, tmp: Image.open(io.BytesIO(data)).convert("P"),
    "array grey": lambda data, tmp: np.asarray(Image.open(io.BytesIO(data))),
    "array RGB": lambda data, tmp: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    "array RGBA": lambda data, tmp: np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")),
    "array not contiguous": lambda data, tmp: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[::-1][::-1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_opens_to_the_same_embedding(either: Any, tmp_path: Path, kind: str) -> None:
    photo = either.open(KINDS[kind](BOAT, tmp_path))
    np.testing.assert_allclose(photo.embeds, embeds_of(BOAT), atol=2e-3)
    assert photo.name == ("boat.png" if kind in ("path", "string") else "picture")


def test_files_travel_unchanged(client: faceteer.Client, server: FakeServer, tmp_path: Path) -> None:
    client.open(as_path(BOAT, tmp_path))
    assert server.calls[-1][1].input.image == BOAT


def test_an_exif_rotated_pil_image_keeps_its_orientation_for_the_server() -> None:
    from faceteer._models.pictures import picture_bytes

    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    sent = picture_bytes(Image.open(io.BytesIO(buffer.getvalue())))
    assert Image.open(io.BytesIO(sent)).getexif()[0x0112] == 6


def test_cmyk_and_float_images_are_converted() -> None:
    from faceteer._models.pictures import picture_bytes

    for mode in ("CMYK", "F", "I", "YCbCr", "LAB"):
        if mode == "LAB":
            continue
        assert Image.open(io.BytesIO(picture_bytes(Image.new(mode, (2, 2))))).mode in ("RGB", "RGBA")


def test_features_come_strongest_first_with_names(either: Any) -> None:
    photo = either.open(BOAT)
    top = photo.features.top(2)
    assert [feature.index for feature in top] == [5, 8]
    assert top[0].label == "snow"
    assert top[0].activation == pytest.approx(250 / 255)
    assert top[0].scaled == pytest.approx(250 / 255 / 2)
    assert top[1].name == "#8"
    assert photo.l0 == len(photo.features) == 7
    assert photo.features.complete


def test_a_feature_is_found_by_index_or_label_and_is_none_when_it_does_not_fire(client: faceteer.Client) -> None:
    features = client.open(BOAT).features
    assert features.find("SNOW") == features.find(5) == features[0]
    assert features.find("fog") is None
    assert features.find(412) is None
    assert tuple(features[1:3]) == (features[1], features[2])


def test_fewer_features_can_be_kept_and_l0_still_counts_all(client: faceteer.Client) -> None:
    photo = client.open(BOAT, max_features=2)
    assert (len(photo.features), photo.l0, photo.features.complete) == (2, 7, False)


def test_the_embedding_is_read_only(client: faceteer.Client) -> None:
    with pytest.raises(ValueError, match="read-only"):
        client.open(BOAT).embeds[0] = 1


def test_a_photo_shows_itself_as_text_and_as_html_with_labels_escaped(client: faceteer.Client) -> None:
    photo = client.open(png(0, 0, 0, 0, 0, 200, *[0] * 7, 90))
    assert repr(photo) == "<Photo picture: 2 features, snow 0.39, [bold]odd & <b>label</b> 0.18>"
    assert "&lt;b&gt;label&lt;/b&gt;" in photo._repr_html_()
    assert "#5     snow" in str(photo.features)


def test_an_embedding_opens_without_a_picture(either: Any) -> None:
    photo = either.open_embeds(np.eye(512)[3] * 1.5)
    assert [str(feature) for feature in photo.features] == ["night 0.75"]
    assert photo.image is None
    assert photo.data is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((4, 4), np.float32), r"pass uint8.*multiply by 255"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\].*pass \[height, width\]"),
        (np.zeros((0, 4), np.uint8), r"shape \[0, 4\]"),
        (b"", "no bytes at all"),
        (42, "int is not a picture; pass a path"),
        (None, "NoneType is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_before_any_call(
    client: faceteer.Client, server: FakeServer, wrong: Any, says: str
) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match=says) as raised:
        client.open(wrong)
    assert raised.value.field == "picture"
    assert server.calls == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((2, 8)), r"shape \[2, 8\]"),
        (np.full(8, np.nan), "NaN"),
        (np.array(["a"]), "one embedding"),
        (np.zeros(0), "one embedding"),
    ],
)
def test_what_is_no_embedding_is_refused_before_any_call(client: faceteer.Client, wrong: Any, says: str) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match=says):
        client.open_embeds(wrong)


def test_a_missing_file_is_a_missing_file(either: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        either.open("nowhere.png")


def test_bytes_that_the_server_cannot_read_name_the_field(either: Any) -> None:
    with pytest.raises(faceteer.UnreadableImageError) as raised:
        either.open(b"not a picture")
    assert raised.value.field == "input.image"


def test_a_file_that_is_no_picture_is_named(either: Any, tmp_path: Path) -> None:
    path = tmp_path / "IMG_1234.HEIC"
    path.write_bytes(b"not a picture")
    with pytest.raises(faceteer.UnreadableImageError, match=r"^IMG_1234\.HEIC: "):
        either.open(path)
    with pytest.raises(faceteer.UnreadableImageError, match=r"^item 0: IMG_1234\.HEIC: "):
        either.encode([path])


def test_status_says_what_runs_and_whether_it_is_well(either: Any, server: FakeServer) -> None:
    from grpc_health.v1 import health_pb2

    status = either.status()
    assert (status.bundle, status.encoder.embed_dim, status.generator.sizes) == ("fake", 512, ((8, 8),))
    assert status.generator.schedulers == ("ddim", "ddpm")
    assert status.healthy
    server.health.set("faceteer.v1.SaeService", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert either.status().health["sae"] == "not serving"
    assert not either.status().healthy


def test_status_names_a_part_that_is_down_and_what_works_without_it(either: Any, server: FakeServer) -> None:
    whole = either.status()
    assert (whole.down, whole.fails) == ({}, ())
    server.down["generator"] = "generator: cannot be reached"
    status = either.status()
    assert not status.healthy
    assert status.down == {"generator": "generator: cannot be reached"}
    assert status.fails == ("drawing",)
    assert status.works == ("opening pictures", "reports of edits", "encoding", "the library")
    assert status.to_dict()["fails"] == ["drawing"]


def test_a_photo_has_its_picture_and_one_from_an_embedding_has_none(either: Any) -> None:
    photo = either.open(png(9))
    assert photo.image.size == (16, 16)
    assert photo.data == png(9)
    bare = either.open_embeds(np.ones(512, np.float32))
    assert (bare.image, bare.data) == (None, None)


def test_the_last_empty_calls_round_trip_is_a_moment(either: Any) -> None:
    assert 0 < either.status().round_trip < 5


def test_a_photo_tells_all_that_the_server_said(either: Any, server: FakeServer) -> None:
    photo = either.open(png(9, 0, 20))
    assert photo.embedding_id in server._embeds
    assert photo.embedding_id.startswith("enc0-")
    assert (photo.name, photo.prompt, photo.l0) == ("picture", "", 2)
    assert (photo.explained_variance, photo.cosine) == (1.0, 1.0)
    assert photo.norm == pytest.approx(float(np.linalg.norm(photo.embeds)))
    assert photo.revisions == faceteer.Revisions("enc0", "sae0", "gen0", "lib0")
    assert (photo.encoder_execution.compute_us, photo.encoder_execution.model_revision) == (10, "enc0")
    assert photo.sae_execution.model_revision == "sae0"
    assert photo.warnings == ()


def test_objects_say_what_they_are(client: faceteer.Client, server: FakeServer) -> None:
    photo = client.open(png(9, 0, 20))
    assert repr(client) == f"<Client of {server.address}>"
    assert repr(photo) == "<Photo picture: 2 features, #2 0.04, #0 0.02>"
    assert repr(photo.edit().set("night", 1.0)) == "<Edit of picture: set night to 1>"
    assert repr(photo.edit()) == "<Edit of picture: no edits>"
    with faceteer.connect("a:1") as other:
        assert repr(other) == "<Client of a:1>"
    assert repr(faceteer.connect_async("a:1")) == "<AsyncClient of a:1>"
    assert repr(client.features[3]).startswith("<Feature #3 'night'")
    assert (hash(client.features[3]), client.features[3] == 3) == (hash(client.features[3]), False)

"""Calls over HTTP in every form that clients send them."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import pytest
from faceteer.v1 import studio_pb2
from google.rpc import error_details_pb2, status_pb2
from http_client import ask, call, detail_bytes, envelope

OPEN = "/faceteer.v1.StudioService/OpenImage"
EDIT = "/faceteer.v1.StudioService/EditImage"
PARTS = b"hello"
REQUEST = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=PARTS))


def picture(data: bytes) -> dict[str, dict[str, str]]:
    return {"input": {"image": base64.b64encode(data).decode()}}


def editing(data: bytes) -> bytes:
    return studio_pb2.EditImageRequest(input=studio_pb2.ImageInput(image=data)).SerializeToString()


def from_text(body: bytes) -> bytes:
    """Base64 of several pieces, each padded by itself."""
    groups = [part + "=" * (-len(part) % 4) for part in body.decode().replace("=", " ").split()]
    return b"".join(map(base64.b64decode, groups))


async def test_json_goes_in_and_comes_out(world: SimpleNamespace) -> None:
    reply = await call(world.port, OPEN, picture(PARTS))
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    # As proto-JSON has it: zeros are left out, so that feature 0 has no index.
    assert reply.json() == {"l0": 5, "features": [{"label": "né ☃"}, {"index": 1}]}


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_json_is_known_however_its_name_is_written(world: SimpleNamespace, kind: str) -> None:
    assert (await call(world.port, OPEN, picture(PARTS), {"content-type": kind})).json()["l0"] == 5


async def test_binary_connect_passes_through(world: SimpleNamespace) -> None:
    reply = await ask(world.port, OPEN, REQUEST.SerializeToString(), {"content-type": "application/proto"})
    assert reply.headers["content-type"] == "application/proto"
    assert studio_pb2.OpenImageResponse.FromString(reply.body).l0 == 5


async def test_a_connect_stream_has_a_message_an_envelope_and_an_end(world: SimpleNamespace) -> None:
    kind = {"content-type": "application/connect+json", "connect-accept-encoding": "gzip"}
    reply = await ask(world.port, EDIT, envelope(json.dumps(picture(PARTS)).encode()), kind)
    *messages, (flags, end) = reply.frames()
    assert [flag for flag, _ in messages] == [0, 0, 0]
    assert json.loads(messages[0][1])["image"]["data"] == base64.b64encode(b"p" * 10).decode()
    assert (flags, json.loads(end)) == (2, {})
    binary = await ask(world.port, EDIT, envelope(editing(PARTS)), {"content-type": "application/connect+proto"})
    assert studio_pb2.EditImageResponse.FromString(binary.frames()[0][1]).image.data == b"p" * 10


@pytest.mark.parametrize("path", [OPEN, EDIT])
async def test_grpc_web_ends_with_a_frame_of_trailers(world: SimpleNamespace, path: str) -> None:
    reply = await ask(world.port, path, envelope(editing(PARTS)), {"content-type": "application/grpc-web+proto"})
    *messages, (flags, trailers) = reply.frames()
    assert len(messages) == (1 if path == OPEN else 3)
    assert flags == 0x80
    assert b"grpc-status: 0" in trailers.lower()


@pytest.mark.parametrize("pieces", [1, 2])
async def test_grpc_web_text_is_the_same_in_base64(world: SimpleNamespace, pieces: int) -> None:
    frame = envelope(REQUEST.SerializeToString())
    # Clients may encode a frame's head and body each by itself, padding included.
    cuts = [frame] if pieces == 1 else [frame[:5], frame[5:]]
    body = b"".join(base64.b64encode(cut) for cut in cuts)
    reply = await ask(world.port, OPEN, body, {"content-type": "application/grpc-web-text+proto"})
    assert reply.headers["content-type"].startswith("application/grpc-web-text")
    reply.body = from_text(reply.body)
    assert studio_pb2.OpenImageResponse.FromString(reply.frames()[0][1]).l0 == 5
    garbage = await ask(world.port, OPEN, b"%%%", {"content-type": "application/grpc-web-text+proto"})
    assert garbage.status == 200
    assert b"grpc-status: 3" in from_text(garbage.body)


async def test_a_failure_keeps_its_details(world: SimpleNamespace) -> None:
    reply = await call(world.port, OPEN, picture(b"bad"))
    assert (reply.status, reply.json()["code"]) == (400, "invalid_argument")
    assert reply.json()["message"] == "input.image: is not a picture"
    info, bad = reply.json()["details"]
    assert info["type"] == "google.rpc.ErrorInfo"
    assert error_details_pb2.ErrorInfo.FromString(detail_bytes(info)).reason == "INVALID_FIELD"
    (violation,) = error_details_pb2.BadRequest.FromString(detail_bytes(bad)).field_violations
    assert violation.field == "input.image"

    reply = await call(world.port, OPEN, picture(b"full"))
    assert (reply.status, reply.json()["code"]) == (429, "resource_exhausted")
    retry = error_details_pb2.RetryInfo.FromString(detail_bytes(reply.json()["details"][1]))
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5

    bug = await call(world.port, OPEN, picture(b"bug"), {"x-request-id": "abc"})
    assert (bug.status, bug.json()["message"]) == (500, "internal error; request id abc")


async def test_a_failure_in_the_middle_of_a_stream_is_its_end(world: SimpleNamespace) -> None:
    reply = await ask(world.port, EDIT, envelope(editing(b"bad")), {"content-type": "application/connect+proto"})
    assert len(reply.frames()) == 4
    error = json.loads(reply.frames()[-1][1])["error"]
    assert error["code"] == "invalid_argument"
    assert [detail["type"] for detail in error["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]


async def test_grpc_web_carries_the_whole_status(world: SimpleNamespace) -> None:
    reply = await ask(world.port, EDIT, envelope(editing(b"bad")), {"content-type": "application/grpc-web+proto"})
    lines = dict(line.split(": ", 1) for line in reply.frames()[-1][1].decode().strip().split("\r\n"))
    assert lines["grpc-status"] == "3"
    status = status_pb2.Status.FromString(base64.b64decode(lines["grpc-status-details-bin"] + "=="))
    assert (status.message, len(status.details)) == ("edits[0]: is not an edit", 2)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "application/json", "connect-timeout-ms": "150"}, json.dumps(picture(b"wait")).encode()),
        ({"content-type": "application/grpc-web+proto", "grpc-timeout": "150m"}, envelope(editing(b"wait"))),
    ],
)
async def test_a_deadline_reaches_the_studio(world: SimpleNamespace, headers: dict[str, str], body: bytes) -> None:
    reply = await ask(world.port, OPEN, body, headers)
    assert world.studio.time_left is not None
    assert 0 < world.studio.time_left <= 0.15
    await world.studio.cancelled.wait()
    if "connect-timeout-ms" in headers:
        assert (reply.status, reply.json()["code"]) == (504, "deadline_exceeded")
        info = error_details_pb2.ErrorInfo.FromString(detail_bytes(reply.json()["details"][0]))
        assert info.reason == "DEADLINE_EXCEEDED"
    else:
        assert b"grpc-status: 4" in reply.body or reply.headers.get("grpc-status") == "4"


async def test_request_id_and_access_key_reach_the_studio(world: SimpleNamespace) -> None:
    reply = await call(world.port, OPEN, picture(PARTS), {"x-request-id": "mine-1", "x-faceteer-access": "key"})
    assert (world.studio.seen.request_id, world.studio.seen.access_key) == ("mine-1", "key")
    assert reply.headers["x-request-id"] == "mine-1"
    # What gRPC's metadata cannot hold is as if it had not been sent.
    strange = await call(world.port, OPEN, picture(PARTS), {"x-faceteer-access": "k\u00e9y"})
    assert (strange.status, world.studio.seen.access_key) == (200, "")
    replaced = await call(world.port, OPEN, picture(PARTS), {"x-request-id": "not sane!"})
    assert replaced.headers["x-request-id"] == world.studio.seen.request_id
    assert len(world.studio.seen.request_id) == 16


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the JSON is not a faceteer.v1.OpenImageRequest"),
        (b'{"inptu": {}}', 'no field named "inptu"'),
        (b'{"input": {"image": 3}}', "image"),
        (b"\xff\xfe", "the JSON is not"),
        (b"[" * 100_000, "the JSON is not"),
    ],
)
async def test_wrong_json_is_told_in_words(world: SimpleNamespace, body: bytes, words: str) -> None:
    reply = await ask(world.port, OPEN, body, {"content-type": "application/json"})
    assert (reply.status, reply.json()["code"]) == (400, "invalid_argument")
    assert words in reply.json()["message"]
    assert reply.json()["details"][0]["type"] == "google.rpc.ErrorInfo"


async def test_bytes_that_are_no_message_are_refused_here(world: SimpleNamespace) -> None:
    reply = await ask(world.port, OPEN, b"\xff\xff\xff", {"content-type": "application/proto"})
    assert reply.json()["message"] == "the request is not a faceteer.v1.OpenImageRequest"
    assert world.studio.seen is None


async def test_what_cannot_be_asked_here_says_how_it_can(world: SimpleNamespace) -> None:
    got = await ask(world.port, OPEN, method="GET")
    assert got.status == 405
    assert "by POST" in got.json()["message"]
    unknown = await call(world.port, "/faceteer.v1.StudioService/OpenPicture", {})
    assert unknown.status == 404
    assert "OpenPicture" in unknown.json()["message"]
    grpc = await ask(world.port, OPEN, b"", {"content-type": "application/grpc"})
    assert grpc.status == 415
    assert "50050" in grpc.json()["message"]
    kind = {"content-type": "application/connect+json"}
    both_ways = await ask(world.port, "/faceteer.v1.EncoderService/StreamEncodeImages", envelope(b"{}"), kind)
    error = json.loads(both_ways.frames()[-1][1])["error"]
    assert error["code"] == "unimplemented"
    assert "EncodeImages" in error["message"]


async def test_calls_are_counted_beside_all_other_metrics(world: SimpleNamespace) -> None:
    await call(world.port, OPEN, picture(PARTS))
    await call(world.port, OPEN, picture(b"bad"))
    await ask(world.port, EDIT, envelope(editing(PARTS)), {"content-type": "application/grpc-web+proto"})

    def counted(method: str, protocol: str, code: str) -> float:
        labels = {"service": "faceteer.v1.StudioService", "method": method, "protocol": protocol, "code": code}
        return float(world.metrics.value("faceteer_http_calls_total", **labels))

    assert counted("OpenImage", "connect-json", "OK") == 1
    assert counted("OpenImage", "connect-json", "INVALID_ARGUMENT") == 1
    assert counted("EditImage", "grpc-web-binary", "OK") == 1

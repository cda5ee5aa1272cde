"""The same contract over HTTP, against both ways to run."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import grpc
import pytest
from faceteer.v1 import studio_pb2
from faceteer_gateway.upstream import SERVICES
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2
from http_client import Reply, ask, call, detail_bytes, envelope
from rpc_errors import read_error
from tiny_bundle import picture_bytes

# As in conftest.py.
GATED, KEY = 50, "open-sesame-for-tests"
METHODS = [method for service in SERVICES for method in service.methods if not method.client_streaming]


def port_of(server: SimpleNamespace) -> int:
    return int(server.http.rpartition(":")[2])


def test_all_five_services_are_there() -> None:
    assert {service.name for service in SERVICES} == {
        "StudioService", "EncoderService", "SaeService", "GeneratorService", "LibraryService",
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_empty_call_gets_the_same_answer_as_by_grpc(server: SimpleNamespace, method: MethodDescriptor) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    by_grpc = server.channel.unary_stream(path) if method.server_streaming else server.channel.unary_unary(path)
    try:
        answer = by_grpc(b"", timeout=20)
        list(answer if method.server_streaming else [answer])
        code, reason = "OK", ""
    except grpc.RpcError as error:
        code, reason = error.code().name, read_error(error).reason
    if method.server_streaming:
        kind = {"content-type": "application/connect+json"}
        reply = asyncio.run(ask(port_of(server), path, envelope(b"{}"), kind))
        failed = json.loads(reply.frames()[-1][1]).get("error")
    else:
        reply = asyncio.run(call(port_of(server), path, {}))
        failed = None if reply.status == 200 else reply.json()
    if failed is None:
        assert code == "OK"
    else:
        assert failed["code"].upper() == code
        assert error_details_pb2.ErrorInfo.FromString(detail_bytes(failed["details"][0])).reason == reason


def test_a_picture_is_opened_and_edited_as_by_grpc(server: SimpleNamespace) -> None:
    picture = picture_bytes(3)
    by_grpc = server.studio.OpenImage(studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=picture)))
    source = {"image": base64.b64encode(picture).decode()}
    opened = asyncio.run(call(port_of(server), "/faceteer.v1.StudioService/OpenImage", {"input": source})).json()
    expected = MessageToDict(by_grpc)
    assert opened["embedding"] == expected["embedding"]
    assert opened["features"] == expected["features"]
    index = by_grpc.features[0].index
    edits = [{"feature": {"index": index}, "operation": "EDIT_OPERATION_ABLATE"}]
    request = {"input": source, "edits": edits, "settings": {"steps": 2, "seeds": ["7"]}}
    reply = asyncio.run(
        ask(
            port_of(server),
            "/faceteer.v1.StudioService/EditImage",
            envelope(json.dumps(request).encode()),
            {"content-type": "application/connect+json"},
        )
    )
    *events, (_, end) = reply.frames()
    assert json.loads(end) == {}
    kinds = [next(iter(json.loads(event))) for _, event in events]
    assert (kinds[0], kinds[-1]) == ("edited", "finished")
    assert "image" in kinds


def test_a_gated_feature_needs_the_key_here_too(server: SimpleNamespace) -> None:
    def get(**headers: str) -> Reply:
        path = "/faceteer.v1.LibraryService/GetFeature"
        return asyncio.run(call(port_of(server), path, {"feature": {"index": GATED}}, headers))

    assert get().status == 404
    assert get(**{"x-faceteer-access": KEY}).json()["feature"]["index"] == GATED


def test_health_and_icons_have_addresses(server: SimpleNamespace) -> None:
    health = asyncio.run(ask(port_of(server), "/healthz", method="GET"))
    assert health.json()["status"] == "SERVING"
    assert set(health.json()["parts"].values()) == {"SERVING"}
    icon = asyncio.run(ask(port_of(server), "/icons/3.webp", method="GET"))
    assert icon.status in (200, 404)

"""Failures: every status becomes its own exception, with all that the server said."""

from __future__ import annotations

import pickle
from typing import Any

import faceteer
import grpc
import pytest
from faceteer._transport.status import error_from_call, error_from_status
from unit.sdk.fake_server import FakeServer, Fault, png

BY_STATUS = {
    "CANCELLED": faceteer.CancelledError,
    "UNKNOWN": faceteer.InternalError,
    "INVALID_ARGUMENT": faceteer.InvalidArgumentError,
    "DEADLINE_EXCEEDED": faceteer.DeadlineExceededError,
    "NOT_FOUND": faceteer.NotFoundError,
    "ALREADY_EXISTS": faceteer.AlreadyExistsError,
    "PERMISSION_DENIED": faceteer.PermissionDeniedError,
    "RESOURCE_EXHAUSTED": faceteer.ResourceExhaustedError,
    "FAILED_PRECONDITION": faceteer.FailedPreconditionError,
    "ABORTED": faceteer.AbortedError,
    "OUT_OF_RANGE": faceteer.InvalidArgumentError,
    "UNIMPLEMENTED": faceteer.UnimplementedError,
    "INTERNAL": faceteer.InternalError,
    "UNAVAILABLE": faceteer.UnavailableError,
    "DATA_LOSS": faceteer.InternalError,
    "UNAUTHENTICATED": faceteer.UnauthenticatedError,
}
BY_REASON = [
    ("INVALID_ARGUMENT", "UNREADABLE_IMAGE", faceteer.UnreadableImageError),
    ("INVALID_ARGUMENT", "IMAGE_TOO_LARGE", faceteer.ImageTooLargeError),
    ("INVALID_ARGUMENT", "BATCH_TOO_LARGE", faceteer.BatchTooLargeError),
    ("NOT_FOUND", "EMBEDDING_EXPIRED", faceteer.EmbeddingExpiredError),
    ("NOT_FOUND", "UNKNOWN_FEATURE", faceteer.UnknownFeatureError),
    ("NOT_FOUND", "ICON_NOT_MADE", faceteer.IconNotMadeError),
    ("FAILED_PRECONDITION", "REVISION_MISMATCH", faceteer.RevisionMismatchError),
    ("FAILED_PRECONDITION", "NOT_IN_BUNDLE", faceteer.NotInBundleError),
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL", faceteer.QueueFullError),
    ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", faceteer.MessageTooLargeError),
    ("INTERNAL", "INTERNAL", faceteer.InternalError),
]


def test_every_grpc_status_but_ok_has_an_exception() -> None:
    assert set(BY_STATUS) == {code.name for code in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize("status", sorted(set(BY_STATUS) - {"UNAVAILABLE"}))
@pytest.mark.parametrize("plain", [False, True])
def test_each_status_raises_its_exception_whether_or_not_details_came(
    either: Any, server: FakeServer, status: str, plain: bool
) -> None:
    server.fail("GetStudio", Fault(status, plain=plain))
    with pytest.raises(faceteer.FaceteerError) as raised:
        either.status()
    assert type(raised.value) is BY_STATUS[status]
    assert raised.value.status == status
    assert server.names().count("GetStudio") == 1, "nothing of this is tried again"


@pytest.mark.parametrize(("status", "reason", "kind"), BY_REASON)
def test_each_reason_raises_its_exception(
    client: faceteer.Client, server: FakeServer, status: str, reason: str, kind: type
) -> None:
    server.fail("GetStudio", Fault(status, reason))
    with pytest.raises(faceteer.FaceteerError) as raised:
        client.status()
    assert type(raised.value) is kind
    assert raised.value.reason == reason
    assert raised.value.request_id == "request-1"


def test_a_reason_from_the_future_or_at_odds_with_the_status_does_not_change_how_a_failure_is_caught() -> None:
    future = error_from_status(Fault("NOT_FOUND", "SOMETHING_NEW").status())
    assert type(future) is faceteer.NotFoundError
    odd = error_from_status(Fault("INTERNAL", "UNKNOWN_FEATURE").status())
    assert type(odd) is faceteer.InternalError


def test_a_bad_field_is_named_with_the_fix(client: faceteer.Client, server: FakeServer) -> None:
    server.fail("OpenImage", Fault("INVALID_ARGUMENT", "INVALID_FIELD", "pass a whole file", field="input.image"))
    with pytest.raises(faceteer.InvalidArgumentError) as raised:
        client.open(png(1))
    assert raised.value.field == "input.image"
    assert raised.value.description == "pass a whole file"
    assert isinstance(raised.value, ValueError)


def test_an_unknown_feature_names_the_nearest(either: Any) -> None:
    with pytest.raises(faceteer.UnknownFeatureError, match="nearest: night, snow") as raised:
        either.features["nigth"]
    assert raised.value.nearest == ("night", "snow")
    assert isinstance(raised.value, LookupError)


def test_an_address_where_nothing_answers_is_named_with_how_to_start_a_server() -> None:
    with (
        faceteer.connect("127.0.0.1:1", retries=0) as client,
        pytest.raises(faceteer.ServerUnreachableError, match=r"127\.0\.0\.1:1.*make up") as raised,
    ):
        client.status()
    assert raised.value.address == "127.0.0.1:1"
    assert isinstance(raised.value, ConnectionError)
    assert isinstance(raised.value, faceteer.UnavailableError)


def test_a_passed_deadline_says_how_long_it_was(either: Any, server: FakeServer) -> None:
    server.answer_seconds = 1.0
    with pytest.raises(faceteer.DeadlineExceededError, match=r"0\.1 s") as raised:
        either.status(timeout=0.1)
    assert isinstance(raised.value, TimeoutError)


def test_calls_of_a_closed_client_say_so(either: Any) -> None:
    either.close()
    with pytest.raises(faceteer.CancelledError, match="closed"):
        either.status()


@pytest.mark.parametrize("address", ["", "http://localhost:50050", "localhost", ":50050", "a b:1", "localhost:123456"])
def test_an_address_that_is_none_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="localhost:50050") as raised:
        faceteer.connect(address)
    assert raised.value.field == "address"


@pytest.mark.parametrize("address", ["localhost:50050", "10.0.0.1:1", "[::1]:80", "unix:///tmp/f.sock", "dns:///a.b:1"])
def test_addresses_of_all_kinds_are_taken(address: str) -> None:
    with faceteer.connect(address) as client:
        assert client.address == address


def test_the_address_comes_from_the_environment_and_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_ADDRESS", "elsewhere:1234")
    assert faceteer.connect().address == "elsewhere:1234"
    monkeypatch.delenv("FACETEER_ADDRESS")
    assert faceteer.connect().address == "localhost:50050"


def test_metadata_travels_with_every_call(server: FakeServer) -> None:
    with faceteer.connect(server.address, metadata={"Authorization": "Bearer x"}) as client:
        client.status()
    assert server.metadata["authorization"] == "Bearer x"


def test_broken_details_are_no_second_failure() -> None:
    error = error_from_call(
        "NOT_FOUND", "gone", [("grpc-status-details-bin", b"\xff\xff")], address="a:1", timeout=None
    )
    assert type(error) is faceteer.NotFoundError
    assert error.message == "gone"


def test_details_at_odds_with_the_status_are_left_alone() -> None:
    packed = Fault("NOT_FOUND", "UNKNOWN_FEATURE").status().SerializeToString()
    error = error_from_call("INTERNAL", "proxy", [("grpc-status-details-bin", packed)], address="a:1", timeout=None)
    assert type(error) is faceteer.InternalError


def test_a_message_too_large_for_the_server_is_told_apart_from_a_full_queue() -> None:
    words = "CLIENT: Received message larger than max (5 vs. 4)"
    error = error_from_call("RESOURCE_EXHAUSTED", words, (), address="a:1", timeout=None)
    assert type(error) is faceteer.MessageTooLargeError


def test_errors_survive_pickling_with_their_message() -> None:
    error = pickle.loads(pickle.dumps(faceteer.NotFoundError("gone")))
    assert str(error) == "gone"

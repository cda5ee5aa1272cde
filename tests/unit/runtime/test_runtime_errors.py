"""Errors and their statuses."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import grpc
import pytest
from faceteer.v1 import errors_pb2
from faceteer_runtime import errors
from faceteer_runtime.request import enter_request
from faceteer_runtime.status import DOMAIN, error_to_status, status_code
from google.rpc import code_pb2, error_details_pb2

EXAMPLES = [
    errors.InvalidField("settings.steps", "must be 1 to 100"),
    errors.UnreadableImage("images[3]", "not a picture"),
    errors.ImageTooLarge("images[0]", "100,000 x 100,000 pixels are more than 40,000,000"),
    errors.BatchTooLarge("images", 300, 256),
    errors.EmbeddingExpired("abc-123"),
    errors.UnknownFeature("no feature is called 'nihgt'", ["night", "light"]),
    errors.IconNotMade(7),
    errors.RevisionMismatch("sae", "aaaa", "bbbb"),
    errors.NotInBundle("prior", "this bundle has no prior"),
    errors.NoiseExpired("abc-123"),
    errors.NotPermitted("safety class 'violence' needs an access key"),
    errors.QueueFull(0.25),
    errors.MessageTooLarge(10, 5),
    errors.Starting(),
    errors.Draining(),
    errors.UpstreamUnavailable("encoder", "connection refused"),
    errors.DeadlineExceeded("generator"),
]


def details(status, kind):
    found = [kind() for any_message in status.details if any_message.Is(kind.DESCRIPTOR)]
    for message, any_message in zip(found, [d for d in status.details if d.Is(kind.DESCRIPTOR)], strict=True):
        any_message.Unpack(message)
    return found


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_becomes_a_status_with_a_reason_of_the_contract(error: errors.FaceteerError) -> None:
    status = error_to_status(error)
    (info,) = details(status, error_details_pb2.ErrorInfo)
    assert info.domain == DOMAIN == "faceteer"
    assert f"ERROR_REASON_{info.reason}" in errors_pb2.ErrorReason.keys()  # noqa: SIM118 (not a dict)
    assert status_code(status) is grpc.StatusCode[error.status]
    assert status.message == error.message
    assert dict(info.metadata) == error.metadata


def test_every_reason_of_the_contract_has_an_error() -> None:
    ours = {f"ERROR_REASON_{error.reason}" for error in EXAMPLES} | {"ERROR_REASON_INTERNAL"}
    assert ours == set(errors_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_the_status_of_each_error_is_the_one_that_the_contract_documents() -> None:
    # "ERROR_REASON_X = n" follows a comment that begins with the status.
    proto = Path(__file__).parents[3] / "protos" / "faceteer" / "v1" / "errors.proto"
    documented = {}
    comment = ""
    for line in proto.read_text().splitlines():
        text = line.strip()
        if text.startswith("//"):
            comment += text[2:].strip() + " "
        else:
            if text.startswith("ERROR_REASON_"):
                documented[text.split()[0].removeprefix("ERROR_REASON_")] = comment.partition(":")[0]
            comment = ""
    for error in EXAMPLES:
        assert documented[error.reason] == error.status


def test_a_field_at_fault_is_named_in_bad_request() -> None:
    status = error_to_status(errors.InvalidField("embeds.data", "every value must be finite"))
    (bad,) = details(status, error_details_pb2.BadRequest)
    (violation,) = bad.field_violations
    assert (violation.field, violation.description) == ("embeds.data", "every value must be finite")


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_tells_of_another_field_by_a_new_error(error: errors.FaceteerError) -> None:
    before = dict(vars(error))
    moved = error.at("edits[3]")
    assert vars(error) == before
    assert moved is not error
    assert type(moved) is type(error)
    same = ("status", "reason", "description", "metadata", "retry_after_s")
    assert [getattr(moved, name) for name in same] == [getattr(error, name) for name in same]
    assert moved.field == "edits[3]"
    assert str(moved) == moved.message
    (violation,) = details(error_to_status(moved), error_details_pb2.BadRequest)[0].field_violations
    assert violation.field == "edits[3]"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_does_not_change_once_it_is_made(error: errors.FaceteerError) -> None:
    for one in (error, error.at("x")):
        for name in (*vars(one), "another"):
            with pytest.raises(AttributeError, match="does not change"):
                setattr(one, name, None)
        with pytest.raises(TypeError):
            one.metadata["more"] = "words"  # type: ignore[index]
    with pytest.raises(type(error)) as raised:
        raise error from ValueError("a cause")
    raised.value.add_note("notes and tracebacks are Python's own")


def test_an_error_that_another_process_made_keeps_its_status_and_reason() -> None:
    error = errors.FaceteerError("words", status="NOT_FOUND", reason="UNKNOWN_FEATURE").at("x")
    assert (error.status, error.reason) == ("NOT_FOUND", "UNKNOWN_FEATURE")
    assert (errors.FaceteerError.status, errors.FaceteerError.reason) == ("INTERNAL", "INTERNAL")


def test_a_message_that_begins_with_its_field_begins_with_the_new_one() -> None:
    assert errors.InvalidField("images[0]", "is empty").at("input.image").message == "input.image: is empty"
    assert errors.UnknownFeature("no feature 9").at("edits[3]").message == "no feature 9"
    assert errors.MessageTooLarge(2, 1, field="image").at("input").message.startswith("a message of 2 bytes")


def test_where_waiting_helps_retry_info_says_how_long() -> None:
    (retry,) = details(error_to_status(errors.QueueFull(0.25)), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 0.25
    assert details(error_to_status(errors.IconNotMade(1)), error_details_pb2.RetryInfo) == []


def test_the_nearest_labels_travel_as_metadata() -> None:
    (info,) = details(
        error_to_status(errors.UnknownFeature("no 'nihgt'", ["night", "light"])), error_details_pb2.ErrorInfo
    )
    assert info.metadata["nearest"] == "night, light"


def test_text_of_an_unexpected_exception_stays_inside_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = error_to_status(RuntimeError("password=hunter2"), "id-1")
    assert status.code == code_pb2.INTERNAL
    assert b"hunter2" not in status.SerializeToString()
    assert "id-1" in status.message
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "hunter2" in str(record.exc_info[1])


async def test_an_items_error_carries_the_current_request_id() -> None:
    enter_request("request-9", "/x/Y")
    (info,) = details(error_to_status(ValueError("x")), error_details_pb2.ErrorInfo)
    assert info.metadata["request_id"] == "request-9"


def test_the_errors_module_knows_no_grpc() -> None:
    tree = ast.parse(Path(errors.__file__).read_text())
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert not [name for name in imported if name and name.startswith(("grpc", "google"))]

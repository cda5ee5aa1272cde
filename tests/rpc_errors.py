"""Reads a failed call's google.rpc.Status, or an item's ItemError, independently of the SDK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from faceteer.v1 import errors_pb2
from google.rpc import error_details_pb2, status_pb2


@dataclass
class Failure:
    """What a call failed with."""

    code: str = ""
    message: str = ""
    reason: str = ""
    fields: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None


def read_status(status: status_pb2.Status) -> Failure:
    """A Status as a Failure."""
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    failure = Failure(code=names[status.code], message=status.message)
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "faceteer"
            failure.reason, failure.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            failure.fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            failure.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return failure


def read_item(item: errors_pb2.ItemError) -> Failure:
    """One item's error as a Failure."""
    return Failure(
        code=next(code.name for code in grpc.StatusCode if code.value[0] == item.code),
        message=item.message,
        reason=item.reason,
        fields=[item.field] if item.field else [],
        metadata=dict(item.metadata),
        retry_after=item.retry_delay.ToNanoseconds() / 1e9 if item.HasField("retry_delay") else None,
    )


def read_error(error: grpc.RpcError) -> Failure:
    """A failed call as a Failure; asserts that it carries a Status."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    assert details is not None, f"no status details: {error.code()} {error.details()}"
    return read_status(status_pb2.Status.FromString(details))


@contextmanager
def fails(code: str, reason: str, field: str | None = None) -> Iterator[Failure]:
    """Expects the block's call to fail so; yields the Failure, filled in afterwards."""
    failure = Failure()
    with pytest.raises(grpc.RpcError) as caught:
        yield failure
    failure.__dict__.update(read_error(caught.value).__dict__)
    assert (failure.code, failure.reason) == (code, reason), failure
    if field is not None:
        assert field in failure.fields, failure
    assert failure.message

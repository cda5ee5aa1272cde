"""A child call's failure as ours: status, reason and details kept, the field at fault renamed to our own request's."""

from __future__ import annotations

from collections.abc import Mapping

import grpc.aio
from faceteer.v1 import errors_pb2
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.upstream import status_of
from google.rpc import code_pb2, error_details_pb2, status_pb2

Fields = Mapping[str, str]
"""Fields of a child's request, and the fields of ours that fill them: {"images[0]": "input.image"}."""


def from_status(status: status_pb2.Status) -> FaceteerError:
    """The failure that another service has described: of a whole call."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            detail.Unpack(message)
    violation = bad.field_violations[0] if bad.field_violations else None
    code = code_pb2.Code.Name(status.code)
    return FaceteerError(
        status.message,
        field=violation.field if violation else None,
        description=violation.description if violation else None,
        metadata=info.metadata,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        status=code,
        reason=info.reason or code,
    )


def from_item(item: errors_pb2.ItemError) -> FaceteerError:
    """The same of one item of its answer."""
    return FaceteerError(
        item.message,
        field=item.field or None,
        description=item.description if item.field else None,
        metadata=item.metadata,
        retry_after_s=item.retry_delay.ToTimedelta().total_seconds() if item.HasField("retry_delay") else None,
        status=code_pb2.Code.Name(item.code),
        reason=item.reason,
    )


def from_rpc_error(error: grpc.aio.AioRpcError, service: str) -> FaceteerError:
    """What a failed call to ``service`` means for our caller."""
    return from_status(status_of(error, service))


def at_our_field(error: FaceteerError, fields: Fields) -> FaceteerError:
    """The same failure with the beginning of its field renamed; the longest match wins."""
    if error.field is not None:
        for theirs in sorted(fields, key=len, reverse=True):
            if error.field == theirs or error.field.startswith((f"{theirs}.", f"{theirs}[")):
                return error.at(fields[theirs] + error.field.removeprefix(theirs))
    return error

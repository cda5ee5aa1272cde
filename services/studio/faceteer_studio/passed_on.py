"""A child call's failure as ours: status, reason, details and all, with its field in our own request's words.

Knows nothing of which job the child call was part of.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
import grpc.aio
from faceteer_runtime.errors import FaceteerError, UpstreamUnavailable
from faceteer_runtime.status import DETAILS_KEY
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2


class PassedOn(FaceteerError):
    """A failure that another service has put into words already."""

    def __init__(self, status: status_pb2.Status) -> None:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for detail in status.details:
            for message in (info, bad, retry):
                detail.Unpack(message)
        violation = bad.field_violations[0] if bad.field_violations else None
        delay = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
        super().__init__(
            status.message,
            field=violation.field if violation else None,
            metadata=dict(info.metadata),
            retry_after_s=delay,
        )
        self.status = code_pb2.Code.Name(status.code)
        self.reason = info.reason or self.status
        self.description = violation.description if violation else status.message


def from_rpc_error(error: grpc.aio.AioRpcError, service: str) -> FaceteerError:
    """What a failed call to ``service`` means for our caller."""
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    if isinstance(details, bytes):
        try:
            return PassedOn(status_pb2.Status.FromString(details))
        except DecodeError:
            pass
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return UpstreamUnavailable(service, f"cannot be reached ({text})" if text else "cannot be reached", 1.0)
    return PassedOn(status_pb2.Status(code=code.value[0], message=text or f"{service} failed"))


def in_words_of(error: FaceteerError, fields: Mapping[str, str]) -> FaceteerError:
    """Renames the beginning of the field at fault: {"images[0]": "input.image"}. The longest match wins."""
    if error.field is None:
        return error
    for ours in sorted(fields, key=len, reverse=True):
        if error.field == ours or error.field.startswith((ours + ".", ours + "[")):
            renamed = fields[ours] + error.field.removeprefix(ours)
            error.message = error.message.replace(error.field, renamed, 1)
            error.field = renamed
            break
    return error

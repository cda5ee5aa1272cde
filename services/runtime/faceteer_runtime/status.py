"""Errors as ``google.rpc.Status``: the one form in which failures leave a process, of calls and of items.

The text of exceptions that are not ours never leaves the process.
"""

from __future__ import annotations

import logging

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.request import request_context

DOMAIN = "faceteer"
DETAILS_KEY = "grpc-status-details-bin"

_log = logging.getLogger(__name__)


def error_to_status(error: BaseException, request_id: str | None = None) -> status_pb2.Status:
    """Maps an error to a status with ErrorInfo, BadRequest (a field at fault) and RetryInfo (waiting helps).

    A :class:`FaceteerError` speaks for itself. Anything else becomes INTERNAL with the request id (by default the
    current request's) and is logged with its traceback.
    """
    if request_id is None:
        request_id = request_context().request_id
    if not isinstance(error, FaceteerError):
        _log.error("unexpected %s", type(error).__name__, exc_info=error, extra={"request_id": request_id})
        error = FaceteerError(f"internal error; request id {request_id}", metadata={"request_id": request_id})
    details: list[AnyMessage] = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata)))
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.description, reason=error.reason
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, int(error.retry_after_s * 1e9)))
        details.append(_packed(retry))
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message, details=details)


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The ``grpc.StatusCode`` of a status."""
    return _CODES[status.code]


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed

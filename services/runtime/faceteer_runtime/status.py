"""Errors as they leave a process: of a call as ``google.rpc.Status``, of one item of a batch as ``ItemError``.

The text of exceptions that are not ours never leaves the process.
"""

from __future__ import annotations

import logging

import grpc
from faceteer.v1 import errors_pb2
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

    A :class:`FaceteerError` is sent as it is. Anything else becomes INTERNAL with the request id (by default the
    current request's) and is logged with its traceback.
    """
    error = _for_callers(error, request_id)
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
        retry.retry_delay.FromNanoseconds(_nanoseconds(error.retry_after_s))
        details.append(_packed(retry))
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message, details=details)


def error_to_item(error: BaseException) -> errors_pb2.ItemError:
    """The same for one item of a batch."""
    error = _for_callers(error, None)
    item = errors_pb2.ItemError(
        code=code_pb2.Code.Value(error.status),
        message=error.message,
        reason=error.reason,
        field=error.field or "",
        description=error.description if error.field is not None else "",
        metadata=dict(error.metadata),
    )
    if error.retry_after_s is not None:
        item.retry_delay.FromNanoseconds(_nanoseconds(error.retry_after_s))
    return item


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The ``grpc.StatusCode`` of a status."""
    return _CODES[status.code]


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _for_callers(error: BaseException, request_id: str | None) -> FaceteerError:
    if isinstance(error, FaceteerError):
        return error
    if request_id is None:
        request_id = request_context().request_id
    _log.error("unexpected %s", type(error).__name__, exc_info=error, extra={"request_id": request_id})
    return FaceteerError(f"internal error; request id {request_id}", metadata={"request_id": request_id})


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed

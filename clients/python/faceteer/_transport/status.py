"""A failed call, as ``google.rpc.Status``, or item, as ``ItemError``, to the one exception that fits it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from faceteer import _errors as errors
from faceteer.v1 import errors_pb2

DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

_BY_REASON: dict[str, type[errors.FaceteerError]] = {
    "INVALID_FIELD": errors.InvalidArgumentError,
    "UNREADABLE_IMAGE": errors.UnreadableImageError,
    "IMAGE_TOO_LARGE": errors.ImageTooLargeError,
    "BATCH_TOO_LARGE": errors.BatchTooLargeError,
    "EMBEDDING_EXPIRED": errors.EmbeddingExpiredError,
    "UNKNOWN_FEATURE": errors.UnknownFeatureError,
    "ICON_NOT_MADE": errors.IconNotMadeError,
    "NOISE_EXPIRED": errors.NoiseExpiredError,
    "NOT_PERMITTED": errors.PermissionDeniedError,
    "REVISION_MISMATCH": errors.RevisionMismatchError,
    "NOT_IN_BUNDLE": errors.NotInBundleError,
    "QUEUE_FULL": errors.QueueFullError,
    "MESSAGE_TOO_LARGE": errors.MessageTooLargeError,
    "INTERNAL": errors.InternalError,
}
_BY_STATUS: dict[str, type[errors.FaceteerError]] = {
    "INVALID_ARGUMENT": errors.InvalidArgumentError,
    "OUT_OF_RANGE": errors.InvalidArgumentError,
    "NOT_FOUND": errors.NotFoundError,
    "FAILED_PRECONDITION": errors.FailedPreconditionError,
    "RESOURCE_EXHAUSTED": errors.ResourceExhaustedError,
    "UNAVAILABLE": errors.UnavailableError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "CANCELLED": errors.CancelledError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
    "UNIMPLEMENTED": errors.UnimplementedError,
    "ALREADY_EXISTS": errors.AlreadyExistsError,
    "ABORTED": errors.AbortedError,
    "INTERNAL": errors.InternalError,
    "UNKNOWN": errors.InternalError,
    "DATA_LOSS": errors.InternalError,
}
# How gRPC's core describes a connection that was never established.
_NEVER_CONNECTED = (
    "failed to connect",
    "Failed to connect",
    "DNS resolution failed",
    "Name resolution",
    "empty address",
)


@dataclass
class _Details:
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_path: str = ""
    description: str = ""
    retry_after: float | None = None


def error_from_status(status: status_pb2.Status, *, request_id: str = "", address: str = "") -> errors.FaceteerError:
    """The exception for a failed call's ``google.rpc.Status``."""
    return _build(_code(status.code), status.message, _read(status), request_id, address)


def error_from_item(item: errors_pb2.ItemError, *, address: str) -> errors.FaceteerError:
    """The exception for one item of a batch."""
    details = _Details(
        reason=item.reason,
        metadata=dict(item.metadata),
        field_path=item.field,
        description=item.description,
        retry_after=item.retry_delay.ToNanoseconds() / 1e9 if item.HasField("retry_delay") else None,
    )
    return _build(_code(item.code), item.message, details, "", address)


def error_from_rpc(error: Any, *, address: str, timeout: float | None) -> errors.FaceteerError:
    """The exception for a ``grpc.RpcError`` of either kind of channel."""
    details, trailing = error.details() or "", error.trailing_metadata()
    return error_from_call(error.code().name, details, trailing, address=address, timeout=timeout)


def error_from_call(
    code: str, message: str, trailing: Iterable[tuple[str, str | bytes]] | None, *, address: str, timeout: float | None
) -> errors.FaceteerError:
    """The exception for a failed call.

    Args:
        code: the ``grpc.StatusCode``'s name.
        message: the status' details.
        trailing: the trailing metadata, in which a server of ours sends a whole ``google.rpc.Status``.
        address: where the call went.
        timeout: the deadline the call had, in seconds.
    """
    metadata = dict(trailing or ())
    request_id = str(metadata.get(REQUEST_ID_KEY, ""))
    packed = metadata.get(DETAILS_KEY)
    if isinstance(packed, bytes):
        try:
            status = status_pb2.Status.FromString(packed)
        except DecodeError:
            status = None
        # The gRPC status is the truth; a proxy may have replaced it and left the details.
        if status is not None and code_pb2.Code.Name(status.code) == code:
            return error_from_status(status, request_id=request_id, address=address)
    if code == "UNAVAILABLE":
        if not any(words in message for words in _NEVER_CONNECTED):
            return errors.ServerUnreachableError(f"the connection to {address} was lost ({message})", address=address)
        return errors.ServerUnreachableError(
            f"no Faceteer server answers at {address}; start one with `make up` (or `python -m faceteer_studio "
            f"--all-in-one --listen {address}`), or name another address",
            address=address,
        )
    if code == "DEADLINE_EXCEEDED":
        after = f" of {timeout:.3g} s" if timeout is not None else ""
        return errors.DeadlineExceededError(f"{address} did not finish within the deadline{after}; raise timeout=")
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in message:
        return errors.MessageTooLargeError(message, reason="MESSAGE_TOO_LARGE", request_id=request_id)
    if code == "UNIMPLEMENTED":
        message = f"the server at {address} does not serve this call; is it Faceteer, and this version? ({message})"
    return _build(code, message, _Details(), request_id, address)


def _code(number: int) -> str:
    return code_pb2.Code.Name(number) if number in code_pb2.Code.values() else "UNKNOWN"


def _read(status: status_pb2.Status) -> _Details:
    details = _Details()
    for packed in status.details:
        info, bad_request, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            details.reason, details.metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad_request) and bad_request.field_violations:
            violation = bad_request.field_violations[0]
            details.field_path, details.description = violation.field, violation.description
        elif packed.Unpack(retry):
            details.retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return details


def _build(code: str, message: str, details: _Details, request_id: str, address: str) -> errors.FaceteerError:
    kind = _BY_STATUS.get(code, errors.FaceteerError)
    exact = _BY_REASON.get(details.reason)
    # A reason from a newer server, or one at odds with the status, must not change how the failure is caught.
    if exact is not None and issubclass(exact, kind):
        kind = exact
    message = message or details.description or f"{code.lower().replace('_', ' ')} (no message from {address})"
    given: dict[str, Any] = {
        "status": code,
        "reason": details.reason,
        "metadata": details.metadata,
        "request_id": request_id,
    }
    if issubclass(kind, errors.InvalidArgumentError):
        return kind(message, field=details.field_path, description=details.description, **given)
    if issubclass(kind, errors.ResourceExhaustedError | errors.UnavailableError):
        return kind(message, retry_after=details.retry_after, **given)
    return kind(message, **given)

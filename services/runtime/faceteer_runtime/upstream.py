"""What holds for every call from one service of ours to another: the channel's options, and how a failure is read."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from faceteer_runtime.errors import UpstreamUnavailable
from faceteer_runtime.status import DETAILS_KEY, error_to_status

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # A service that restarts is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def status_of(error: grpc.aio.AioRpcError, service: str) -> status_pb2.Status:
    """A failed call to ``service`` with the details that it gave; where nobody answered, those of
    :class:`UpstreamUnavailable`."""
    metadata: Any = error.trailing_metadata() or ()
    details = dict(metadata).get(DETAILS_KEY)
    if isinstance(details, bytes):
        try:
            return status_pb2.Status.FromString(details)
        except DecodeError:
            pass
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        why = f"cannot be reached ({text})" if text else "cannot be reached"
        return error_to_status(UpstreamUnavailable(service, why, 1.0))
    return status_pb2.Status(code=code.value[0], message=text or f"{service} failed")

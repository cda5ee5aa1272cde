"""The fake server's world: its pictures, its "encoder", its labels, and the ways in which an answer can fail.

Knows nothing of the SDK or of services.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from faceteer.v1 import errors_pb2
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from PIL import Image

D = 512
P99 = 2.0
LABELS = {3: "night", 4: "day", 5: "snow", 7: "red", 12: "fog", 13: "[bold]odd & <b>label</b>"}
RIVALS = {3: [4, 15], 4: [3]}
REVISIONS = {"encoder": "enc0", "sae": "sae0", "generator": "gen0", "library": "lib0"}
MAX_BATCH = 4


def png(*brightness: int, size: int = 16) -> bytes:
    """A PNG whose 4 x 4 tiles have these brightnesses, 0 to 255, row by row; the rest are black."""
    tiles = np.zeros(16, np.uint8)
    tiles[: len(brightness)] = brightness
    pixels = np.kron(tiles.reshape(4, 4), np.ones((size // 4, size // 4), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def embeds_of(data: bytes) -> np.ndarray:
    """The fake encoder: float32 [512]."""
    image = Image.open(io.BytesIO(data)).convert("L")
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST), np.float32) / 255
    x = np.zeros(D, np.float32)
    x[:16] = pixels.reshape(4, 4, 4, 4).mean((1, 3)).reshape(16)
    return x


@dataclass
class Fault:
    """One answer that fails. ``after`` messages of a stream come first; one that "fails" with OK just ends there."""

    code: str = "UNAVAILABLE"
    reason: str = ""
    message: str = "as the test asked"
    field: str = ""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    retry_after: float | None = None
    after: int = 0
    plain: bool = False  # without google.rpc.Status, as a proxy or gRPC itself fails

    def status(self) -> status_pb2.Status:
        details = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain="faceteer", metadata=self.metadata)
            details.append(_packed(info))
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
            details.append(_packed(retry))
        return status_pb2.Status(code=code_pb2.Code.Value(self.code), message=self.message, details=details)

    def item(self) -> errors_pb2.ItemError:
        item = errors_pb2.ItemError(
            code=code_pb2.Code.Value(self.code),
            message=self.message,
            reason=self.reason,
            field=self.field,
            description=self.message if self.field else "",
            metadata=self.metadata,
        )
        if self.retry_after is not None:
            item.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
        return item


class Failure(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class Failing:
    """Turns a failure into the call's status."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if not isinstance(error, Failure):
            return
        trailing: list[tuple[str, Any]] = [("x-request-id", "request-1")]
        if not error.fault.plain:
            trailing.append(("grpc-status-details-bin", error.fault.status().SerializeToString()))
        self._context.set_trailing_metadata(tuple(trailing))
        self._context.abort(grpc.StatusCode[error.fault.code], error.fault.message)


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed

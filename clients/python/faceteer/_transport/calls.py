"""What both kinds of channel do alike: the calls by name, and gRPC's errors as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faceteer._errors import CancelledError, FaceteerError
from faceteer._transport.channels import Endpoint
from faceteer._transport.methods import Method
from faceteer._transport.status import error_from_rpc

#: What a source of items or requests gives when there are no more.
END: Any = type("End", (), {"__repr__": lambda self: "END"})()


class Calls:
    """The calls of one channel, which ``make`` gives at the first one: an asyncio channel belongs to a running loop."""

    def __init__(self, endpoint: Endpoint, make: Callable[[], Any]) -> None:
        self._endpoint = endpoint
        self._make = make
        self._channel: Any = None
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}
        self._closed = False

    def check_open(self) -> None:
        """Raises CancelledError when the client was closed."""
        if self._closed:
            raise CancelledError("the client is closed")

    def start(self, kind: str, method: Method[Any], request: Any, timeout: float | None) -> Any:
        """Starts a call; ``kind`` is gRPC's word for it. Gives what gRPC gives, and raises its errors."""
        self.check_open()
        if self._channel is None:
            self._channel = self._make()
        call = self._calls.get((kind, method.path))
        if call is None:
            call = self._calls[kind, method.path] = method.bound_to(self._channel, kind)
        return call(request, timeout=timeout, metadata=self._endpoint.metadata)

    def translated(self, error: Any, timeout: float | None) -> FaceteerError:
        """gRPC's error as ours."""
        if self._closed:
            return CancelledError("the client was closed during the call")
        return error_from_rpc(error, address=self._endpoint.address, timeout=timeout)

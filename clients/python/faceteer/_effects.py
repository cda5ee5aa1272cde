"""What an operation may ask of the world: the whole vocabulary between the sans-IO core and its two drivers.

Knows nothing of how it is done. An operation is a generator that yields effects, is sent their results (or thrown
their errors) and returns its value; :mod:`faceteer._sync_driver` and :mod:`faceteer._async_driver` run it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from faceteer._methods import Method

T = TypeVar("T")

#: Sent in answer to Receive when the server has closed the stream, and to Next when the source is exhausted.
END: Any = type("End", (), {"__repr__": lambda self: "END"})()


@dataclass(frozen=True)
class Unary:
    """One request, one response. Result: the response. Errors: FaceteerError."""

    method: Method[Any]
    request: Message
    timeout: float | None


@dataclass(frozen=True)
class OpenStream:
    """Opens a stream of responses, with one request or (``request`` None) a stream of them. Result: a handle."""

    method: Method[Any]
    request: Message | None
    timeout: float | None


@dataclass(frozen=True)
class Receive:
    """Result: the stream's next message, or END. Errors: FaceteerError."""

    stream: Any


@dataclass(frozen=True)
class Write:
    """Queues a message for the stream; never blocks, so the core bounds what is under way. Result: None."""

    stream: Any
    message: Message


@dataclass(frozen=True)
class DoneWriting:
    """Says that no further Write comes. Result: None."""

    stream: Any


@dataclass(frozen=True)
class Close:
    """Cancels the stream. Result: None. A driver closes what an operation left open."""

    stream: Any


@dataclass(frozen=True)
class Sleep:
    """Waits. Result: None."""

    seconds: float


@dataclass(frozen=True)
class Next:
    """Result: the next item of an iterator (for the async driver also an async one), or END."""

    source: Any


@dataclass(frozen=True)
class Work:
    """Runs a blocking function: reading a file, decoding a picture. Result: its value."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Tell:
    """Calls the user's callback; the async driver awaits what it returns when that is awaitable. Result: None."""

    callback: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Emit:
    """Hands a value to whoever iterates over the operation. Result: None."""

    value: Any


Effect: TypeAlias = Unary | OpenStream | Receive | Write | DoneWriting | Close | Sleep | Next | Work | Tell | Emit
Operation: TypeAlias = Generator[Effect, Any, T]

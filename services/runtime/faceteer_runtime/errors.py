"""Every way a request can fail, each with its own status, reason and words for the caller.

Domain code raises these, so this module needs no gRPC: ``status`` and ``reason`` are names, which
:mod:`faceteer_runtime.status` turns into a ``google.rpc.Status``; one interceptor maps them.

The life of a request, and what can be raised at each step::

    admitted ....... Starting, Draining, MessageTooLarge
    read ........... InvalidField, UnreadableImage, ImageTooLarge, BatchTooLarge
    looked up ...... EmbeddingExpired, NoiseExpired, UnknownFeature, IconNotMade, RevisionMismatch, NotInBundle
    queued, run .... QueueFull
    called others .. UpstreamUnavailable, DeadlineExceeded
    anything else .. INTERNAL, without the exception's text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Self

# 64 for a revision, 64 for a digest, and the dash between them.
_LONGEST_ID = 129


class FaceteerError(Exception):
    """A failure whose text is meant for the caller. It does not change once it is made.

    Attributes:
        status: name of a ``grpc.StatusCode``; by default the class's.
        reason: name of a ``faceteer.v1.ErrorReason`` without ``ERROR_REASON_``; by default the class's.
        message: one sentence for people.
        field: the request's field at fault, as a path ("images[3]"), or None; :meth:`at` tells another one.
        description: what is wrong with the field, without its name.
        metadata: for programs; ends in ``ErrorInfo.metadata``.
        retry_after_s: seconds after which trying again may help, or None.
    """

    status: str = "INTERNAL"
    reason: str = "INTERNAL"
    message: str
    field: str | None
    description: str
    metadata: Mapping[str, str]
    retry_after_s: float | None

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        status: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        # Past __setattr__, which lets nothing change afterwards.
        self.__dict__.update(
            message=message,
            field=field,
            description=message if description is None else description,
            metadata=MappingProxyType(dict(metadata or {})),
            retry_after_s=retry_after_s,
            status=status or type(self).status,
            reason=reason or type(self).reason,
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Two calls may be waiting for the same work, and then hold the same error."""
        # __traceback__ and the like are Python's own.
        if not name.startswith("__"):
            raise AttributeError(f"{type(self).__name__}.{name}: an error does not change; at() makes another one")
        super().__setattr__(name, value)

    def at(self, field: str) -> Self:
        """The same failure, with ``field`` at fault; a message that begins with the former field begins with this one.

        Raise it ``from None``, or from the first where its traceback matters.
        """
        message = self.message
        if self.field and message.startswith(self.field):
            message = field + message.removeprefix(self.field)
        moved = type(self).__new__(type(self), message)
        moved.__dict__.update(self.__dict__ | {"field": field, "message": message})
        return moved


class _FieldError(FaceteerError):
    """An INVALID_ARGUMENT: ``description`` says what is wrong with ``field`` and what would be right."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, description: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{field}: {description}", field=field, description=description, metadata=metadata)


class InvalidField(_FieldError):
    """A field's value cannot be used."""


class UnreadableImage(_FieldError):
    """The bytes are not a picture that is read here."""

    reason = "UNREADABLE_IMAGE"


class ImageTooLarge(_FieldError):
    """The picture has more pixels or bytes than the limit; nothing was decoded."""

    reason = "IMAGE_TOO_LARGE"


class BatchTooLarge(_FieldError):
    """More items than the published limit."""

    reason = "BATCH_TOO_LARGE"

    def __init__(self, field: str, got: int, limit: int) -> None:
        super().__init__(
            field,
            f"{got} items are more than the {limit} that one call may hold; send several calls",
            metadata={"got": str(got), "limit": str(limit)},
        )


class EmbeddingExpired(FaceteerError):
    """The cache no longer holds the embedding."""

    status = "NOT_FOUND"
    reason = "EMBEDDING_EXPIRED"

    def __init__(self, embedding_id: str) -> None:
        embedding_id = _bounded(embedding_id)
        super().__init__(
            f"the embedding {embedding_id!r} is no longer cached; encode the picture again",
            metadata={"embedding_id": embedding_id},
        )


class UnknownFeature(FaceteerError):
    """No feature has this index or label; ``nearest`` are labels that are close."""

    status = "NOT_FOUND"
    reason = "UNKNOWN_FEATURE"

    def __init__(self, description: str, nearest: Iterable[str] = ()) -> None:
        names = ", ".join(nearest)
        super().__init__(
            f"{description}; nearest: {names}" if names else description,
            metadata={"nearest": names} if names else None,
        )


class IconNotMade(FaceteerError):
    """The feature has no icon yet."""

    status = "NOT_FOUND"
    reason = "ICON_NOT_MADE"

    def __init__(self, index: int) -> None:
        super().__init__(f"feature {index} has no icon yet", metadata={"feature_index": str(index)})


class RevisionMismatch(FaceteerError):
    """The request was made for other models than those served here."""

    status = "FAILED_PRECONDITION"
    reason = "REVISION_MISMATCH"

    def __init__(self, part: str, expected: str, actual: str) -> None:
        super().__init__(
            f"the request was made for {part} revision {expected}, but this server runs {actual}",
            metadata={"part": part, "expected": expected, "actual": actual},
        )


class NotInBundle(FaceteerError):
    """The bundle lacks a part (a prior, statistics, a text tower) that the call needs."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_IN_BUNDLE"

    def __init__(self, part: str, description: str) -> None:
        super().__init__(description, metadata={"part": part})


class NoiseExpired(FaceteerError):
    """The cache no longer holds an inverted picture's noise."""

    status = "NOT_FOUND"
    reason = "NOISE_EXPIRED"

    def __init__(self, noise_id: str) -> None:
        noise_id = _bounded(noise_id)
        super().__init__(
            f"the noise {noise_id!r} is no longer cached; invert the picture again", metadata={"noise_id": noise_id}
        )


class NotPermitted(FaceteerError):
    """The caller's access key does not allow this."""

    status = "PERMISSION_DENIED"
    reason = "NOT_PERMITTED"


class QueueFull(FaceteerError):
    """Too much work is waiting already; ``retry_after_s`` is an estimate of when there will be room."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.2g} s", retry_after_s=retry_after_s)


class MessageTooLarge(FaceteerError):
    """The message has more bytes than the limit."""

    status = "RESOURCE_EXHAUSTED"
    reason = "MESSAGE_TOO_LARGE"

    def __init__(self, got: int, limit: int, field: str | None = None) -> None:
        super().__init__(
            f"a message of {got} bytes is larger than the {limit} bytes that are taken",
            field=field,
            metadata={"got": str(got), "limit": str(limit)},
        )


class Starting(FaceteerError):
    """The server is loading or warming up its models."""

    status = "UNAVAILABLE"
    reason = "STARTING"

    def __init__(self, message: str = "the server is starting", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class Draining(FaceteerError):
    """The server finishes what it has begun and takes nothing new."""

    status = "UNAVAILABLE"
    reason = "DRAINING"

    def __init__(self, message: str = "the server is draining before it stops", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class UpstreamUnavailable(FaceteerError):
    """A service that this one calls cannot be reached."""

    status = "UNAVAILABLE"
    reason = "UPSTREAM_UNAVAILABLE"

    def __init__(self, service: str, description: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{service}: {description}", metadata={"service": service}, retry_after_s=retry_after_s)


class DeadlineExceeded(FaceteerError):
    """The caller's deadline passed while ``service`` was at work."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"

    def __init__(self, service: str) -> None:
        super().__init__(f"the deadline passed while {service} was at work", metadata={"service": service})


def _bounded(name: str) -> str:
    """An id as an error may repeat it: it comes from outside at any length, and an error's metadata has a limit."""
    return name if len(name) <= _LONGEST_ID else name[: _LONGEST_ID - 1] + "…"

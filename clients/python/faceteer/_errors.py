"""Every way a call can fail, as one tree of exceptions; :mod:`faceteer._transport.status` builds what a server sends.

::

    FaceteerError
    ├── InvalidArgumentError (ValueError)        .field .description
    │   ├── UnreadableImageError                 the bytes are not a picture that the server reads
    │   ├── ImageTooLargeError                   more pixels or bytes than the limit
    │   ├── BatchTooLargeError                   more items than the limit
    │   └── InvalidRecipeError                   not a readable recipe
    ├── NotFoundError (LookupError)
    │   ├── EmbeddingExpiredError                the server no longer has the embedding, and it could not be recomputed
    │   ├── UnknownFeatureError                  .nearest: labels that are close
    │   ├── IconNotMadeError                     the feature has no icon yet
    │   └── NoiseExpiredError                    the server no longer has an inverted picture's noise
    ├── FailedPreconditionError
    │   ├── RevisionMismatchError                .part .expected .actual: made for other models
    │   └── NotInBundleError                     .part: the server's bundle lacks what the call needs
    ├── ResourceExhaustedError                   .retry_after
    │   ├── QueueFullError                       the server is busy
    │   └── MessageTooLargeError                 the message is larger than the server takes
    ├── UnavailableError                         .retry_after: starting, draining, or a service behind it is gone
    │   └── ServerUnreachableError (ConnectionError)   .address: nothing answers there
    ├── DeadlineExceededError (TimeoutError)
    ├── CancelledError                           the call was cancelled
    ├── UnauthenticatedError                     the server wants credentials
    ├── PermissionDeniedError                    the credentials do not allow the call
    ├── UnimplementedError                       the server is older than this SDK, or serves another part
    ├── AlreadyExistsError
    ├── AbortedError
    └── InternalError                            .request_id finds it in the server's log
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class FaceteerError(Exception):
    """A call that failed.

    Attributes:
        message: one sentence for people.
        status: the gRPC status, by name ("INVALID_ARGUMENT").
        reason: the ``faceteer.v1.ErrorReason`` without its prefix ("UNREADABLE_IMAGE"); empty when there is none.
        metadata: what the server added for programs.
        request_id: finds the call in the server's log; empty when the server gave none.
        index: which item of a batch failed, or None.
    """

    status: str = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        status: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or type(self).status
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.request_id = request_id or self.metadata.get("request_id", "")
        self.index: int | None = None

    def __str__(self) -> str:
        return self.message if self.index is None else f"item {self.index}: {self.message}"


class InvalidArgumentError(FaceteerError, ValueError):
    """A value that cannot be used: ``field`` names it, ``description`` says what would be right."""

    status = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        description: str = "",
        status: str | None = None,
        reason: str = "INVALID_FIELD",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message, status=status, reason=reason, metadata=metadata, request_id=request_id)
        self.field = field
        self.description = description or message


class UnreadableImageError(InvalidArgumentError):
    """The bytes are not a picture that the server reads."""


class ImageTooLargeError(InvalidArgumentError):
    """The picture has more pixels or bytes than the server's limit."""


def name_picture(error: FaceteerError, name: str) -> None:
    """Puts a picture's name before what is wrong with it; the server, which gets bytes, cannot know it."""
    if isinstance(error, UnreadableImageError | ImageTooLargeError):
        error.message = f"{name}: {error.message}"


class BatchTooLargeError(InvalidArgumentError):
    """More items than one call may hold."""


class InvalidRecipeError(InvalidArgumentError):
    """A recipe that cannot be read; ``field`` names the place."""


class NotFoundError(FaceteerError, LookupError):
    """What the call names does not exist."""

    status = "NOT_FOUND"


class EmbeddingExpiredError(NotFoundError):
    """The server no longer holds the embedding. The SDK recovers by itself while it has the picture."""


class UnknownFeatureError(NotFoundError):
    """No feature has this index or label."""

    @property
    def nearest(self) -> Sequence[str]:
        """Labels that are close to the one asked for, nearest first; may be empty."""
        return tuple(name.strip() for name in self.metadata.get("nearest", "").split(",") if name.strip())


class IconNotMadeError(NotFoundError):
    """The feature has no icon yet."""


class NoiseExpiredError(NotFoundError):
    """The server no longer holds an inverted picture's noise; invert the picture again."""


class FailedPreconditionError(FaceteerError):
    """The server's models cannot do what the call asks."""

    status = "FAILED_PRECONDITION"

    @property
    def part(self) -> str:
        """The part of the bundle at fault ("encoder", "sae", "generator" …); may be empty."""
        return self.metadata.get("part", "")


class RevisionMismatchError(FailedPreconditionError):
    """A recipe (or an opened picture) was made with other models than the server runs now."""

    @property
    def expected(self) -> str:
        """The revision that the request was made for."""
        return self.metadata.get("expected", "")

    @property
    def actual(self) -> str:
        """The revision that the server runs."""
        return self.metadata.get("actual", "")


class NotInBundleError(FailedPreconditionError):
    """The server's bundle lacks a part (a text tower, statistics, a prior) that the call needs."""


class _WaitingHelps(FaceteerError):
    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        status: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message, status=status, reason=reason, metadata=metadata, request_id=request_id)
        #: Seconds after which the server expects to have room, or None when it did not say.
        self.retry_after = retry_after


class ResourceExhaustedError(_WaitingHelps):
    """The server is busy, or the request is too large for it."""

    status = "RESOURCE_EXHAUSTED"


class QueueFullError(ResourceExhaustedError):
    """The server's queue is full; ``retry_after`` says when to come back."""


class MessageTooLargeError(ResourceExhaustedError):
    """The message is larger than the server takes; waiting does not help."""


class UnavailableError(_WaitingHelps):
    """The server is starting or stopping, or a service behind it cannot be reached."""

    status = "UNAVAILABLE"


class ServerUnreachableError(UnavailableError, ConnectionError):
    """Nothing answers at ``address``."""

    def __init__(self, message: str, *, address: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.address = address


class DeadlineExceededError(FaceteerError, TimeoutError):
    """The call took longer than its deadline."""

    status = "DEADLINE_EXCEEDED"


class CancelledError(FaceteerError):
    """The call was cancelled."""

    status = "CANCELLED"


class UnauthenticatedError(FaceteerError):
    """The server wants credentials."""

    status = "UNAUTHENTICATED"


class PermissionDeniedError(FaceteerError):
    """The credentials do not allow this call."""

    status = "PERMISSION_DENIED"


class UnimplementedError(FaceteerError):
    """The server does not know this call."""

    status = "UNIMPLEMENTED"


class AlreadyExistsError(FaceteerError):
    """What the call would create already exists."""

    status = "ALREADY_EXISTS"


class AbortedError(FaceteerError):
    """The server abandoned the call because of another one."""

    status = "ABORTED"


class InternalError(FaceteerError):
    """A defect of the server's; ``request_id`` finds it in its log."""

    status = "INTERNAL"


def invalid(field: str, description: str) -> InvalidArgumentError:
    """The error for an argument that the SDK refuses itself; ``description`` says what is wrong with it."""
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)

"""Edit images by their features: the Python SDK and command line of Faceteer.

::

    with faceteer.connect("localhost:50050") as client:
        photo = client.open("boat.png")
        edit = photo.edit().set("night", 1.0).ablate("snow")
        edit.render(seed=7).save("boat-night.png")

Everything public is in this module; modules whose names begin with an underscore may change. ``faceteer.v1`` holds the
generated messages and stubs, for those who want the wire.
"""

from __future__ import annotations

from faceteer._async_client import (
    AsyncClient,
    AsyncEdit,
    AsyncPhoto,
    connect_async,
)
from faceteer._async_client_features import AsyncFeature, AsyncFeatureLibrary, AsyncFeatureList
from faceteer._channels import Tls
from faceteer._client import Client, Edit, Photo, connect
from faceteer._client_features import Feature, FeatureLibrary, FeatureList
from faceteer._comparing import Difference, FeatureDifference
from faceteer._edits import FeatureEdit
from faceteer._errors import (
    AbortedError,
    AlreadyExistsError,
    BatchTooLargeError,
    CancelledError,
    DeadlineExceededError,
    EmbeddingExpiredError,
    FaceteerError,
    FailedPreconditionError,
    IconNotMadeError,
    ImageTooLargeError,
    InternalError,
    InvalidArgumentError,
    InvalidRecipeError,
    MessageTooLargeError,
    NoiseExpiredError,
    NotFoundError,
    NotInBundleError,
    PermissionDeniedError,
    QueueFullError,
    ResourceExhaustedError,
    RevisionMismatchError,
    ServerUnreachableError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnknownFeatureError,
    UnreadableImageError,
)
from faceteer._events import Drawn, Edited, EditEvent, Finished, Preview, Progress, Queued, Started
from faceteer._facts import FeatureExample, FeatureStatistics, Histogram, LibraryFacts, RelatedFeature
from faceteer._feature_bases import FeatureExamples
from faceteer._features import FeatureEncoding
from faceteer._fired import FiredFeature, FiredFeatures
from faceteer._icons import FeatureIcon
from faceteer._library import FeatureFilters
from faceteer._recipe import Recipe
from faceteer._report import EditOutcome, EditReport, FeatureDrift
from faceteer._retries import Retries, Timeouts
from faceteer._server import EncoderFacts, GeneratorFacts, SaeFacts, ServerStatus
from faceteer._values import DrawingOptions, Execution, Notice, Revisions, Settings

__version__ = "0.1.0"

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncEdit",
    "AsyncFeature",
    "AsyncFeatureLibrary",
    "AsyncFeatureList",
    "AsyncPhoto",
    "BatchTooLargeError",
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "Difference",
    "DrawingOptions",
    "Drawn",
    "Edit",
    "EditEvent",
    "EditOutcome",
    "EditReport",
    "Edited",
    "EmbeddingExpiredError",
    "EncoderFacts",
    "Execution",
    "FaceteerError",
    "FailedPreconditionError",
    "Feature",
    "FeatureDifference",
    "FeatureDrift",
    "FeatureEdit",
    "FeatureEncoding",
    "FeatureExample",
    "FeatureExamples",
    "FeatureFilters",
    "FeatureIcon",
    "FeatureLibrary",
    "FeatureList",
    "FeatureStatistics",
    "Finished",
    "FiredFeature",
    "FiredFeatures",
    "GeneratorFacts",
    "Histogram",
    "IconNotMadeError",
    "ImageTooLargeError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidRecipeError",
    "LibraryFacts",
    "MessageTooLargeError",
    "NoiseExpiredError",
    "NotFoundError",
    "NotInBundleError",
    "Notice",
    "PermissionDeniedError",
    "Photo",
    "Preview",
    "Progress",
    "QueueFullError",
    "Queued",
    "Recipe",
    "RelatedFeature",
    "ResourceExhaustedError",
    "Retries",
    "RevisionMismatchError",
    "Revisions",
    "SaeFacts",
    "ServerStatus",
    "ServerUnreachableError",
    "Settings",
    "Started",
    "Timeouts",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownFeatureError",
    "UnreadableImageError",
    "__version__",
    "connect",
    "connect_async",
]

# Tracebacks, reprs and documentation name the public door, not the private module behind it.
for _name in __all__:
    if hasattr(globals()[_name], "__module__") and isinstance(globals()[_name], type):
        globals()[_name].__module__ = "faceteer"
del _name

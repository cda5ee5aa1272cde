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

from faceteer._async.client import AsyncClient, connect_async
from faceteer._async.editing import AsyncEdit
from faceteer._async.features import AsyncFeature, AsyncFeatureLibrary, AsyncFeatureList
from faceteer._async.photo import AsyncPhoto
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
from faceteer._models.difference import Difference, FeatureDifference, TransferPart
from faceteer._models.edits import FeatureEdit
from faceteer._models.encoding import FeatureEncoding
from faceteer._models.events import Drawn, Edited, EditEvent, Finished, Measured, Preview, Progress, Queued, Started
from faceteer._models.features import (
    FeatureExample,
    FeatureExamples,
    FeatureFilters,
    FeatureStatistics,
    Histogram,
    LibraryFacts,
    RelatedFeature,
)
from faceteer._models.fired import FiredFeature, FiredFeatures
from faceteer._models.icon import FeatureIcon
from faceteer._models.match import FeatureMatch
from faceteer._models.recipe import Recipe
from faceteer._models.report import EditOutcome, EditReport, FeatureDrift, MeasuredPicture
from faceteer._models.server import EncoderFacts, GeneratorFacts, SaeFacts, ServerStatus
from faceteer._models.values import DrawingOptions, Execution, Notice, Revisions, Settings
from faceteer._sync.client import Client, connect
from faceteer._sync.editing import Edit
from faceteer._sync.features import Feature, FeatureLibrary, FeatureList
from faceteer._sync.photo import Photo
from faceteer._transport.channels import Tls
from faceteer._transport.retries import Retries, Timeouts

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
    "FeatureMatch",
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
    "Measured",
    "MeasuredPicture",
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
    "TransferPart",
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

"""The calls by path and response type; a test compares this table with the contract's descriptors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf import wrappers_pb2
from google.protobuf.message import Message

from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2

Response = TypeVar("Response", bound=Message, covariant=True)


@dataclass(frozen=True)
class Method(Generic[Response]):
    """One call: ``path`` is "/package.Service/Call"."""

    path: str
    response: type[Response]

    def bound_to(self, channel: Any, kind: str) -> Callable[..., Any]:
        """The call on a channel; ``kind`` is gRPC's word for it, such as "unary_stream"."""
        make: Callable[..., Callable[..., Any]] = getattr(channel, kind)
        return make(
            self.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.response.FromString,
        )


GET_STUDIO = Method("/faceteer.v1.StudioService/GetStudio", studio_pb2.GetStudioResponse)
OPEN_IMAGE = Method("/faceteer.v1.StudioService/OpenImage", studio_pb2.OpenImageResponse)
EDIT_IMAGE = Method("/faceteer.v1.StudioService/EditImage", studio_pb2.EditImageResponse)
TRANSFER_FEATURES = Method("/faceteer.v1.StudioService/TransferFeatures", studio_pb2.TransferFeaturesResponse)
ENCODE_TEXTS = Method("/faceteer.v1.EncoderService/EncodeTexts", encoder_pb2.EncodeTextsResponse)
STREAM_ENCODE_IMAGES = Method("/faceteer.v1.EncoderService/StreamEncodeImages", encoder_pb2.StreamEncodeImagesResponse)
ENCODE_FEATURES = Method("/faceteer.v1.SaeService/EncodeFeatures", sae_pb2.EncodeFeaturesResponse)
DECODE_FEATURES = Method("/faceteer.v1.SaeService/DecodeFeatures", sae_pb2.DecodeFeaturesResponse)
DIFF_FEATURES = Method("/faceteer.v1.SaeService/DiffFeatures", sae_pb2.DiffFeaturesResponse)
EMBED_PROMPT = Method("/faceteer.v1.GeneratorService/EmbedPrompt", generator_pb2.EmbedPromptResponse)
GET_LIBRARY = Method("/faceteer.v1.LibraryService/GetLibrary", library_pb2.GetLibraryResponse)
GET_FEATURE = Method("/faceteer.v1.LibraryService/GetFeature", library_pb2.GetFeatureResponse)
BATCH_GET_FEATURES = Method("/faceteer.v1.LibraryService/BatchGetFeatures", library_pb2.BatchGetFeaturesResponse)
LIST_FEATURES = Method("/faceteer.v1.LibraryService/ListFeatures", library_pb2.ListFeaturesResponse)
SEARCH_FEATURES = Method("/faceteer.v1.LibraryService/SearchFeatures", library_pb2.SearchFeaturesResponse)
LIST_FEATURE_EXAMPLES = Method(
    "/faceteer.v1.LibraryService/ListFeatureExamples", library_pb2.ListFeatureExamplesResponse
)
GET_FEATURE_ICON = Method("/faceteer.v1.LibraryService/GetFeatureIcon", library_pb2.GetFeatureIconResponse)
SET_FEATURE_LABEL = Method("/faceteer.v1.LibraryService/SetFeatureLabel", library_pb2.SetFeatureLabelResponse)

# grpc.health.v1's messages are one string and one enum in field 1; the wrappers have the same bytes, and spare the SDK
# a dependency for two fields.
HEALTH_CHECK: Method[wrappers_pb2.UInt32Value] = Method("/grpc.health.v1.Health/Check", wrappers_pb2.UInt32Value)

"""The fake server's feature library.

Knows nothing of the SDK.
"""

from __future__ import annotations

import io
from typing import Any

import grpc
import numpy as np
from faceteer.v1 import library_pb2, library_pb2_grpc
from PIL import Image
from unit.sdk.fake_models import FakePart
from unit.sdk.fake_world import LABELS, P99, RIVALS, D, Failure, Fault, png


class FakeLibrary(library_pb2_grpc.LibraryServiceServicer, FakePart):
    """Labels, searches, examples, icons."""

    GetLibraryAnswer = library_pb2.GetLibraryResponse(
        revision="lib0",
        bundle="fake",
        sae_revision="sae0",
        corpus="made up",
        n_pictures=40,
        n_features=D,
        n_alive=16,
        n_labelled=6,
        searches_meaning=True,
        created="2026-11-23T12:00:00Z",
    )

    #: Sent with every example in place of the small grey picture.
    thumbnail = b""
    #: Features that the caller may not see.
    gated: frozenset[int] = frozenset()
    #: Whether captions try to be markup.
    hostile = False

    def GetLibrary(self, request: Any, context: grpc.ServicerContext) -> library_pb2.GetLibraryResponse:
        self._enter("GetLibrary", request, context)
        return self.GetLibraryAnswer

    # -- library -----------------------------------------------------------------------------------------------

    def GetFeature(self, request: Any, context: grpc.ServicerContext) -> library_pb2.GetFeatureResponse:
        self._enter("GetFeature", request, context)
        with self._failing(context):
            index = self._resolve(request.feature)
            detail = library_pb2.FeatureDetail(
                histogram_edges=[1.0, 2.0],
                histogram_counts=[30, 10],
                rivals=[
                    library_pb2.RelatedFeature(index=i, label=LABELS[i], score=0.0) for i in RIVALS.get(index, [])[:1]
                ],
                nearest=[library_pb2.RelatedFeature(index=5, label="snow", score=0.5)],
            )
            return library_pb2.GetFeatureResponse(feature=self._feature(index), detail=detail)

    def BatchGetFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.BatchGetFeaturesResponse:
        self._enter("BatchGetFeatures", request, context)
        with self._failing(context):
            answer = library_pb2.BatchGetFeaturesResponse()
            for place, ref in enumerate(request.features):
                if request.allow_missing and ref.index in self.gated:
                    answer.missing.append(place)
                    continue
                if ref.index in self.gated:
                    raise Failure(Fault("NOT_FOUND", "UNKNOWN_FEATURE", f"no feature {ref.index}"))
                answer.features.append(self._feature(self._resolve(ref)))
            return answer

    def ListFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.ListFeaturesResponse:
        self._enter("ListFeatures", request, context)
        wanted = [i for i in range(D) if not request.filter.labelled or i in self._labels]
        start, end, token = _page(request, len(wanted), most=3)
        return library_pb2.ListFeaturesResponse(
            features=[self._feature(i) for i in wanted[start:end]],
            next_page_token=token,
            total_size=len(wanted),
        )

    def SearchFeatures(self, request: Any, context: grpc.ServicerContext) -> library_pb2.SearchFeaturesResponse:
        self._enter("SearchFeatures", request, context)
        with self._failing(context):
            kind = request.WhichOneof("query")
            if kind == "words":
                found = [i for i, label in self._labels.items() if request.words.lower() in label]
            elif kind == "picture":
                found = [int(i) for i in np.flatnonzero(self._input(request.picture) > 0)]
            else:
                found = [5, 7] if self._resolve(request.similar_to) else []
            hits = [library_pb2.FeatureHit(feature=self._feature(i), score=1 / (n + 1)) for n, i in enumerate(found)]
            start, end, token = _page(request, len(hits))
            return library_pb2.SearchFeaturesResponse(hits=hits[start:end], next_page_token=token, total_size=len(hits))

    def ListFeatureExamples(
        self, request: Any, context: grpc.ServicerContext
    ) -> library_pb2.ListFeatureExamplesResponse:
        self._enter("ListFeatureExamples", request, context)
        if request.selection == library_pb2.EXAMPLE_SELECTION_QUANTILES:
            examples = [
                library_pb2.FeatureExample(
                    picture=f"q{n}",
                    activation=2.0 - n,
                    thumbnail=png(100),
                    quantile_from=0.5 - 0.5 * n,
                    quantile_to=1.0 - 0.5 * n,
                )
                for n in range(2)
            ]
            return library_pb2.ListFeatureExamplesResponse(examples=examples, total_size=2)
        start, end, token = _page(request, 3)
        examples = [
            library_pb2.FeatureExample(
                picture=name,
                activation=3.0 - n,
                thumbnail=self.thumbnail or png(200),
                caption=f"picture {name} <script>alert(1)</script>" if self.hostile else f"picture {name}",
            )
            for n, name in enumerate("abc")
        ]
        return library_pb2.ListFeatureExamplesResponse(
            examples=examples[start:end], next_page_token=token, total_size=3
        )

    def GetFeatureIcon(self, request: Any, context: grpc.ServicerContext) -> library_pb2.GetFeatureIconResponse:
        self._enter("GetFeatureIcon", request, context)
        with self._failing(context):
            if self._resolve(request.feature) != 3:
                raise Failure(Fault("NOT_FOUND", "ICON_NOT_MADE", "no icon yet"))
            return library_pb2.GetFeatureIconResponse(icon=_strip(), strengths=[0.5, 1, 2])

    def SetFeatureLabel(self, request: Any, context: grpc.ServicerContext) -> library_pb2.SetFeatureLabelResponse:
        self._enter("SetFeatureLabel", request, context)
        index = self._resolve(request.feature)
        self._labels[index] = request.label
        feature = self._feature(index)
        feature.label_source = library_pb2.LABEL_SOURCE_PERSON
        return library_pb2.SetFeatureLabelResponse(feature=feature)

    def _feature(self, index: int) -> library_pb2.Feature:
        label = self._labels.get(index, "")
        return library_pb2.Feature(
            index=index,
            label=label,
            label_source=library_pb2.LABEL_SOURCE_AUTOMATIC if label else library_pb2.LABEL_SOURCE_UNSPECIFIED,
            alive=index < 16,
            firing_share=0.25,
            mean_activation=0.5,
            p50=0.4,
            p99=P99,
            max_activation=2.5,
            detection_score=0.9 if label else None,
            detection_balanced_accuracy=0.8 if label else None,
            causal_score=0.25 if label == "fog" else None,
            terms=["dusk", "evening"] if label == "night" else [],
        )


def _page(request: Any, n: int, most: int = 50) -> tuple[int, int, str]:
    """Where the page that is asked for begins and ends, and the token of the next one."""
    start = int(request.page_token or 0)
    end = start + min(request.page_size or most, most)
    return start, end, str(end) if end < n else ""


def _strip() -> bytes:
    """Four squares of 16 pixels, as a WebP: the template and three strengths."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 16), (9, 90, 200)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()

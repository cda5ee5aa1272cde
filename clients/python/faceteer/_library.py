"""What features mean: looking them up, searching, examples, icons, labels.

Knows nothing of how calls are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from PIL import Image

from faceteer._edits import FeatureKey, feature_ref
from faceteer._effects import Emit, Operation, Work
from faceteer._errors import InvalidArgumentError
from faceteer._methods import (
    BATCH_GET_FEATURES,
    GET_FEATURE,
    GET_FEATURE_ICON,
    LIST_FEATURE_EXAMPLES,
    LIST_FEATURES,
    SEARCH_FEATURES,
    SET_FEATURE_LABEL,
)
from faceteer._opening import Context, OpenedPhoto, call_with_photos
from faceteer._pictures import decode_picture
from faceteer._retries import call as plain_call
from faceteer.v1 import library_pb2

#: Where a label came from: "" is no label.
LabelSource = Literal["", "automatic", "model", "person"]
#: The order of a list of features.
FeatureOrder = Literal["index", "firing_share", "detection_score", "max_activation", "label"]

_ORDERS = {
    "index": library_pb2.FEATURE_ORDER_UNSPECIFIED,
    "firing_share": library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC,
    "detection_score": library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC,
    "max_activation": library_pb2.FEATURE_ORDER_MAX_ACTIVATION_DESC,
    "label": library_pb2.FEATURE_ORDER_LABEL,
}
_PAGE = 1000
_EXAMPLES_PAGE = 100


@dataclass(frozen=True)
class Histogram:
    """Activations over the pictures on which a feature fires: ``counts[i]`` lie below ``edges[i]`` (RAW) and above
    the edge before."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FeatureStatistics:
    """How a feature behaves on the library's corpus. Activations are RAW, over the pictures on which it fires.

    Attributes:
        alive: whether it fired at all.
        firing_share: the share of pictures on which it fires, 0 to 1.
        mean: mean activation.
        p50: median activation.
        p99: 99th percentile: the unit SCALED.
        max: largest activation.
        detection_score: how well the label predicts where the feature fires (AUC); None when not measured.
        causal_score: how much more what it causes looks like the label; None when not measured.
        histogram: None in lists.
    """

    alive: bool
    firing_share: float
    mean: float
    p50: float
    p99: float
    max: float
    detection_score: float | None
    causal_score: float | None
    histogram: Histogram | None = None


@dataclass(frozen=True)
class RelatedFeature:
    """Another feature and how strongly it is related; what ``score`` means stands at the list."""

    index: int
    label: str
    score: float


@dataclass(frozen=True)
class FeatureExample:
    """A picture on which a feature fires: its name in the corpus, the activation (RAW), a thumbnail, a caption."""

    picture: str
    activation: float
    thumbnail: Image.Image
    caption: str


@dataclass(frozen=True)
class FeatureFacts:
    """All that the library says about one feature.

    Attributes:
        index: in [0, d_sae).
        label: empty when nobody knows.
        label_source: who says so.
        statistics: how it behaves on the corpus.
        coactivating: fire together with it; score is the lift. Empty in lists, as the next two.
        rivals: hardly ever do; score is the lift.
        nearest: closest decoder directions; score is the cosine.
        safety_class: the operator's; empty for none.
        score: how well it fits the search that found it; None otherwise.
    """

    index: int
    label: str
    label_source: LabelSource
    statistics: FeatureStatistics
    coactivating: tuple[RelatedFeature, ...] = ()
    rivals: tuple[RelatedFeature, ...] = ()
    nearest: tuple[RelatedFeature, ...] = ()
    safety_class: str = ""
    score: float | None = None

    @classmethod
    def from_proto(
        cls,
        message: library_pb2.Feature,
        detail: library_pb2.FeatureDetail | None = None,
        score: float | None = None,
    ) -> FeatureFacts:
        """From the wire."""
        source: Any = library_pb2.LabelSource.Name(message.label_source).removeprefix("LABEL_SOURCE_").lower()
        histogram = None
        if detail is not None and detail.histogram_edges:
            histogram = Histogram(tuple(detail.histogram_edges), tuple(detail.histogram_counts))
        return cls(
            index=message.index,
            label=message.label,
            label_source="" if source == "unspecified" else source,
            statistics=FeatureStatistics(
                alive=message.alive,
                firing_share=message.firing_share,
                mean=message.mean_activation,
                p50=message.p50,
                p99=message.p99,
                max=message.max_activation,
                detection_score=message.detection_score if message.HasField("detection_score") else None,
                causal_score=message.causal_score if message.HasField("causal_score") else None,
                histogram=histogram,
            ),
            coactivating=_related(detail.coactivating) if detail is not None else (),
            rivals=_related(detail.rivals) if detail is not None else (),
            nearest=_related(detail.nearest) if detail is not None else (),
            safety_class=message.safety_class,
            score=score,
        )


def feature_filter(
    *,
    alive: bool | None,
    labelled: bool | None,
    min_firing_share: float | None,
    max_firing_share: float | None,
    min_detection_score: float | None,
    label_sources: Iterable[LabelSource] | None,
) -> library_pb2.FeatureFilter:
    """The filter of a list or search; None filters nothing."""
    sources = []
    for source in label_sources or ():
        if source not in get_args(LabelSource) or not source:
            raise _invalid("label_sources", f"{source!r} is unknown; pass automatic, model or person")
        sources.append(library_pb2.LabelSource.Value(f"LABEL_SOURCE_{source.upper()}"))
    return library_pb2.FeatureFilter(
        alive=alive,
        labelled=labelled,
        min_firing_share=min_firing_share,
        max_firing_share=max_firing_share,
        min_detection_score=min_detection_score,
        label_sources=sources,
    )


def get_feature(context: Context, feature: FeatureKey, *, timeout: float | None) -> Operation[FeatureFacts]:
    """One feature, whole."""
    request = library_pb2.GetFeatureRequest(feature=feature_ref(feature))
    answer = yield from plain_call(GET_FEATURE, request, context.attempts(timeout, context.timeouts.query))
    return FeatureFacts.from_proto(answer.feature, answer.detail)


def get_features(
    context: Context, features: Iterable[FeatureKey], *, timeout: float | None
) -> Operation[list[FeatureFacts]]:
    """Many features, without histogram and relatives, in the order asked for."""
    refs = [feature_ref(feature) for feature in features]
    attempts = context.attempts(timeout, context.timeouts.query)
    found: list[FeatureFacts] = []
    for start in range(0, len(refs), _PAGE):
        request = library_pb2.BatchGetFeaturesRequest(features=refs[start : start + _PAGE])
        answer = yield from plain_call(BATCH_GET_FEATURES, request, attempts)
        found += map(FeatureFacts.from_proto, answer.features)
    return found


def list_features(
    context: Context,
    filter: library_pb2.FeatureFilter,
    *,
    order: FeatureOrder,
    limit: int | None,
    make: Callable[[FeatureFacts], Any],
    timeout: float | None,
) -> Operation[None]:
    """Emits features page by page."""
    if order not in _ORDERS:
        raise _invalid("order", f"{order!r} is unknown; one of {', '.join(_ORDERS)}")
    left = _limit(limit)
    request = library_pb2.ListFeaturesRequest(filter=filter, order=_ORDERS[order], page_size=min(_PAGE, left))
    while left > 0:
        # Each page has a deadline of its own: whoever iterates may take their time between two.
        answer = yield from plain_call(LIST_FEATURES, request, context.attempts(timeout, context.timeouts.query))
        for feature in answer.features[:left]:
            yield Emit(make(FeatureFacts.from_proto(feature)))
        left -= len(answer.features)
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            return


def search_features(
    context: Context,
    query: str | int | OpenedPhoto,
    filter: library_pb2.FeatureFilter,
    *,
    limit: int | None,
    timeout: float | None,
) -> Operation[list[FeatureFacts]]:
    """Features by words (str), like another feature (its index), or of a photo; best first."""
    photos = [query] if isinstance(query, OpenedPhoto) else []
    attempts = context.attempts(timeout, context.timeouts.query)
    left, token = _limit(limit), ""
    found: list[FeatureFacts] = []

    def request() -> library_pb2.SearchFeaturesRequest:
        message = library_pb2.SearchFeaturesRequest(filter=filter, page_size=min(_PAGE, left), page_token=token)
        if isinstance(query, OpenedPhoto):
            message.picture.CopyFrom(query.embeds_input())
        elif isinstance(query, str):
            message.words = query
        else:
            message.similar_to.CopyFrom(feature_ref(query))
        return message

    while left > 0:
        answer = yield from call_with_photos(context, SEARCH_FEATURES, request, photos, attempts)
        found += [FeatureFacts.from_proto(hit.feature, score=hit.score) for hit in answer.hits[:left]]
        left, token = left - len(answer.hits), answer.next_page_token
        if not token:
            break
    return found


def feature_examples(
    context: Context, index: int, *, limit: int | None, timeout: float | None
) -> Operation[list[FeatureExample]]:
    """Pictures on which a feature fires, strongest first."""
    attempts = context.attempts(timeout, context.timeouts.query)
    left, token = _limit(limit), ""
    found: list[FeatureExample] = []
    while left > 0:
        request = library_pb2.ListFeatureExamplesRequest(
            feature=feature_ref(index), page_size=min(_EXAMPLES_PAGE, left), page_token=token
        )
        answer = yield from plain_call(LIST_FEATURE_EXAMPLES, request, attempts)
        for example in answer.examples[:left]:
            thumbnail = yield Work(partial(decode_picture, example.thumbnail))
            found.append(FeatureExample(example.picture, example.activation, thumbnail, example.caption))
        left, token = left - len(answer.examples), answer.next_page_token
        if not token:
            break
    return found


def feature_icon(context: Context, index: int, *, timeout: float | None) -> Operation[Image.Image]:
    """A picture of what turning the feature up causes; ``.info["strengths"]`` are the SCALED strengths."""
    request = library_pb2.GetFeatureIconRequest(feature=feature_ref(index))
    answer = yield from plain_call(GET_FEATURE_ICON, request, context.attempts(timeout, context.timeouts.query))
    picture: Image.Image = yield Work(partial(decode_picture, answer.icon, strengths=tuple(answer.strengths)))
    return picture


def set_label(
    context: Context, feature: FeatureKey, label: str, *, author: str, timeout: float | None
) -> Operation[FeatureFacts]:
    """Records a person's label; an empty one takes it back."""
    request = library_pb2.SetFeatureLabelRequest(feature=feature_ref(feature), label=label, author=author)
    # Setting the same label twice is setting it once, so it may be retried like everything that only reads.
    answer = yield from plain_call(SET_FEATURE_LABEL, request, context.attempts(timeout, context.timeouts.query))
    return FeatureFacts.from_proto(answer.feature)


def _related(messages: Sequence[library_pb2.RelatedFeature]) -> tuple[RelatedFeature, ...]:
    return tuple(RelatedFeature(m.index, m.label, m.score) for m in messages)


def _limit(limit: int | None) -> int:
    if limit is None:
        return 2**31
    if limit < 1:
        raise _invalid("limit", f"{limit} is not positive; pass 1 or more, or None for all")
    return limit


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)

"""What features mean: looking them up, searching, examples, icons, labels.

Knows nothing of how calls are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from PIL import Image

from faceteer._edits import FeatureKey, feature_ref
from faceteer._effects import Emit, Operation, Work
from faceteer._errors import FaceteerError, InternalError, InvalidArgumentError, NotFoundError
from faceteer._facts import FeatureExample, FeatureFacts, LabelSource, LibraryFacts
from faceteer._icons import FeatureIcon
from faceteer._methods import (
    BATCH_GET_FEATURES,
    GET_FEATURE,
    GET_FEATURE_ICON,
    GET_LIBRARY,
    LIST_FEATURE_EXAMPLES,
    LIST_FEATURES,
    SEARCH_FEATURES,
    SET_FEATURE_LABEL,
)
from faceteer._opening import Context, OpenedPhoto, call_with_photos
from faceteer._pictures import decode_picture
from faceteer._retries import Attempts, Retries
from faceteer._retries import call as plain_call
from faceteer._values import float32
from faceteer.v1 import library_pb2

#: The order of a list of features.
FeatureOrder = Literal[
    "index", "firing_share", "detection_score", "max_activation", "label", "causal_score", "disagreement"
]
#: Which examples of a feature: the strongest, or some of each quantile of its activation.
ExampleSelection = Literal["strongest", "quantiles"]

_ORDERS = {
    "index": library_pb2.FEATURE_ORDER_UNSPECIFIED,
    "firing_share": library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC,
    "detection_score": library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC,
    "max_activation": library_pb2.FEATURE_ORDER_MAX_ACTIVATION_DESC,
    "label": library_pb2.FEATURE_ORDER_LABEL,
    "causal_score": library_pb2.FEATURE_ORDER_CAUSAL_SCORE_DESC,
    "disagreement": library_pb2.FEATURE_ORDER_SCORE_DISAGREEMENT_DESC,
}
_SELECTIONS = {
    "strongest": library_pb2.EXAMPLE_SELECTION_STRONGEST,
    "quantiles": library_pb2.EXAMPLE_SELECTION_QUANTILES,
}
_PAGE = 1000
_EXAMPLES_PAGE = 100


class FeatureFilters(TypedDict, total=False):
    """What a search or a list can be narrowed to; left out or None filters nothing.

    Attributes:
        alive: only features that fire on the corpus (True), or never (False).
        labelled: only features with (True) or without (False) a label.
        min_firing_share: only features that fire on at least this share of pictures, 0 to 1.
        max_firing_share: at most this share.
        min_detection_score: only features whose label tells where they fire at least this well (AUC).
        max_detection_score: at most this well.
        min_causal_score: only features whose label says what they cause at least this well.
        max_causal_score: at most this well.
        scores_disagree: only features whose two scores disagree (True) or agree (False).
        label_sources: only features labelled by one of these: "automatic", "model", "person".
        include_safety_classes: gated classes to show as well, "*" for all; needs an access key that allows it.
    """

    alive: bool | None
    labelled: bool | None
    min_firing_share: float | None
    max_firing_share: float | None
    min_detection_score: float | None
    max_detection_score: float | None
    min_causal_score: float | None
    max_causal_score: float | None
    scores_disagree: bool | None
    label_sources: Iterable[LabelSource] | None
    include_safety_classes: Iterable[str] | None


class Found(NamedTuple):
    """Features and how many there are in all."""

    features: list[FeatureFacts]
    total: int


def feature_filter(filters: FeatureFilters) -> library_pb2.FeatureFilter:
    """The filter of a list or search; None filters nothing. TypeError for an unknown name, as for any argument."""
    unknown = filters.keys() - FeatureFilters.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected filter {min(unknown)!r}; known are {', '.join(FeatureFilters.__annotations__)}")
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    sources = []
    for source in given.pop("label_sources", ()):
        if source not in get_args(LabelSource) or not source:
            raise _invalid("label_sources", f"{source!r} is unknown; pass automatic, model or person")
        sources.append(library_pb2.LabelSource.Value(f"LABEL_SOURCE_{source.upper()}"))
    classes = given.pop("include_safety_classes", ())
    for name, value in given.items():
        if name.startswith(("min_", "max_")):
            given[name] = float32(name, value)
    return library_pb2.FeatureFilter(
        **given,
        label_sources=sources,
        include_safety_classes=[classes] if isinstance(classes, str) else list(classes),
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
) -> Operation[Found]:
    """Features by words (str), like another feature (its index), or of a photo; best first."""
    photos = [query] if isinstance(query, OpenedPhoto) else []
    attempts = context.attempts(timeout, context.timeouts.query)
    left, token, total = _limit(limit), "", 0
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
        left, token, total = left - len(answer.hits), answer.next_page_token, answer.total_size
        if not token:
            break
    return Found(found, total)


def feature_examples(
    context: Context, index: int, *, limit: int | None, selection: ExampleSelection, timeout: float | None
) -> Operation[list[FeatureExample]]:
    """Pictures on which a feature fires: the strongest, or some of each quantile, strongest first."""
    if selection not in _SELECTIONS:
        raise _invalid("selection", f"{selection!r} is unknown; one of {', '.join(_SELECTIONS)}")
    attempts = context.attempts(timeout, context.timeouts.query)
    left, token = _limit(limit), ""
    found: list[FeatureExample] = []
    while left > 0:
        request = library_pb2.ListFeatureExamplesRequest(
            feature=feature_ref(index),
            page_size=min(_EXAMPLES_PAGE, left),
            page_token=token,
            selection=_SELECTIONS[selection],
        )
        answer = yield from plain_call(LIST_FEATURE_EXAMPLES, request, attempts)
        found += yield Work(partial(_examples, answer.examples[:left]))
        left, token = left - len(answer.examples), answer.next_page_token
        if not token:
            break
    return found


def examples_of_many(
    context: Context, indices: Sequence[int], *, limit: int, seconds: float
) -> Operation[dict[int, list[FeatureExample]]]:
    """The strongest examples of many features, as far as they come within ``seconds``: what a view shows.

    Never raises for what a server says: a view without pictures is better than none. Nothing is tried twice, and after
    the first failure that would hit the next feature too, nothing more is asked.
    """
    attempts = Attempts(Retries(attempts=1), seconds)
    found: dict[int, list[FeatureExample]] = {}
    for index in indices:
        request = library_pb2.ListFeatureExamplesRequest(
            feature=feature_ref(index), page_size=limit, selection=library_pb2.EXAMPLE_SELECTION_STRONGEST
        )
        try:
            answer = yield from plain_call(LIST_FEATURE_EXAMPLES, request, attempts)
            found[index] = yield Work(partial(_examples, answer.examples[:limit]))
        except (NotFoundError, InternalError):
            continue
        except FaceteerError:
            break
    return found


def feature_icon(context: Context, index: int, *, timeout: float | None) -> Operation[FeatureIcon]:
    """A picture of what turning the feature up causes. Where the library has none the server may draw it."""
    request = library_pb2.GetFeatureIconRequest(feature=feature_ref(index))
    answer = yield from plain_call(GET_FEATURE_ICON, request, context.attempts(timeout, context.timeouts.render))
    image: Image.Image = yield Work(partial(decode_picture, answer.icon, strengths=tuple(answer.strengths)))
    return FeatureIcon(image, tuple(answer.strengths), answer.icon)


def library_facts(context: Context, *, timeout: float | None) -> Operation[LibraryFacts]:
    """What the library covers."""
    attempts = context.attempts(timeout, context.timeouts.query)
    answer = yield from plain_call(GET_LIBRARY, library_pb2.GetLibraryRequest(), attempts)
    return LibraryFacts.from_proto(answer)


def set_label(
    context: Context, feature: FeatureKey, label: str, *, author: str, timeout: float | None
) -> Operation[FeatureFacts]:
    """Records a person's label; an empty one takes it back."""
    request = library_pb2.SetFeatureLabelRequest(feature=feature_ref(feature), label=label, author=author)
    # Setting the same label twice is setting it once, so it may be retried like everything that only reads.
    answer = yield from plain_call(SET_FEATURE_LABEL, request, context.attempts(timeout, context.timeouts.query))
    return FeatureFacts.from_proto(answer.feature)


def _examples(messages: Sequence[library_pb2.FeatureExample]) -> list[FeatureExample]:
    return [FeatureExample.from_proto(message) for message in messages]


def _limit(limit: int | None) -> int:
    if limit is None:
        return 2**31
    if limit < 1:
        raise _invalid("limit", f"{limit} is not positive; pass 1 or more, or None for all")
    return limit


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)

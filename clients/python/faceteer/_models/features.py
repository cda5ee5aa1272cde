"""What the library says about itself, about features and their pictures; what it may be asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from PIL import Image

from faceteer._errors import invalid
from faceteer._models.match import FeatureMatch
from faceteer._models.pictures import decode_picture
from faceteer._models.shown import Named, Shown
from faceteer._models.values import float32
from faceteer._models.wire import copied, number, word
from faceteer.v1 import edits_pb2, library_pb2

#: Where a label came from: "" is no label.
LabelSource = Literal["", "automatic", "model", "person"]
#: The same in words.
CausalJudge = Literal["", "text_tower", "classifier"]
# What a label's causal score is worth, in words.
JUDGES: dict[CausalJudge, str] = {
    "": "",
    "text_tower": ", judged by the text tower that gave the label too",
    "classifier": ", judged by a classifier that had no part in the label",
}
SOURCES: dict[LabelSource, str] = {
    "": "no label",
    "automatic": "labelled automatically",
    "model": "labelled by a model",
    "person": "labelled by a person",
}
#: The order of a list of features.
FeatureOrder = Literal[
    "index", "firing_share", "detection_score", "max_activation", "label", "causal_score", "disagreement"
]
#: Which examples of a feature: the strongest, or some of each quantile of its activation.
ExampleSelection = Literal["strongest", "quantiles"]

ORDERS = {
    "index": library_pb2.FEATURE_ORDER_UNSPECIFIED,
    "firing_share": library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC,
    "detection_score": library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC,
    "max_activation": library_pb2.FEATURE_ORDER_MAX_ACTIVATION_DESC,
    "label": library_pb2.FEATURE_ORDER_LABEL,
    "causal_score": library_pb2.FEATURE_ORDER_CAUSAL_SCORE_DESC,
    "disagreement": library_pb2.FEATURE_ORDER_SCORE_DISAGREEMENT_DESC,
}
SELECTIONS = {
    "strongest": library_pb2.EXAMPLE_SELECTION_STRONGEST,
    "quantiles": library_pb2.EXAMPLE_SELECTION_QUANTILES,
}


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
        causal_score: how well the label says what it causes: the share of other labels towards which its icon changes
            less than towards this one. None when not measured, as where the icon shows no change.
        histogram: None in lists.
        detection_balanced_accuracy: the same as detection_score as the mean of the shares of firing and of silent
            pictures that are classified correctly; None when not measured.
        causal_judge: who measured causal_score: "text_tower", the bundle's own, which the label comes from too;
            "classifier", one that had no part in the label; empty where nobody did.
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
    detection_balanced_accuracy: float | None = None
    causal_judge: CausalJudge = ""


@dataclass(frozen=True)
class RelatedFeature(Named):
    """Another feature and how strongly it is related; each list says what its ``score`` means."""

    index: int
    label: str
    score: float


@dataclass(frozen=True)
class FeatureExample(Shown):
    """A picture on which a feature fires.

    Attributes:
        picture: its name in the corpus.
        activation: the feature's activation on it, RAW.
        thumbnail: a small picture of it; one blank pixel where the library keeps none.
        caption: may be empty.
        quantile_from: the quantiles of the activation between which it was drawn, 0 to 1; both 0 for one of the
            strongest.
        quantile_to: see ``quantile_from``.
        data: the thumbnail as the server sent it, a whole file; empty where the library keeps none.
    """

    picture: str
    activation: float
    thumbnail: Image.Image
    caption: str
    quantile_from: float = 0.0
    quantile_to: float = 0.0
    data: bytes = field(default=b"", repr=False, compare=False)

    @classmethod
    def from_proto(cls, message: library_pb2.FeatureExample) -> FeatureExample:
        """From the wire. Raises InternalError when the thumbnail cannot be read."""
        thumbnail = decode_picture(message.thumbnail) if message.thumbnail else Image.new("L", (1, 1))
        return copied(cls, message, thumbnail=thumbnail, data=message.thumbnail)


class FeatureExamples(Shown, list[FeatureExample]):
    """Pictures on which a feature fires; a list that a notebook shows as pictures."""

    @classmethod
    def from_proto(cls, messages: Iterable[library_pb2.FeatureExample]) -> FeatureExamples:
        """From the wire."""
        return cls(map(FeatureExample.from_proto, messages))


@dataclass(frozen=True)
class FeatureFacts(Named):
    """All that the library says about one feature.

    Attributes:
        index: in [0, d_sae).
        label: empty when nobody knows.
        label_source: who says so.
        statistics: how it behaves on the corpus.
        coactivating: fire together with it; score is the lift. Empty in lists, as the next two.
        rivals: rarely or never do; score is the lift.
        nearest: closest decoder directions; score is the cosine.
        safety_class: the operator's; empty for none.
        score: how well it fits the search that found it; None otherwise.
        terms: other words that describe it, best first.
        label_rank: which of the features with its label it is; the first is the one that the label means.
        label_count: how many features have its label.
        match: how a name led to it; None where it was not named.
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
    terms: tuple[str, ...] = ()
    label_rank: int = 0
    label_count: int = 0
    # The same feature, however it was found.
    match: FeatureMatch | None = field(default=None, compare=False)

    @classmethod
    def from_proto(
        cls,
        message: library_pb2.Feature,
        detail: library_pb2.FeatureDetail | None = None,
        score: float | None = None,
        match: edits_pb2.FeatureMatch | None = None,
    ) -> FeatureFacts:
        """From the wire."""
        source = word(library_pb2.LabelSource, message.label_source)
        judge = word(library_pb2.CausalJudge, message.causal_judge)
        histogram = None
        if detail is not None and detail.histogram_edges:
            histogram = Histogram(tuple(detail.histogram_edges), tuple(detail.histogram_counts))
        statistics = copied(
            FeatureStatistics,
            message,
            mean=message.mean_activation,
            max=message.max_activation,
            histogram=histogram,
            causal_judge="" if judge == "unspecified" else judge,
        )
        related: dict[str, tuple[RelatedFeature, ...]] = dict.fromkeys(("coactivating", "rivals", "nearest"), ())
        if detail is not None:
            related = {name: tuple(copied(RelatedFeature, one) for one in getattr(detail, name)) for name in related}
        return copied(
            cls,
            message,
            label_source="" if source == "unspecified" else source,
            statistics=statistics,
            score=score,
            match=None if match is None else FeatureMatch.from_proto(match),
            **related,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        statistics = dict(vars(self.statistics))
        histogram = statistics.pop("histogram")
        return {
            **vars(self),
            "terms": list(self.terms),
            "match": None if self.match is None else dict(vars(self.match)),
            "statistics": statistics,
            "histogram": None if histogram is None else dict(vars(histogram)),
            "coactivating": [dict(vars(one)) for one in self.coactivating],
            "rivals": [dict(vars(one)) for one in self.rivals],
            "nearest": [dict(vars(one)) for one in self.nearest],
        }


@dataclass(frozen=True)
class LibraryFacts:
    """What the library covers.

    Attributes:
        revision: of the library.
        bundle: the models' name.
        sae_revision: the SAE whose features these are.
        corpus: a name for the pictures it was made from; empty when it has none.
        n_pictures: how many.
        n_features: features in all, dead ones included.
        n_alive: features that fire on the corpus.
        n_labelled: features with a label.
        safety_classes: those that occur; empty unless the caller may see them.
        searches_meaning: whether words are also matched by meaning, through CLIP's text space.
        created: when it was made, UTC, ISO 8601; empty when it does not say.
    """

    revision: str = ""
    bundle: str = ""
    sae_revision: str = ""
    corpus: str = ""
    n_pictures: int = 0
    n_features: int = 0
    n_alive: int = 0
    n_labelled: int = 0
    safety_classes: tuple[str, ...] = ()
    searches_meaning: bool = False
    created: str = ""

    @classmethod
    def from_proto(cls, message: library_pb2.GetLibraryResponse) -> LibraryFacts:
        """From the wire."""
        return copied(cls, message)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "safety_classes": list(self.safety_classes)}


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


def feature_filter(filters: FeatureFilters) -> library_pb2.FeatureFilter:
    """The filter of a list or search; None filters nothing. TypeError for an unknown name, as for any argument."""
    unknown = filters.keys() - FeatureFilters.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected filter {min(unknown)!r}; known are {', '.join(FeatureFilters.__annotations__)}")
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    sources = []
    for source in given.pop("label_sources", ()):
        if source not in get_args(LabelSource) or not source:
            raise invalid("label_sources", f"{source!r} is unknown; pass automatic, model or person")
        sources.append(number(library_pb2.LabelSource, source))
    classes = given.pop("include_safety_classes", ())
    for name, value in given.items():
        if name.startswith(("min_", "max_")):
            given[name] = float32(name, value)
    return library_pb2.FeatureFilter(
        **given, label_sources=sources, include_safety_classes=[classes] if isinstance(classes, str) else list(classes)
    )

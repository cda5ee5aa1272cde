"""What the library says: about itself, about a feature, about the pictures on which it fires.

Knows nothing of calls; each converts itself from ``faceteer.v1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from faceteer._pictures import decode_picture
from faceteer.v1 import library_pb2

#: Where a label came from: "" is no label.
LabelSource = Literal["", "automatic", "model", "person"]


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
        detection_balanced_accuracy: the same as detection_score as the mean of the shares of firing and of silent
            pictures that are told rightly; None when not measured.
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


@dataclass(frozen=True)
class RelatedFeature:
    """Another feature and how strongly it is related; what ``score`` means stands at the list."""

    index: int
    label: str
    score: float

    @property
    def name(self) -> str:
        """Its label, or "#412"."""
        return self.label or f"#{self.index}"


@dataclass(frozen=True)
class FeatureExample:
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
        return cls(
            picture=message.picture,
            activation=message.activation,
            thumbnail=decode_picture(message.thumbnail) if message.thumbnail else Image.new("L", (1, 1)),
            caption=message.caption,
            quantile_from=message.quantile_from,
            quantile_to=message.quantile_to,
            data=message.thumbnail,
        )

    def _repr_html_(self) -> str:
        from faceteer._feature_views import examples_view

        return examples_view([self])


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
        terms: other words that describe it, best first.
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

        def optional(name: str) -> float | None:
            return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]

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
                detection_score=optional("detection_score"),
                causal_score=optional("causal_score"),
                histogram=histogram,
                detection_balanced_accuracy=optional("detection_balanced_accuracy"),
            ),
            coactivating=_related(detail.coactivating) if detail is not None else (),
            rivals=_related(detail.rivals) if detail is not None else (),
            nearest=_related(detail.nearest) if detail is not None else (),
            safety_class=message.safety_class,
            score=score,
            terms=tuple(message.terms),
        )


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
        return cls(
            revision=message.revision,
            bundle=message.bundle,
            sae_revision=message.sae_revision,
            corpus=message.corpus,
            n_pictures=message.n_pictures,
            n_features=message.n_features,
            n_alive=message.n_alive,
            n_labelled=message.n_labelled,
            safety_classes=tuple(message.safety_classes),
            searches_meaning=message.searches_meaning,
            created=message.created,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "safety_classes": list(self.safety_classes)}


def _related(messages: Sequence[library_pb2.RelatedFeature]) -> tuple[RelatedFeature, ...]:
    return tuple(RelatedFeature(m.index, m.label, m.score) for m in messages)

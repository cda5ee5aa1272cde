"""All features' figures and names in memory, with people's labels laid over: what lists and searches look at.

A catalogue never changes; a person's new label makes a new one (:meth:`with_person_labels`).
At 163,840 features it takes about 40 MB, and a filter, an order and a count cost a millisecond.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from faceteer_library import standing
from faceteer_library.access import EVERYTHING, Visibility
from faceteer_library.schema import CAUSAL_JUDGES
from faceteer_library.texts import Texts
from faceteer_library.words import fold

SOURCES = ("", "automatic", "model", "person")
_PERSON = SOURCES.index("person")
FIGURES = (
    "firing_share",
    "mean",
    "p50",
    "p99",
    "max",
    "detection_score",
    "detection_balanced_accuracy",
    "causal_score",
)
JUDGES = ("", *CAUSAL_JUDGES)
_SCORES = ("detection_score", "detection_balanced_accuracy", "causal_score")


@dataclass(frozen=True, slots=True)
class Row:
    """One feature as it is shown: a person's label before an automatic one. The scores are the shown label's.

    ``label_rank`` of the ``label_count`` features that the caller sees with this label, the one that the label means
    being the first; both 0 without a label.
    """

    index: int
    label: str
    source: str
    firing_share: float
    mean: float
    p50: float
    p99: float
    max: float
    detection_score: float | None
    causal_score: float | None
    causal_judge: str
    safety_class: str
    detection_balanced_accuracy: float | None
    terms: tuple[str, ...]
    label_rank: int = 0
    label_count: int = 0


class Terms(NamedTuple):
    """Other words: those of place i are ``numbers[offsets[i]:offsets[i + 1]]``, best first.

    Attributes:
        offsets: int64 [n + 1].
        numbers: int32, numbers of texts.
    """

    offsets: np.ndarray
    numbers: np.ndarray


class Catalogue:
    """Features by place (the order of their indices).

    Attributes:
        indices: int64 [n], ascending.
        figures: float64 [n] each, by name; NaN for a score that is not known.
        texts: the library's own texts, and people's labels that are none of these.
        labels: int32 [n], the number of the shown label's text; people's own come after the library's.
        sources: int8 [n], places in :data:`SOURCES`.
        judges: int8 [n], places in :data:`JUDGES`: who measured the causal score, where there is one.
        classes: int16 [n], places in ``class_names``.
    """

    def __init__(
        self,
        indices: np.ndarray,
        figures: Mapping[str, np.ndarray],
        texts: tuple[Texts, ...],
        labels: np.ndarray,
        sources: np.ndarray,
        judges: np.ndarray,
        terms: Terms,
        classes: np.ndarray,
        class_names: Sequence[str],
        renamed: np.ndarray | None = None,
    ) -> None:
        self.indices, self.figures, self.texts = indices, figures, texts
        self.labels, self.sources, self.judges, self.terms = labels, sources, judges, terms
        self.classes, self.class_names = classes, tuple(class_names)
        self.renamed = np.zeros(0, np.int64) if renamed is None else renamed
        """Places with a person's label, which stands instead of the automatic one and its other words."""
        self._orders: dict[str, np.ndarray] = {}
        self._label_places: dict[tuple[bool, ...], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def read(cls, rows: Iterable[Sequence[Any]]) -> Catalogue:
        """From rows by index: (index, label, source, safety class, terms as JSON, judge, then :data:`FIGURES`)."""
        rows = list(rows)
        n = len(rows)
        numbers: dict[str, int] = {"": 0}
        labels, sources, judges = np.empty(n, np.int32), np.empty(n, np.int8), np.empty(n, np.int8)
        classes = np.empty(n, np.int16)
        class_numbers: dict[str, int] = {"": 0}
        words: list[int] = []
        offsets = np.zeros(n + 1, np.int64)
        for place, (_, label, source, safety_class, terms, judge, *_rest) in enumerate(rows):
            labels[place] = numbers.setdefault(label, len(numbers))
            sources[place] = SOURCES.index(source) if label else 0
            judges[place] = JUDGES.index(judge)
            classes[place] = class_numbers.setdefault(safety_class, len(class_numbers))
            if terms != "[]":
                words += [numbers.setdefault(term, len(numbers)) for term in json.loads(terms)]
            offsets[place + 1] = len(words)
        figures = {
            name: np.array([row[6 + at] for row in rows], np.float64) for at, name in enumerate(FIGURES)
        }  # None becomes NaN
        return cls(
            np.fromiter((row[0] for row in rows), np.int64, n),
            figures,
            (Texts(list(numbers)),),
            labels,
            sources,
            judges,
            Terms(offsets, np.array(words, np.int32)),
            classes,
            list(class_numbers),
        )

    def with_person_labels(self, given: Mapping[int, str]) -> Catalogue:
        """The same with people's labels; to be asked of the catalogue without any."""
        own = self.texts[0]
        labels, sources = self.labels.copy(), self.sources.copy()
        figures = dict(self.figures)
        for name in _SCORES:
            figures[name] = figures[name].copy()
        exact = {own.texts[number]: number for label in given.values() for number in own.same(label)}
        extra: dict[str, int] = {}
        renamed = []
        for index, label in given.items():
            place = self.place(index)
            if place is None:
                continue
            if fold(own.texts[labels[place]]) != fold(label):
                for name in _SCORES:
                    # They were measured on the automatic label.
                    figures[name][place] = np.nan
            renamed.append(place)
            sources[place] = _PERSON
            labels[place] = exact[label] if label in exact else len(own) + extra.setdefault(label, len(extra))
        changed = Catalogue(
            self.indices,
            figures,
            (own, Texts(list(extra))) if extra else (own,),
            labels,
            sources,
            self.judges,
            self.terms,
            self.classes,
            self.class_names,
            np.array(sorted(renamed), np.int64),
        )
        changed.__dict__["described"] = self.described
        return changed

    def __len__(self) -> int:
        return len(self.indices)

    def place(self, index: int) -> int | None:
        """Where the feature ``index`` is; None where there is none."""
        at = int(np.searchsorted(self.indices, index))
        return at if at < len(self.indices) and self.indices[at] == index else None

    def text(self, number: int) -> str:
        """A text by its number."""
        own = len(self.texts[0])
        return self.texts[0].texts[number] if number < own else self.texts[1].texts[number - own]

    @property
    def n_texts(self) -> int:
        return sum(len(texts) for texts in self.texts)

    @cached_property
    def letters(self) -> np.ndarray:
        """Letters in each text, int32 [texts]; at least 1."""
        return np.concatenate([texts.letters for texts in self.texts])

    @cached_property
    def weak(self) -> np.ndarray:
        """Bool [n], features that a name means only where no other has it: :mod:`faceteer_library.standing`."""
        return standing.weak(self.figures, self.sources == _PERSON)

    @cached_property
    def quality(self) -> np.ndarray:
        """Float64 [n] in (0, 1], unequal: higher for what a shared name means first."""
        order = standing.order(self.indices, self.figures, self.sources == _PERSON)
        quality = np.empty(len(self))
        quality[order] = np.arange(len(self), 0, -1) / max(len(self), 1)
        return quality

    def label_places(self, visible: Visibility) -> tuple[np.ndarray, np.ndarray]:
        """(rank, count), int32 [n] each: which of the visible features that share its label, in any case, each is."""
        key = tuple(visible.sees(name) for name in self.class_names)
        if key not in self._label_places:
            seen = self.seen(visible)
            shown = self.labels != 0 if seen is None else (self.labels != 0) & seen
            first: dict[str, int] = {}
            texts = itertools.chain.from_iterable(texts.texts for texts in self.texts)
            same = np.fromiter((first.setdefault(fold(text), len(first)) for text in texts), np.int64, self.n_texts)
            places = np.flatnonzero(shown)
            labels = same[self.labels[places]]
            order = np.lexsort((-self.quality[places], labels))
            starts = np.searchsorted(labels[order], np.arange(len(first) + 1))
            ranks, counts = np.zeros(len(self), np.int32), np.zeros(len(self), np.int32)
            ranks[places[order]] = np.arange(len(order)) - starts[labels[order]] + 1
            counts[places] = np.diff(starts)[labels]
            self._label_places[key] = ranks, counts
        return self._label_places[key]

    @cached_property
    def described(self) -> Terms:
        """:attr:`terms` the other way round: the places that have each of the library's own texts among their words."""
        offsets, numbers = self.terms
        order = np.argsort(numbers, kind="stable")
        places = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(offsets))[order]
        return Terms(np.searchsorted(numbers[order], np.arange(len(self.texts[0]) + 1)), places)

    def gather(self, found: Callable[[Texts], Sequence[int] | np.ndarray]) -> np.ndarray:
        """What ``found`` finds in the library's texts and in people's, as numbers; int64."""
        base, parts = 0, []
        for texts in self.texts:
            parts.append(np.asarray(found(texts), np.int64) + base)
            base += len(texts)
        return np.concatenate(parts)

    def own_terms(self, place: int) -> np.ndarray:
        """The numbers of a feature's other words; none where a person named it."""
        if self.sources[place] == _PERSON:
            return np.empty(0, np.int32)
        return self.terms.numbers[self.terms.offsets[place] : self.terms.offsets[place + 1]]

    def row(self, place: int, visible: Visibility = EVERYTHING) -> Row:
        """One feature, as a caller sees it."""
        ranks, counts = self.label_places(visible)
        figures: dict[str, Any] = {name: float(values[place]) for name, values in self.figures.items()}
        for name in _SCORES:
            if np.isnan(figures[name]):
                figures[name] = None
        start, end = self.terms.offsets[place : place + 2]
        return Row(
            index=int(self.indices[place]),
            label=self.text(int(self.labels[place])),
            source=SOURCES[self.sources[place]],
            causal_judge=JUDGES[self.judges[place]] if figures["causal_score"] is not None else "",
            safety_class=self.class_names[self.classes[place]],
            terms=tuple(self.text(int(number)) for number in self.terms.numbers[start:end]),
            label_rank=int(ranks[place]),
            label_count=int(counts[place]),
            **figures,
        )

    def seen(self, visible: Visibility) -> np.ndarray | None:
        """Bool [n], the features that a call sees; None for all."""
        classes = np.array([visible.sees(name) for name in self.class_names])
        return None if classes.all() else classes[self.classes]

    def sees(self, visible: Visibility, place: int) -> bool:
        """The same for one feature."""
        return visible.sees(self.class_names[self.classes[place]])

    def order(self, name: str) -> np.ndarray:
        """All places in an order (see :data:`ORDERS`), ties by index; found once."""
        order = self._orders.get(name)
        if order is None:
            order = self._orders[name] = np.lexsort((np.arange(len(self)), ORDERS[name](self)))
        return order

    def alphabet(self) -> np.ndarray:
        """Each text's place in the alphabet, int64 [texts]; the empty text is last."""
        texts = [text for part in self.texts for text in part.texts]
        by_name = sorted(range(len(texts)), key=lambda number: (not texts[number], fold(texts[number])))
        places = np.empty(len(texts), np.int64)
        # Texts that differ only in case rank equally.
        same = [at > 0 and fold(texts[number]) == fold(texts[by_name[at - 1]]) for at, number in enumerate(by_name)]
        places[by_name] = np.cumsum(~np.array(same, bool))
        return places


def _descending(name: str) -> Callable[[Catalogue], np.ndarray]:
    # NaN sorts last in either direction.
    return lambda catalogue: -catalogue.figures[name]


ORDERS: Mapping[str, Callable[[Catalogue], np.ndarray]] = {
    "index": lambda catalogue: catalogue.indices,
    "firing_share": _descending("firing_share"),
    "detection_score": _descending("detection_score"),
    "causal_score": _descending("causal_score"),
    "max": _descending("max"),
    "label": lambda catalogue: catalogue.alphabet()[catalogue.labels],
    "score_disagreement": lambda catalogue: (
        -np.abs(catalogue.figures["detection_score"] - catalogue.figures["causal_score"])
    ),
}
"""What to sort by, ascending; missing scores last."""

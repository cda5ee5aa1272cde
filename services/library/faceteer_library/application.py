"""What the library answers to one caller: which features it may see, which limits hold, in which order to look.

Blocking, since SQLite is; the servicer calls every method on a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from faceteer_runtime.errors import BatchTooLarge, FaceteerError, IconNotMade, InvalidField, UnknownFeature
from faceteer_runtime.icons import STRENGTHS, TEMPLATE, unpack_template

from faceteer_library.access import AccessPolicy, Visibility
from faceteer_library.catalogue import Row
from faceteer_library.filters import Filter
from faceteer_library.naming import Match
from faceteer_library.pages import Page
from faceteer_library.person_labels import PersonLabels
from faceteer_library.schema import RELATIONS
from faceteer_library.store import Example, Facts, Hit, Resolved, Store

MAX_FEATURES, MAX_LABEL, MAX_WORDS = 1000, 120, 1000


class Reference(NamedTuple):
    """A feature that a request names by index or label, and the request's field that does."""

    feature: int | str
    field: str


class Criteria(NamedTuple):
    """Which features a list or search keeps: a filter, the gated safety classes it names, and the caller's key."""

    filter: Filter
    safety_classes: tuple[str, ...]
    key: str


class Detail(NamedTuple):
    """One feature, whole.

    Attributes:
        row: the feature.
        match: how a name led to it.
        histogram_edges, histogram_counts: float32 [n], int64 [n].
        relatives: by relation (:data:`faceteer_library.schema.RELATIONS`): (index, label, score), best first.
    """

    row: Row
    match: Match
    histogram_edges: np.ndarray
    histogram_counts: np.ndarray
    relatives: dict[str, Sequence[tuple[int, str, float]]]


@dataclass(frozen=True)
class Icon:
    """A stored icon (``webp``), or what to draw one from (``template``, float32 [d]).

    ``strengths`` are SCALED, left to right: those in the icon, or those to draw.
    """

    index: int
    strengths: Sequence[float]
    webp: bytes | None = None
    template: np.ndarray | None = None


class NotWritable(FaceteerError):
    """People's labels cannot be kept where the settings say."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_IN_BUNDLE"

    def __init__(self, fault: str) -> None:
        super().__init__(
            f"labels cannot be written ({fault}); let FACETEER_LIBRARY_LABELS_PATH name a file in a writable directory"
        )


class Library:
    """A store, as far as each caller may see it. ``key`` is the caller's access key; empty for none."""

    def __init__(self, store: Store, labels: PersonLabels, access: AccessPolicy) -> None:
        self._store = store
        self._labels = labels
        self._access = access

    @property
    def meta(self) -> dict[str, str]:
        """Facts about the library as a whole."""
        return self._store.meta

    @property
    def searches_meaning(self) -> bool:
        """Whether words are also matched by their embedding."""
        return self._store.searches_meaning

    @property
    def embed_dim(self) -> int:
        """The length of the embeddings that words are matched by; 0 where they are not."""
        return self._store.embed_dim

    def facts(self, key: str) -> Facts:
        """What the library covers."""
        return self._store.facts(self._access.named(key))

    def feature(self, reference: Reference, key: str) -> Detail:
        """One feature, whole. Raises UnknownFeature."""
        visible = self._access.named(key)
        row, match = self._find(reference, visible)
        relatives = {relation: self._store.relatives(row.index, relation, visible) for relation in RELATIONS}
        return Detail(row, match, *self._store.histogram(row.index), relatives)

    def features(
        self, references: Sequence[Reference], allow_missing: bool, key: str
    ) -> tuple[list[Resolved], list[int]]:
        """Many features, in order, and the places in ``references`` of those that are left out.

        Raises:
            UnknownFeature: one is not there, and ``allow_missing`` is false.
            BatchTooLarge, InvalidField: too many, or none.
        """
        if not references:
            raise InvalidField("features", "is empty; give at least one")
        if len(references) > MAX_FEATURES:
            raise BatchTooLarge("features", len(references), MAX_FEATURES)
        visible = self._access.named(key)
        found = self._store.get_many([reference.feature for reference in references], visible)
        missing = [at for at, one in enumerate(found) if one is None]
        if missing and not allow_missing:
            self._find(references[missing[0]], visible)
        return [one for one in found if one is not None], missing

    def list(self, criteria: Criteria, order: str, page: Page) -> tuple[Sequence[Row], int]:
        """Features in an order of :data:`faceteer_library.catalogue.ORDERS`, and how many match in all."""
        return self._store.list(criteria.filter, order, *page, self._listed(criteria))

    def search(
        self, words: str, embeds: np.ndarray | None, criteria: Criteria, page: Page
    ) -> tuple[Sequence[Hit], int]:
        """Features by words and, with the words' embedding float32 [d], by meaning."""
        if len(words) > MAX_WORDS:
            raise InvalidField("words", f"must be at most {MAX_WORDS} characters")
        if embeds is not None and not embeds.any():
            raise InvalidField("words_embeds.data", "must not be all zero")
        return self._store.search(words, criteria.filter, *page, embeds, self._listed(criteria))

    def nearly_spelt(self, words: str, criteria: Criteria) -> Sequence[str]:
        """At most five labels that the words may be a misspelling of, closest first."""
        return self._store.nearly_spelt(words, self._listed(criteria))

    def similar(self, reference: Reference, criteria: Criteria, page: Page) -> tuple[Sequence[Hit], int]:
        """Features like one. Raises UnknownFeature."""
        listed = self._listed(criteria)
        row, _ = self._find(reference, self._access.named(criteria.key))
        return self._store.similar(row.index, criteria.filter, *page, listed)

    def firing(
        self, indices: np.ndarray, activations: np.ndarray, criteria: Criteria, page: Page
    ) -> tuple[Sequence[Hit], int]:
        """The features of one picture: indices int64 [k] and RAW activations float32 [k]."""
        return self._store.firing(indices, activations, criteria.filter, *page, self._listed(criteria))

    def examples(self, reference: Reference, selection: str, page: Page, key: str) -> tuple[Sequence[Example], int]:
        """Pictures on which a feature fires, and how many are kept. Raises UnknownFeature."""
        row, _ = self._find(reference, self._access.named(key))
        return self._store.examples(row.index, *page, selection)

    def icon(self, reference: Reference, key: str) -> Icon:
        """A feature's icon, or what it can be drawn from.

        Raises:
            IconNotMade: neither: the library has no template, or the feature never fired and so has no strengths.
            UnknownFeature: there is no such feature.
        """
        row, _ = self._find(reference, self._access.named(key))
        stored = self._store.icon(row.index)
        if stored is not None:
            return Icon(row.index, stored[1], webp=stored[0])
        if row.p99 <= 0:
            raise IconNotMade(row.index)
        try:
            template = unpack_template(self.meta.get(TEMPLATE, ""))
        except ValueError:
            raise IconNotMade(row.index) from None
        return Icon(row.index, STRENGTHS, template=template)

    def set_label(self, reference: Reference, label: str, author: str, key: str) -> Row:
        """Records a person's label, or removes it when the text is empty; returns the feature as it is then shown.

        Raises:
            InvalidField: a text of several lines, or too long.
            NotWritable: the labels' file cannot be written.
            UnknownFeature: there is no such feature.
        """
        label, author = label.strip(), author.strip()
        for name, text in (("label", label), ("author", author)):
            if len(text) > MAX_LABEL or not text.isprintable():
                raise InvalidField(name, f"must be one line of at most {MAX_LABEL} printable characters")
        visible = self._access.named(key)
        # A word that merely means the feature must not rename it.
        row, _ = self._find(reference, visible, by_label=True)
        try:
            self._labels.set(row.index, label, author)
        except OSError as error:
            raise NotWritable(str(error)) from error
        return self._store.get(row.index, visible)

    def _find(self, reference: Reference, visible: Visibility, *, by_label: bool = False) -> Resolved:
        try:
            if isinstance(reference.feature, int):
                return Resolved(self._store.get(reference.feature, visible), Match())
            return self._store.resolve(reference.feature, visible, by_label=by_label)
        except UnknownFeature as error:
            raise error.at(reference.field) from None

    def _listed(self, criteria: Criteria) -> Visibility:
        return self._access.listed(criteria.key, criteria.safety_classes)

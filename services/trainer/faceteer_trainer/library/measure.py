"""What a corpus says about every feature: embeddings are read once, all else is computed from activations on disk.

    embeddings ──► activations (disk) ──► spread, tables, pairs ──► examples, relatives ──► library.sqlite

Memory depends on the dictionary and not on the corpus: 163,840 features take about 3 GB besides the SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.rivals import RivalRule, Rivals, find_rivals

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.library.activations import ActivationStore, spans
from faceteer_trainer.library.encoding import Active, BulkEncoder
from faceteer_trainer.library.related import Relatives, coactivating_common, coactivating_sampled
from faceteer_trainer.library.tallies import Pairs, Spread, Table, lottery

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Report = Callable[[str, float], None]
_ROWS = 8192
# No useful SAE fires a twentieth of a large dictionary at once; wrong preprocessing does. Small dictionaries may.
_MOST_ACTIVE, _NEVER_TOO_MANY = 0.05, 512
# Pictures drawn for each feature, for examples from quantiles and for what fires together with a rare feature.
_SAMPLE = 64
# Activations of sampled pictures that are held at a time: 0.5 GB with what is computed from them.
_HELD = 16_000_000


@dataclass(frozen=True)
class BuildSettings:
    """What to keep for each feature.

    Attributes:
        examples: strongest pictures.
        per_quantile: pictures drawn from each quarter of the activation.
        relatives: features in each list.
        common: features whose pairs are counted exactly; the rest is estimated from up to 64 of their pictures.
        seed: of everything that is drawn.
        bins: of the histogram.
        rule: for rivals.
    """

    examples: int = 24
    per_quantile: int = 4
    relatives: int = 12
    common: int = 8192
    seed: int = 0
    bins: int = 16
    rule: RivalRule = field(default_factory=RivalRule)


@dataclass
class CorpusStatistics:
    """What the corpus says about every feature; the tables are by feature."""

    pictures: int
    spread: Spread
    p99: Floats
    best: Table
    sample: Table
    rivals: Rivals
    any: Pairs
    l0: npt.NDArray[np.int32]

    @property
    def firing_share(self) -> Floats:
        """The share of pictures on which each feature fires, float32 [d_sae]."""
        return (self.spread.count / self.pictures).astype(np.float32)


def encode_corpus(
    corpus: EmbeddingCorpus, sae: SparseAutoencoder, store: ActivationStore, report: Report, device: str = "cpu"
) -> None:
    """Writes the activations of every embedding; existing ones are not recomputed.

    Raises:
        JobError: an embedding is not finite, or far too many features fire.
    """
    encoder: BulkEncoder | None = None
    for first, x in corpus.chunks(_ROWS):
        if not store.has(first):
            encoder = encoder or BulkEncoder(sae, device)
            active = encoder.encode(x)
            mean_l0 = len(active.indices) / len(x)
            if mean_l0 > max(_MOST_ACTIVE * sae.d_sae, _NEVER_TOO_MANY):
                raise JobError(
                    f"{mean_l0:.0f} of {sae.d_sae} features fire on a picture on average, which no trained SAE does; "
                    "were the embeddings normalised, or made by another encoder or preprocessing than the SAE's?"
                )
            store.write(first, active)
        report("reading embeddings", (first + len(x)) / len(corpus))


def measure(
    store: ActivationStore, pictures: int, d_sae: int, settings: BuildSettings, report: Report
) -> CorpusStatistics:
    """Statistics, tables and pair counts, in three readings of the activations."""
    largest, read = 0.0, 0
    for _, active in store.blocks():
        largest = max(largest, float(active.values.max(initial=0.0)))
    spread = Spread(d_sae, largest or 1.0)
    l0: list[npt.NDArray[np.int32]] = []
    for first, active in store.blocks():
        spread.add(active)
        l0.append(np.diff(active.indptr).astype(np.int32))
        report("counting", (first + len(active.indptr)) / pictures)
    p99 = spread.quantile(0.99)
    commonest = np.sort(np.argsort(-spread.count, kind="stable")[: settings.common])
    commonest = commonest[spread.count[commonest] > 0]
    best, sample = Table(d_sae, 3 * settings.examples), Table(d_sae, _SAMPLE)
    any_pairs, strong_pairs = Pairs(commonest, d_sae), Pairs(commonest, d_sae)
    strong_count = np.zeros(d_sae, np.int64)
    for first, active in store.blocks():
        rows = active.rows + first
        best.add(active.indices, rows, active.values, active.values)
        sample.add(active.indices, rows, active.values, lottery(active.indices, rows, settings.seed))
        strong = active.values > settings.rule.strong * p99[active.indices]
        np.add.at(strong_count, active.indices[strong], 1)
        any_pairs.add(active)
        strong_pairs.add(active, strong)
        read = first + len(active.indptr)
        report("examples and pairs", read / pictures)
    rivals = find_rivals(strong_pairs.features, strong_pairs.together, strong_count, pictures, settings.rule)
    return CorpusStatistics(pictures, spread, p99, best, sample, rivals, any_pairs, np.concatenate(l0))


def find_coactivating(
    store: ActivationStore, measured: CorpusStatistics, settings: BuildSettings, report: Report
) -> dict[int, Relatives]:
    """Features that fire together: exactly among the commonest, from samples of their pictures for all others."""
    count, pictures = measured.spread.count, measured.pictures
    found = coactivating_common(measured.any, count, pictures, settings.relatives)
    rare = np.flatnonzero((count > 0) & ~np.isin(np.arange(len(count)), measured.any.features))
    entries = measured.sample.entries()
    at_once = max(1, int(_HELD / (_SAMPLE * max(float(measured.l0.mean()), 1.0))))
    for start in range(0, len(rare), at_once):
        block = rare[start : start + at_once]
        inside = np.isin(entries.features, block)
        wanted, inverse = np.unique(entries.rows[inside], return_inverse=True)
        fired = store.rows(wanted)
        features = entries.features[inside]
        starts, stops = np.searchsorted(features, block), np.searchsorted(features, block, side="right")
        for place, feature in enumerate(block.tolist()):
            sampled = _rows_of(fired, inverse[starts[place] : stops[place]])
            found[feature] = coactivating_sampled(sampled, count, pictures, settings.relatives, feature)
        report("features that fire together", (start + len(block)) / len(rare))
    return found


def _rows_of(active: Active, rows: Ints) -> Active:
    """Some pictures of many."""
    counts = active.indptr[rows + 1] - active.indptr[rows]
    taken = spans(active.indptr[rows], counts)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Active(indptr, active.indices[taken], active.values[taken])

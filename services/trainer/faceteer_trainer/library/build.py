"""Builds a feature library: embeddings are read once, everything else is reckoned from the activations on disk.

    embeddings ──► activations (disk) ──► spread, tables, pairs ──► examples, relatives ──► library.sqlite

Memory depends on the dictionary and not on the corpus: 163,840 features take about 3 GB besides the SAE. Knows nothing
of labels.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.icons import TEMPLATE, pack_template
from faceteer_sae.model import SparseAutoencoder

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.library.activations import ActivationStore, spans
from faceteer_trainer.library.encoding import Active, BulkEncoder
from faceteer_trainer.library.examples import QUANTILES, Chosen, from_quantiles, strongest
from faceteer_trainer.library.related import (
    Relatives,
    RivalRule,
    Rivals,
    coactivating_common,
    coactivating_sampled,
    nearest,
    rivals,
)
from faceteer_trainer.library.tallies import Pairs, Spread, Table, lottery

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Report = Callable[[str, float], None]
_ROWS = 8192
_FEATURES = 256
# Of a large dictionary no SAE that is of use fires a twentieth at once; wrong preprocessing does. Small ones may.
_MOST_ACTIVE, _NEVER_TOO_MANY = 0.05, 512
# Pictures drawn for each feature, for examples from quantiles and for what fires together with a rare feature.
_SAMPLE = 64
# Activations of sampled pictures that are held at a time: 0.5 GB with what is reckoned from them.
_HELD = 16_000_000
# Features whose candidates' embeddings are held at a time: with 72 each of 1,280 values 0.19 GB at most.
_CHOSEN_AT_ONCE = 512


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
class Measured:
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
    """Writes the activations of every embedding; what is there already is not computed again.

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


def measure(store: ActivationStore, pictures: int, d_sae: int, settings: BuildSettings, report: Report) -> Measured:
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
    found_rivals = rivals(strong_pairs, strong_count, pictures, settings.rule)
    return Measured(pictures, spread, p99, best, sample, found_rivals, any_pairs, np.concatenate(l0))


def find_coactivating(
    store: ActivationStore, measured: Measured, settings: BuildSettings, report: Report
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


def choose_examples(
    corpus: EmbeddingCorpus, measured: Measured, settings: BuildSettings, report: Report
) -> Iterator[tuple[int, list[Chosen]]]:
    """Every live feature's examples."""
    mean = corpus.rows(np.linspace(0, len(corpus) - 1, min(len(corpus), 4096)).astype(np.int64)).mean(0)
    best, sample = measured.best.entries(), measured.sample.entries()
    alive = np.flatnonzero(measured.spread.count)
    for start in range(0, len(alive), _CHOSEN_AT_ONCE):
        part = alive[start : start + _CHOSEN_AT_ONCE]
        tops = [best.of(feature) for feature in part.tolist()]
        # Many features' pictures at once: their embeddings lie all over the corpus, and each reach into it costs.
        rows, inverse = np.unique(np.concatenate([top.rows for top in tops]), return_inverse=True)
        embeds = corpus.rows(rows) - mean
        places = np.split(inverse, np.cumsum([len(top.rows) for top in tops])[:-1])
        for feature, top, here in zip(part.tolist(), tops, places, strict=True):
            drawn = sample.of(feature)
            chosen = strongest(top.rows, top.values, embeds[here], settings.examples)
            ranks = measured.spread.rank(drawn.features, drawn.values)
            taken = {example.row for example in chosen}
            chosen += from_quantiles(drawn.rows, drawn.values, ranks, settings.per_quantile, taken)
            yield feature, chosen
        report("choosing examples", (start + len(part)) / len(alive))


def write_library(
    path: Path,
    corpus: EmbeddingCorpus,
    sae: SparseAutoencoder,
    sae_revision: str,
    store: ActivationStore,
    measured: Measured,
    settings: BuildSettings,
    report: Report,
    device: str = "cpu",
) -> None:
    """Writes the library file, whole or not at all."""
    spread = measured.spread
    quantiles = {"p50": spread.quantile(0.5), "p99": measured.p99}
    mean, share = spread.mean(), measured.firing_share
    path.parent.mkdir(parents=True, exist_ok=True)
    with LibraryWriter(
        path,
        sae_revision=sae_revision,
        corpus=corpus.card.name,
        n_pictures=len(corpus),
        encoder_revision=corpus.encoder_revision,
        embed_dim=corpus.embed_dim,
    ) as writer:
        for feature in range(sae.d_sae):
            edges, counts = spread.histogram(feature, settings.bins)
            writer.feature(
                FeatureRow(
                    feature,
                    "",
                    float(share[feature]),
                    float(mean[feature]),
                    float(quantiles["p50"][feature]),
                    float(quantiles["p99"][feature]),
                    float(spread.max[feature]),
                    edges if spread.count[feature] else np.empty(0, np.float32),
                    counts if spread.count[feature] else np.empty(0, np.int64),
                )
            )
            if feature % 4096 == 0:
                report("writing statistics", feature / sae.d_sae)
        writer.meta(TEMPLATE, pack_template(_plainest(corpus)))
        alive = np.flatnonzero(spread.count)
        for relation, relatives in (
            ("rivals", {f: measured.rivals.best(f, settings.relatives) for f in alive.tolist()}),
            ("coactivating", find_coactivating(store, measured, settings, report)),
            ("nearest", nearest(sae.decoder_rows, settings.relatives, alive, device, report)),
        ):
            for feature, others in relatives.items():
                writer.relatives(feature, relation, others)
        _write_examples(writer, corpus, choose_examples(corpus, measured, settings, report), report)


def _write_examples(
    writer: LibraryWriter, corpus: EmbeddingCorpus, chosen: Iterator[tuple[int, list[Chosen]]], report: Report
) -> None:
    """By shards, so that each one's pictures are read once and never more than one shard's lie in memory.

    What waits for its shard takes 21 bytes an example: full size has millions of them.
    """
    features, rows, activations = array("i"), array("q"), array("f")
    ranks, quantiles = array("i"), array("b")
    for feature, examples in chosen:
        for example in examples:
            features.append(feature)
            rows.append(example.row)
            activations.append(example.activation)
            ranks.append(example.rank)
            quantiles.append(-1 if example.selection == "strongest" else QUANTILES.index(example.quantiles))
    order = np.argsort(np.asarray(rows), kind="stable")
    starts = np.cumsum([0, *(shard.rows for shard in corpus.card.shards)])
    bounds = np.searchsorted(np.asarray(rows)[order], starts)
    for shard in range(len(starts) - 1):
        entries = order[bounds[shard] : bounds[shard + 1]]
        shown, inverse = np.unique(np.asarray(rows)[entries], return_inverse=True)
        pictures = corpus.pictures(shown)
        for entry, picture in zip(entries.tolist(), inverse.tolist(), strict=True):
            name, caption, thumbnail = pictures[picture]
            drawn = quantiles[entry]
            between = QUANTILES[drawn] if drawn >= 0 else (0.0, 0.0)
            row = ExampleRow(name, activations[entry], thumbnail, caption, between)
            writer.example(features[entry], "strongest" if drawn < 0 else "quantiles", ranks[entry], row)
        report("writing examples", (shard + 1) / (len(starts) - 1))


def _plainest(corpus: EmbeddingCorpus) -> Floats:
    """The embedding nearest to the mean, of some thousand: what icons start from."""
    sample = corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 4096)).astype(np.int64)))
    return np.asarray(sample[np.linalg.norm(sample - sample.mean(0), axis=1).argmin()])


def _rows_of(active: Active, rows: Ints) -> Active:
    """Some pictures of many."""
    counts = active.indptr[rows + 1] - active.indptr[rows]
    taken = spans(active.indptr[rows], counts)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Active(indptr, active.indices[taken], active.values[taken])

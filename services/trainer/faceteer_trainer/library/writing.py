"""Writes a library: each feature's statistics, the features related to it, and pictures that show what it is.

Examples are the strongest pictures, near-identical ones once, and some from every quantile; embeddings tell which
pictures are nearly the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.icons import TEMPLATE, pack_template
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.measure import BuildSettings, CorpusStatistics, Floats, Ints, Report, find_coactivating
from faceteer_trainer.library.related import nearest
from faceteer_trainer.library.templates import plainest

# Features whose candidates' embeddings are held at a time: with 72 each of 1,280 values 0.19 GB at most.
_CHOSEN_AT_ONCE = 512
# Cosine of the embeddings, with the corpus' mean taken off, above which two pictures count as the same one.
SAME = 0.98
# The fact in the meta of a library whose corpus is unlike the SAE's own: the share of pictures that are.
FOREIGN = "foreign_corpus"
# From here on a corpus counts as unlike.
MOST_UNLIKE = 0.5
QUANTILES = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))


class Chosen(NamedTuple):
    """One example of one feature: its place in the list, the picture, the activation, between which quantiles."""

    selection: str
    rank: int
    row: int
    activation: float
    quantiles: tuple[float, float] = (0.0, 0.0)


def strongest(rows: Ints, values: Floats, embeds: Floats, most: int) -> list[Chosen]:
    """The first `most` of the candidates, strongest first, leaving out what looks like one that is in already.

    ``embeds``: of the candidates' pictures, centred, float32 [m, d].
    """
    kept: list[int] = []
    if len(rows) > 1:
        vectors = embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)
        same = vectors @ vectors.T > SAME
        for place in range(len(rows)):
            if not same[place, kept].any():
                kept.append(place)
            if len(kept) == most:
                break
    else:
        kept = list(range(len(rows)))
    return [Chosen("strongest", rank, int(rows[p]), float(values[p])) for rank, p in enumerate(kept)]


def from_quantiles(rows: Ints, values: Floats, ranks: Floats, each: int, taken: set[int]) -> list[Chosen]:
    """Up to `each` pictures of a uniform sample from every quantile of the activation, the strongest quantile first.

    ``ranks``: the share of the feature's pictures that are weaker, for each of the sample; ``taken`` are left out.
    """
    found: list[Chosen] = []
    for low, high in QUANTILES:
        inside = [p for p in range(len(rows)) if low <= ranks[p] < high or (high == 1.0 and ranks[p] >= low)]
        inside = [p for p in inside if int(rows[p]) not in taken][:each]
        for place in sorted(inside, key=lambda p: -values[p]):
            found.append(Chosen("quantiles", len(found), int(rows[place]), float(values[place]), (low, high)))
    return found


def choose_examples(
    corpus: EmbeddingCorpus, measured: CorpusStatistics, settings: BuildSettings, report: Report
) -> Iterator[tuple[int, list[Chosen]]]:
    """Every live feature's examples."""
    mean = corpus.rows(_evenly(len(corpus))).mean(0)
    best, sample = measured.best.entries(), measured.sample.entries()
    alive = np.flatnonzero(measured.spread.count)
    for start in range(0, len(alive), _CHOSEN_AT_ONCE):
        part = alive[start : start + _CHOSEN_AT_ONCE]
        tops = [best.of(feature) for feature in part.tolist()]
        # Many features' pictures at once: their embeddings are spread over the corpus, and each access costs.
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
    measured: CorpusStatistics,
    settings: BuildSettings,
    report: Report,
    device: str = "cpu",
    kept: FeatureStatistics | None = None,
    unlike: float = 0.0,
) -> None:
    """Writes the library file, whole or not at all.

    With ``kept``, the statistics that the SAE goes on having, the 99th percentiles are theirs, and what never fired
    there counts as never fired here. ``unlike``: the share of pictures unlike the SAE's own corpus.
    """
    spread = measured.spread
    quantiles = {"p50": spread.quantile(0.5), "p99": measured.p99}
    mean, share = spread.mean(), measured.firing_share
    if kept is not None:
        quantiles["p99"] = kept.p99
        share = np.where(kept.p99 > 0, share, 0)
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
        if unlike > MOST_UNLIKE:
            writer.meta(FOREIGN, f"{unlike:.3f}")
        writer.meta(TEMPLATE, pack_template(plainest(corpus.rows(_evenly(len(corpus))))))
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
    """By shards, so that each one's pictures are read once and at most one shard's are in memory.

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


def _evenly(count: int) -> Ints:
    """Some thousand rows, evenly over the corpus."""
    return np.unique(np.linspace(0, count - 1, min(count, 4096)).astype(np.int64))

"""How quickly a library of the published size answers: 163,840 features, 50,000 distinct labels, 1,280-d meanings.

The library is synthetic (about a minute, 300 MB, in a temporary directory): labels of one to three words drawn by
Zipf's law from 12,000, five other words a feature, meanings that share a common part, and variances falling like
1 / rank, roughly as in CLIP's text space. Everything is asked of the store, in one thread, after one unmeasured round;
times are wall-clock milliseconds. Usage: ``python benchmarks/library_search.py [--features N] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from faceteer_library.filters import Filter
from faceteer_library.label_embeddings import LabelEmbeddings
from faceteer_library.person_labels import PersonLabels
from faceteer_library.store import Store
from faceteer_library.writer import FeatureRow, LibraryWriter
from faceteer_runtime.errors import UnknownFeature

DIM, LABELS, WORDS = 1280, 50_000, 12_000


def vocabulary(rng: np.random.Generator) -> list[str]:
    """Distinct pronounceable words of 4 to 10 letters."""
    words: dict[str, None] = {}
    while len(words) < WORDS:
        syllables = rng.integers(2, 6)
        words["".join(rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(syllables))] = None
    return list(words)


def make(path: Path, n_features: int) -> tuple[list[str], list[str]]:
    """Writes the library; returns its words, commonest first, and its distinct labels."""
    rng = np.random.default_rng(0)
    words = vocabulary(rng)
    share = 1 / np.arange(1, WORDS + 1)
    share /= share.sum()
    labels: dict[str, None] = {}
    while len(labels) < min(LABELS, n_features):
        drawn = rng.choice(WORDS, (LABELS, 3), p=share)
        for row, count in zip(drawn.tolist(), rng.integers(1, 4, LABELS).tolist(), strict=True):
            labels[" ".join(words[word] for word in dict.fromkeys(row[:count]))] = None
            if len(labels) == min(LABELS, n_features):
                break
    names = list(labels)
    scores = rng.random((n_features, 2))
    shares = rng.random(n_features) ** 8
    chosen = np.concatenate([np.arange(len(names)), rng.integers(0, len(names), n_features - len(names))])
    others = rng.choice(WORDS, (n_features, 5), p=share)
    edges, counts = np.arange(1, 33, dtype=np.float32), np.arange(32)
    nearest = rng.integers(0, n_features, (n_features, 8))
    with LibraryWriter(path, sae_revision="s", corpus="synthetic", n_pictures=1_400_000, embed_dim=DIM) as writer:
        for index in range(n_features):
            # A third of the features live, as in the published work.
            share_here = float(shares[index]) if index % 3 == 0 else 0.0
            writer.feature(
                FeatureRow(
                    index, names[chosen[index]], share_here, 1.0, 1.0, 2.0, 3.0, edges, counts,
                    detection_score=float(scores[index, 0]), causal_score=float(scores[index, 1]),
                    terms=tuple(words[word] for word in others[index]),
                )
            )  # fmt: skip
            writer.relatives(index, "nearest", [(int(other), 0.5) for other in nearest[index]])
        spectrum = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
        common = rng.standard_normal(DIM).astype(np.float32)
        common *= 1.2 * np.linalg.norm(spectrum) / np.linalg.norm(common)
        turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
        for start in range(0, len(names), 5000):
            block = names[start : start + 5000]
            rows = (rng.standard_normal((len(block), DIM)).astype(np.float32) * spectrum) @ turn + common
            for label, row in zip(block, rows, strict=True):
                writer.meaning(label, row)
    return words, names


def measure(name: str, ask: Callable[[int], object], rounds: int) -> None:
    """Prints p50 and p99 of ``ask(0)`` … ``ask(rounds - 1)``."""
    ask(0)
    times = []
    for turn in range(rounds):
        began = time.perf_counter()
        ask(turn)
        times.append((time.perf_counter() - began) * 1000)
    print(f"| {name} | {np.median(times):.2f} | {np.quantile(times, 0.99):.2f} |", flush=True)


def missing(store: Store, label: str) -> None:
    """Asks for a label that is not there."""
    try:
        store.resolve(label)
    except UnknownFeature:
        return
    raise AssertionError(f"{label} is there")


def recall(meanings: LabelEmbeddings, queries: np.ndarray) -> tuple[float, float]:
    """Mean share of the true nearest 10 and 100 labels that the screened search returns."""
    shares = []
    for query in queries:
        exact = meanings.closest(query, exactly=True).rows
        found = set(meanings.closest(query).rows.tolist())
        shares.append([np.mean([row in found for row in exact[:k].tolist()]) for k in (10, 100) if len(exact)])
    tens, hundreds = np.mean([share for share in shares if share], axis=0)
    return float(tens), float(hundreds)


def main() -> None:
    """Makes the library, asks, prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=163_840)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    rounds, rng = arguments.rounds, np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "library.sqlite"
        began = time.perf_counter()
        words, labels = make(path, arguments.features)
        print(f"made in {time.perf_counter() - began:.0f} s, {path.stat().st_size / 2**20:.0f} MiB")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        store = Store(path, Path(directory) / "people.sqlite")
        store.warm_up()
        opened = time.perf_counter() - began
        meanings = store._embeddings
        assert meanings is not None
        queries = np.stack([meanings.embeds[row].astype(np.float32) for row in rng.integers(0, len(meanings), rounds)])
        queries += rng.standard_normal(queries.shape).astype(np.float32) * 0.3 / np.sqrt(DIM)
        everything, live = Filter(), Filter(alive=True, min_detection_score=0.5)
        indices = np.arange(300) * (arguments.features // 300)
        activations = rng.random(300).astype(np.float32)
        print(f"opened in {opened:.1f} s; peak memory {before / 2**20:.2f} GiB before, "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB after")  # fmt: skip
        print("\n| question | p50, ms | p99, ms |\n|---|---|---|")
        name = words[0]
        _, total = store.search(name, everything, 0, 50)
        measure(f"the commonest word, {total:,} hits", lambda _: store.search(name, everything, 0, 50), rounds)
        measure(
            "a word, by rank 10 to 1,000", lambda n: store.search(words[10 + 5 * (n % 198)], everything, 0, 50), rounds
        )
        _, total = store.search(name[:1], everything, 0, 50)
        measure(f"one letter, {total:,} hits", lambda _: store.search(name[:1], everything, 0, 50), rounds)
        measure("two words, the second unfinished",
                lambda n: store.search(f"{words[n]} {words[0][:3]}", everything, 0, 50), rounds)  # fmt: skip
        measure("a word and its meaning", lambda n: store.search(words[n], everything, 0, 50, queries[n]), rounds)
        measure("the commonest word and its meaning, filtered",
                lambda n: store.search(name, live, 0, 50, queries[n]), rounds)  # fmt: skip
        measure("its meaning alone", lambda n: meanings.closest(queries[n]), rounds)
        measure("the same, every label compared", lambda n: meanings.closest(queries[n], exactly=True), 5)
        measure("nearest labels of a typo", lambda n: missing(store, labels[n * 7] + "xq"), rounds)
        measure("a label to its feature", lambda n: store.resolve(labels[n * 7]), rounds)
        measure("a picture's 300 features", lambda _: store.firing(indices, activations, everything, 0, 50), rounds)
        measure("features like one", lambda n: store.similar(n, everything, 0, 50), rounds)
        for order in ("label", "firing_share", "score_disagreement"):
            measure(f"a filtered list by {order}", lambda _, o=order: store.list(live, o, 1000, 50), rounds)  # type: ignore[misc]
        PersonLabels(Path(directory) / "people.sqlite").set(5, "lighthouse", "ada")
        began = time.perf_counter()
        store.search(name, everything, 0, 50)
        print(f"\nthe first search after a person's label: {(time.perf_counter() - began) * 1000:.0f} ms")
        tens, hundreds = recall(meanings, queries[:50])
        print(f"of the nearest 10 / 100 labels by meaning the screened search finds {tens:.1%} / {hundreds:.1%}; "
              f"floor {meanings.floor:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

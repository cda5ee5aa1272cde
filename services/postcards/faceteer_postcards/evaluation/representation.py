"""Measures of the encoder and of the SAE that need no decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faceteer_library.store import Store
from faceteer_runtime.errors import UnknownFeature
from faceteer_sae.reconstruction import Reconstruction
from faceteer_trainer.metrics import auc
from torch import nn

from faceteer_postcards.bundle import LoadedBundle
from faceteer_postcards.clip import value_directions, zero_shot
from faceteer_postcards.evaluation.judge import Judge
from faceteer_postcards.evaluation.metrics import monosemanticity
from faceteer_postcards.movq import to_tensor
from faceteer_postcards.words import WORDS
from faceteer_postcards.world import FACTOR_NAMES, FACTORS, VALUES

# The feature of a word that no feature has.
NOWHERE = -1


class Embedded(NamedTuple):
    """Pictures with their embeddings and their truth."""

    pictures: npt.NDArray[np.uint8]  # [n, 64, 64, 3]
    embeds: torch.Tensor  # [n, d]
    codes: npt.NDArray[np.uint8]  # [n, 8]

    def rows(self, start: int, stop: int) -> Embedded:
        """A part of them."""
        return Embedded(self.pictures[start:stop], self.embeds[start:stop], self.codes[start:stop])


class ValueFeature(NamedTuple):
    """The feature that tells one factor value best."""

    factor: str
    value: str
    feature: int
    auc: float

    @property
    def name(self) -> str:
        """factor=value."""
        return f"{self.factor}={self.value}"


def features_by_label(bundle: Path, best: list[ValueFeature]) -> list[ValueFeature]:
    """The feature that each value's word leads to, by the library's own resolver, as an edit by label does.

    ``best`` gives the values. Where the word leads nowhere the feature is -1: such an edit is refused.
    """
    library = bundle / "library" / "library.sqlite"
    # Nobody's own labels.
    store = Store(library, library.with_name("none.sqlite"))
    found = []
    for value in best:
        try:
            feature = store.resolve(WORDS[value.factor, value.value][0]).row.index
        except UnknownFeature:
            feature = NOWHERE
        found.append(value._replace(feature=feature, auc=value.auc if feature == value.feature else float("nan")))
    return found


def linear_probe(train: Embedded, test: Embedded) -> dict[str, float]:
    """Accuracy by factor of a linear classifier on raw embeddings, fitted by least squares to one-hot values."""
    ones = torch.ones(len(train.embeds), 1)
    inputs = torch.cat([train.embeds, ones], 1).double()
    gram = inputs.T @ inputs + 1e-4 * torch.eye(inputs.shape[1], dtype=torch.float64) * len(inputs)
    accuracy = {}
    for index, (name, values) in enumerate(FACTORS.items()):
        target = nn.functional.one_hot(torch.from_numpy(train.codes[:, index].astype(np.int64)), len(values)).double()
        weights = torch.linalg.solve(gram, inputs.T @ target)
        scores = torch.cat([test.embeds, torch.ones(len(test.embeds), 1)], 1).double() @ weights
        accuracy[name] = float((scores.argmax(-1).numpy() == test.codes[:, index]).mean())
    return accuracy


def measure_encoder(bundle: LoadedBundle, train: Embedded, test: Embedded) -> dict[str, Any]:
    """Zero-shot and linear-probe accuracy by factor, and their means."""
    shot = zero_shot(test.embeds, value_directions(bundle.encoder, bundle.tokenizer), test.codes)
    probe = linear_probe(train, test)
    return {
        "zero_shot": shot, "zero_shot_mean": float(np.mean(list(shot.values()))),
        "zero_shot_worst": min(shot.values()),
        "linear_probe": probe, "linear_probe_mean": float(np.mean(list(probe.values()))),
        "pictures": len(test.codes),
    }  # fmt: skip


@torch.no_grad()
def best_features(bundle: LoadedBundle, choose: Embedded, test: Embedded) -> list[ValueFeature]:
    """For each factor value the feature with the highest AUC on `choose`; the AUC reported is that on `test`."""
    chosen, held = bundle.sae.encode(choose.embeds).numpy(), bundle.sae.encode(test.embeds).numpy()
    alive = np.flatnonzero((chosen > 0).any(0))
    found = []
    for name, value in VALUES:
        index, code = FACTOR_NAMES.index(name), FACTORS[name].index(value)
        truth = choose.codes[:, index] == code
        feature = int(alive[np.argmax([auc(chosen[:, i], truth) for i in alive])])
        found.append(ValueFeature(name, value, feature, auc(held[:, feature], test.codes[:, index] == code)))
    return found


@torch.no_grad()
def measure_sae(bundle: LoadedBundle, judge: Judge, choose: Embedded, test: Embedded) -> dict[str, Any]:
    """Reconstruction, sparsity, dead share, monosemanticity and the best feature of every factor value."""
    features = bundle.sae.encode(test.embeds)
    fit = Reconstruction().add(test.embeds.numpy(), bundle.sae.decode(features).numpy())
    l0 = (features > 0).sum(-1).float()
    window = bundle.sae.encode(choose.embeds)
    dead = float(((window > 0).sum(0) == 0).float().mean())
    best = best_features(bundle, choose, test)
    scores, baseline = _monosemanticity(judge, test, features)
    return {
        "d_sae": bundle.sae.d_sae, "d_in": bundle.sae.d_in,
        "explained_variance": fit.explained_variance,
        "cosine": fit.cosine,
        "l0_mean": float(l0.mean()), "l0_quantiles": {str(q): float(l0.quantile(q)) for q in (0.01, 0.5, 0.99)},
        "dead_share": dead, "dead_window": len(window),
        "dead_share_statistics": float((bundle.statistics.firing_share == 0).mean()),
        "monosemanticity_mean": float(np.nanmean(scores)), "monosemanticity_random": float(np.nanmean(baseline)),
        "values": {b.name: {"feature": b.feature, "auc": round(b.auc, 4)} for b in best},
        "values_with_auc_95": float(np.mean([b.auc >= 0.95 for b in best])),
    }  # fmt: skip


@torch.no_grad()
def _monosemanticity(
    judge: Judge, test: Embedded, features: torch.Tensor, pictures: int = 1000
) -> tuple[list[float], list[float]]:
    """The score of each live feature, and of the same activations on shuffled pictures; similarity by the judge."""
    described = judge.describe(to_tensor(test.pictures[:pictures]))
    described = nn.functional.normalize(described - described.mean(0), dim=-1)
    similarity = (described @ described.T).numpy()
    acts = features[:pictures].numpy()
    rng = np.random.default_rng(0)
    alive = [column for column in acts.T if (column > 0).sum() > 1]
    return (
        [monosemanticity(column, similarity) for column in alive],
        [monosemanticity(rng.permutation(column), similarity) for column in alive],
    )

"""The evaluation's formulas against numbers done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from faceteer_postcards.evaluation.metrics import Share, monosemanticity, share_of, wilson
from faceteer_postcards.evaluation.steering import Trial, kept_factors
from faceteer_trainer.metrics import auc


def test_wilson_interval_of_eight_in_ten() -> None:
    # centre (0.8 + 0.19207) / 1.38415, half width 1.95996 / 1.38415 * sqrt(0.016 + 0.0096036)
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(30, 30)[1] == 1.0


def test_shares_add_up() -> None:
    total = share_of(np.array([True, False, True])) + Share(1, 5)
    assert (total.hits, total.count, total.value) == (3, 8, 0.375)


def test_auc_counts_pairs_and_ties_half() -> None:
    scores = np.array([0.1, 0.4, 0.4, 0.9])
    # positives 0.4 and 0.9 against 0.1 and 0.4: wins 1 + 2, one tie -> 3.5 of 4
    assert auc(scores, np.array([False, True, False, True])) == 3.5 / 4
    assert auc(scores, np.array([False] * 4)) == 0.5


def test_monosemanticity_weights_pairs_by_both_activations() -> None:
    similarity = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]])
    # weights 1, 0.5, 0: the only pair is (0, 1)
    assert monosemanticity(np.array([2.0, 1.0, 0.0]), similarity) == pytest.approx(0.5)
    # weights 1, 1, 0.5: (0.5 + 0 * 0.5 + 0.2 * 0.5) / (1 + 0.5 + 0.5)
    assert monosemanticity(np.array([2.0, 2.0, 1.0]), similarity) == pytest.approx(0.3)
    assert np.isnan(monosemanticity(np.zeros(3), similarity))


def test_a_trial_counts_targets_and_the_other_seven_factors() -> None:
    before = np.zeros((2, 8), np.uint8)
    after = before.copy()
    after[:, 3] = 5  # the target, in both
    after[1, 0] = 1  # and one other factor, in one
    trial = Trial(3, 5, after, before)
    assert (trial.reached.hits, trial.reached.count) == (2, 2)
    assert (trial.kept.hits, trial.kept.count) == (13, 14)
    assert kept_factors(after, before, [0, 3]).value == 1.0

"""The linear shortcut against the long way round, for any edits of any architecture; and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faceteer_runtime.errors import BatchTooLarge, FaceteerError, InvalidField, NotInBundle, UnknownFeature
from faceteer_sae.edits import Edited, Edits, Operation, Unit, apply_edits, check_edits, edit_warnings, measure
from faceteer_sae.features import describe, input_warnings
from faceteer_sae.statistics import FeatureStatistics
from hypothesis import given
from hypothesis import strategies as st
from unit.sae import sae_models as models
from unit.sae.sae_models import ARCHITECTURES, D_SAE

SET, ADD, SCALE, ABLATE, SWITCH = Operation
SCALED, RAW = Unit
STATISTICS = models.statistics()

Edit = tuple[int, int, float, int]


def checked(edits: list[Edit], statistics: FeatureStatistics | None = STATISTICS, max_edits: int = 100) -> Edits:
    columns = list(zip(*edits, strict=True)) if edits else [(), (), (), ()]
    return check_edits(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64),
        np.array(columns[3], np.int64),
        d_sae=D_SAE,
        statistics=statistics,
        max_edits=max_edits,
    )


def edited(sae: Any, x: np.ndarray, edits: list[Edit]) -> tuple[Edits, Edited]:
    parsed = checked(edits)
    return parsed, apply_edits(sae, x, parsed, sae.encode(x[None])[0].at(parsed.indices))


@st.composite
def some_edits(draw: st.DrawFn) -> list[Edit]:
    features = draw(st.lists(st.integers(0, D_SAE - 1).filter(lambda i: i != 7), unique=True, max_size=12))
    result = []
    for feature in features:
        operation = draw(st.sampled_from(Operation))
        value = 0.0 if operation is ABLATE else draw(st.floats(-50, 50, width=32))
        result.append((feature, int(operation), value, draw(st.sampled_from([0, 1, 2]))))
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(edits=some_edits(), seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_any_edits_agree_with_encode_change_decode_and_re_adding_the_error(
    architecture: str, edits: list[Edit], seed: int, scale: float
) -> None:
    made = models.weights(architecture, seed % 5)
    sae, x = models.sae(architecture, seed % 5), models.embedding(seed, scale)
    _, result = edited(sae, x, edits)
    f = models.plain_encode(made, architecture, x)
    error = x - models.plain_decode(made, f)
    p99, changed = STATISTICS.p99.astype(np.float64), f.copy()
    named = {feature for feature, *_ in edits}
    for feature, operation, value, unit in edits:
        wanted = value * (1.0 if unit == RAW else p99[feature])
        changed[feature] = {
            SET: wanted, ADD: f[feature] + wanted, SCALE: f[feature] * value, ABLATE: 0.0, SWITCH: wanted
        }[Operation(operation)]  # fmt: skip
        if operation == SWITCH:
            changed[[int(r) for r in STATISTICS.rivals(feature) if int(r) not in named]] = 0.0
    expected = models.plain_decode(made, changed) + error
    assert np.linalg.norm(result.x - expected) <= 1e-5 * max(np.linalg.norm(expected), np.linalg.norm(x))
    delta = expected - x
    assert np.isclose(result.delta_norm, np.linalg.norm(delta), rtol=1e-4, atol=1e-5 * np.linalg.norm(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(edits=some_edits(), seed=st.integers(0, 2**16), order=st.randoms(use_true_random=False))
def test_edits_commute(architecture: str, edits: list[Edit], seed: int, order: Any) -> None:
    sae, x = models.sae(architecture), models.embedding(seed)
    shuffled = list(edits)
    order.shuffle(shuffled)
    first, second = edited(sae, x, edits)[1].x, edited(sae, x, shuffled)[1].x
    assert np.allclose(first, second, rtol=1e-5, atol=1e-5 * (1 + np.abs(first).max()))


def test_no_edits_leave_the_embedding_bit_for_bit() -> None:
    x = models.embedding(3)
    _, result = edited(models.sae("topk"), x, [])
    assert np.array_equal(result.x, x)
    assert result.delta_norm == 0
    assert result.cosine == pytest.approx(1.0)


def test_scaled_values_are_in_units_of_the_features_own_p99() -> None:
    edits = checked([(3, SET, 2.0, SCALED), (4, ADD, -1.0, 0), (5, SCALE, 3.0, SCALED), (6, SET, 2.0, RAW)])
    p99 = STATISTICS.p99
    requested = edits.requested(np.array([9, 9, 9, 9], np.float32))
    assert np.allclose(requested, [2 * p99[3], 9 - p99[4], 27, 2])


def test_a_negative_activation_may_be_asked_for_and_is_worth_a_warning() -> None:
    sae, x = models.sae("standard"), models.embedding(0)
    edits, result = edited(sae, x, [(3, SET, -2.0, RAW)])
    assert result.requested[0] == -2
    assert [warning.code for warning in edit_warnings(edits, result, STATISTICS)] == ["EDIT_OUT_OF_RANGE"]
    edits, result = edited(sae, x, [(3, SET, 1.0, SCALED)])
    assert edit_warnings(edits, result, STATISTICS) == []


def test_a_switch_ablates_each_rival_once_and_says_whose_it_is() -> None:
    edits = checked([(1, SWITCH, 1.0, RAW), (4, SWITCH, 1.0, RAW)])
    assert edits.indices.tolist() == [1, 4, 2, 3, 5]
    assert edits.operations.tolist() == [SWITCH, SWITCH, ABLATE, ABLATE, ABLATE]
    assert edits.rival_of.tolist() == [-1, -1, 1, 1, 4]
    assert edits.requested(np.full(5, 9, np.float32)).tolist() == [1, 1, 0, 0, 0]


def test_a_rival_edited_by_name_keeps_its_own_edit() -> None:
    edits = checked([(3, ADD, 1.0, RAW), (1, SWITCH, 1.0, RAW)])
    assert edits.indices.tolist() == [3, 1, 2]
    assert edits.requested(np.full(3, 9, np.float32)).tolist() == [10, 1, 0]


@pytest.mark.parametrize(
    ("edits", "kind", "field"),
    [
        ([(1, SET, 1.0, RAW), (1, ADD, 1.0, RAW)], InvalidField, "edits[1].feature"),
        ([(1, SET, 1.0, RAW), (D_SAE, SET, 1.0, RAW)], UnknownFeature, "edits[1].feature"),
        ([(2**32 - 1, SET, 1.0, RAW)], UnknownFeature, "edits[0].feature"),
        ([(1, 0, 1.0, RAW)], InvalidField, "edits[0].operation"),
        ([(1, 6, 1.0, RAW)], InvalidField, "edits[0].operation"),
        ([(1, SET, 1.0, 3)], InvalidField, "edits[0].unit"),
        ([(2, SET, 1.0, RAW), (1, SET, float("nan"), RAW)], InvalidField, "edits[1].value"),
        ([(1, SCALE, float("inf"), RAW)], InvalidField, "edits[0].value"),
        ([(1, ABLATE, 0.5, RAW)], InvalidField, "edits[0].value"),
        ([(1, SET, 1e30, RAW)], InvalidField, "edits[0].value"),
        ([(7, SET, 1.0, SCALED)], InvalidField, "edits[0].unit"),
    ],
)
def test_unusable_edits_are_refused_by_field(edits: list[Edit], kind: type[FaceteerError], field: str) -> None:
    with pytest.raises(kind) as caught:
        checked(edits)
    assert caught.value.field == field


def test_more_edits_than_the_limit_are_refused() -> None:
    with pytest.raises(BatchTooLarge) as caught:
        checked([(i, ABLATE, 0.0, RAW) for i in range(4)], max_edits=3)
    assert caught.value.metadata == {"got": "4", "limit": "3"}


def test_without_statistics_only_raw_edits_are_served() -> None:
    raw = checked([(1, SET, 1.0, RAW), (2, SCALE, 2.0, SCALED), (3, ABLATE, 0.0, SCALED)], None)
    assert raw.indices.tolist() == [1, 2, 3]
    for edit in ((1, SET, 1.0, SCALED), (1, SET, 1.0, 0), (1, SWITCH, 1.0, RAW)):
        with pytest.raises(NotInBundle):
            checked([edit], None)


def test_measuring_gives_achieved_activations_and_the_drift_of_the_rest() -> None:
    made, sae, x = models.weights("topk"), models.sae("topk"), models.embedding(2)
    edits, result = edited(sae, x, [(3, SET, 8.0, RAW), (9, ABLATE, 0.0, RAW)])
    before, after = sae.encode(np.stack([x, result.x]))
    measured = measure(before, after, edits.indices, 3)
    f, f_new = models.plain_encode(made, "topk", x), models.plain_encode(made, "topk", result.x)
    rest = np.setdiff1d(np.arange(D_SAE), [3, 9])
    assert np.allclose(measured.achieved, f_new[[3, 9]], rtol=1e-4)
    assert np.isclose(measured.drift, np.linalg.norm(f_new[rest] - f[rest]) / np.linalg.norm(f[rest]), rtol=1e-4)
    moved = np.abs(f_new - f)
    moved[[3, 9]] = 0
    assert measured.drifted.tolist() == np.argsort(-moved)[:3].tolist()
    assert np.allclose(measured.drifted_before, f[measured.drifted], rtol=1e-4)
    assert np.allclose(measured.drifted_after, f_new[measured.drifted], rtol=1e-4)


def test_explained_variance_is_about_the_corpus_mean_where_it_is_known() -> None:
    sae, x = models.sae("standard"), models.embedding(1)
    (features,) = sae.encode(x[None])
    error = x - models.plain_decode(models.weights("standard"), models.dense(features))
    mean = models.embedding(99)
    known = FeatureStatistics(*vars(STATISTICS).values())  # type: ignore[arg-type]
    known = FeatureStatistics(
        known.firing_share, known.p99, known.rivals_offsets, known.rivals_indices, embedding_mean=mean
    )
    for statistics, middle in ((None, sae.b_dec), (STATISTICS, sae.b_dec), (known, mean)):
        described = describe(sae, statistics, x, features)
        expected = 1 - (error @ error) / ((x - middle) @ (x - middle))
        assert described.explained_variance == pytest.approx(expected, rel=1e-4)
        assert described.norm == pytest.approx(np.linalg.norm(x), rel=1e-6)
        assert described.l0 == len(features.top_indices)


def test_an_embedding_far_from_the_corpus_is_warned_about() -> None:
    known = {"embedding_statistics": {"norm": {"p01": 30.0, "p99": 45.0}, "l0": {"p01": 20, "p99": 80}}}
    assert input_warnings(known, 40.0, 50) == []
    assert [warning.code for warning in input_warnings(known, 1.0, 50)] == ["NORM_OUT_OF_RANGE"]
    assert [warning.code for warning in input_warnings(known, 400.0, 5000)] == ["NORM_OUT_OF_RANGE", "L0_OUT_OF_RANGE"]
    assert input_warnings(known, 40.0, None) == []
    assert input_warnings({}, 1.0, 0) == []

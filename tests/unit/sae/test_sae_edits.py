"""Edits by the shortcut against the long way round: encode, change, decode, re-add the error."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from faceteer.v1 import edits_pb2
from faceteer_runtime.errors import BatchTooLarge, FaceteerError, InvalidField, NotInBundle, UnknownFeature
from faceteer_sae.edit_warnings import edit_warnings
from faceteer_sae.edits import EditColumns, Edits, Operation, Unit, apply_edits, check_edits, measure
from faceteer_sae.model import FeatureActivations
from faceteer_sae.statistics import FeatureStatistics
from hypothesis import given
from hypothesis import strategies as st
from unit.sae.random_sae import ARCHITECTURES, Pair, embeddings, random_sae

D_IN, D_SAE = 24, 96
cached_sae = cache(random_sae)


def some_statistics(rivals: dict[int, list[int]] | None = None, d_sae: int = D_SAE) -> FeatureStatistics:
    """p99 of feature i is 1 + i / 10; feature 95 never fired."""
    rows = [(rivals or {}).get(i, []) for i in range(d_sae)]
    p99 = (1 + np.arange(d_sae) / 10).astype(np.float32)
    p99[95:] = 0
    return FeatureStatistics(
        np.full(d_sae, 0.1, np.float32),
        p99,
        np.cumsum([0, *map(len, rows)]).astype(np.int64),
        np.array([j for row in rows for j in row], np.int32),
    )


def checked(
    edits: list[tuple[int, int, float, int]], statistics: FeatureStatistics | None = None, max_edits: int = 1000
) -> Edits:
    """Edits given as (feature, operation, value, unit)."""
    columns = (
        np.array(column, dtype) for column, dtype in zip(zip(*edits, strict=True), (int, int, float, int), strict=True)
    )
    return check_edits(EditColumns(*columns), d_sae=D_SAE, statistics=statistics, max_edits=max_edits)


def long_way_round(
    pair: Pair, x: np.ndarray, edits: list[tuple[int, int, float, int]], rivals: list[int]
) -> np.ndarray:
    """In float64 over all features: encode, change, decode, re-add the reconstruction error."""
    wide = x.astype(np.float64)
    f = pair.dense.encode(wide)
    error = wide - pair.dense.decode(f)
    changed = f.copy()
    changed[rivals] = 0
    for index, operation, value, _ in edits:
        changed[index] = {1: value, 2: f[index] + value, 3: f[index] * value, 4: 0.0, 5: value}[operation]
    return pair.dense.decode(changed) + error


@st.composite
def any_edits(draw: st.DrawFn) -> list[tuple[int, int, float, int]]:
    indices = draw(st.lists(st.integers(0, D_SAE - 1), unique=True, max_size=D_SAE))
    values = st.floats(-50, 50, width=32)
    edits = []
    for index in indices:
        operation = draw(st.sampled_from(Operation))
        value = 0.0 if operation is Operation.ABLATE else draw(values)
        edits.append((index, int(operation), value, int(Unit.RAW)))
    return edits


@given(
    st.sampled_from(ARCHITECTURES), st.integers(0, 200), any_edits(), st.sampled_from([0.1, 3.0, 40.0]), st.booleans()
)
def test_any_edits_by_the_shortcut_are_those_by_the_long_way_round(
    architecture: str, seed: int, edits: list[tuple[int, int, float, int]], scale: float, cached: bool
) -> None:
    pair = cached_sae(architecture, seed=3)
    (x,) = embeddings(seed, 1, scale=scale)
    (features,) = pair.sae.encode(x[None])
    rivals = {index: [(index + 1) % D_SAE, (index + 7) % D_SAE] for index, operation, _, _ in edits if operation == 5}
    plan = checked(edits, some_statistics(rivals)) if edits else checked_nothing()
    named = {edit[0] for edit in edits}
    ablated = sorted({r for row in rivals.values() for r in row} - named)
    assert sorted(plan.indices[len(edits) :].tolist()) == ablated

    # From the cached features, or with one dot product a feature and, for topk, the cached k-th pre-activation.
    before = features.at(plan.indices) if cached else pair.sae.activations(x, plan.indices, features.kth_pre_act)
    edited = apply_edits(pair.sae, x, plan, before)
    expected = long_way_round(pair, x, edits, ablated)
    assert np.linalg.norm(edited.x - expected) <= 1e-5 * max(np.linalg.norm(expected), np.linalg.norm(x))
    assert np.isclose(edited.delta_norm, np.linalg.norm(expected - x), rtol=1e-3, atol=1e-4)


def checked_nothing() -> Edits:
    none = np.empty(0, int)
    return check_edits(EditColumns(none, none, none.astype(float), none), d_sae=D_SAE, statistics=None, max_edits=1)


@given(st.permutations(range(40)), st.integers(0, 50))
def test_edits_commute(order: list[int], seed: int) -> None:
    pair = cached_sae("topk", seed=3)
    (x,) = embeddings(seed, 1)
    (features,) = pair.sae.encode(x[None])
    values = np.random.default_rng(seed).normal(size=40).tolist()
    edits = [(i, 1 + i % 3, values[i], 2) for i in range(40)]
    straight, shuffled = checked(edits), checked([edits[i] for i in order])
    a = apply_edits(pair.sae, x, straight, features.at(straight.indices))
    b = apply_edits(pair.sae, x, shuffled, features.at(shuffled.indices))
    assert np.linalg.norm(a.x - b.x) <= 1e-5 * np.linalg.norm(a.x)
    assert a.requested[order].tolist() == b.requested.tolist()


def test_one_edit_after_another_is_not_needed_hundreds_go_at_once() -> None:
    pair = random_sae("standard", d_in=64, d_sae=900)
    (x,) = embeddings(1, 1, 64)
    (features,) = pair.sae.encode(x[None])
    rng = np.random.default_rng(0)
    indices = rng.permutation(900)[:500]
    values = rng.normal(size=500)
    k = np.full(500, 1)
    plan = check_edits(EditColumns(indices, k, values, 2 * k), d_sae=900, statistics=None, max_edits=500)
    edited = apply_edits(pair.sae, x, plan, features.at(plan.indices))
    edits = [(int(i), 1, float(v), 2) for i, v in zip(indices, values, strict=True)]
    expected = long_way_round(pair, x, edits, [])
    assert np.linalg.norm(edited.x - expected) <= 1e-5 * np.linalg.norm(expected)


def test_each_operation_asks_for_what_its_name_says() -> None:
    statistics = some_statistics({4: [5, 6, 0]})
    plan = checked([(0, 1, 3.0, 2), (1, 2, 3.0, 2), (2, 3, 3.0, 0), (3, 4, 0.0, 0), (4, 5, 2.0, 1)], statistics)
    before = np.array([2.0, 2.0, 2.0, 2.0, 2.0, 9.0, 9.0], np.float32)
    # Feature 4's p99 is 1.4; rival 0 is edited by name and keeps its own edit.
    assert plan.indices.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.allclose(plan.requested(before), [3.0, 5.0, 6.0, 0.0, 2.8, 0.0, 0.0])
    assert plan.rival_of.tolist() == [-1, -1, -1, -1, -1, 4, 4]
    assert plan.operations[5:].tolist() == [Operation.ABLATE] * 2


def test_scaled_is_the_default_unit_and_counts_in_the_features_own_p99() -> None:
    plan = checked([(10, 1, 0.5, 0), (20, 2, 0.5, 1), (30, 1, 0.5, 2)], some_statistics())
    assert np.allclose(plan.requested(np.ones(3, np.float32)), [0.5 * 2.0, 1 + 0.5 * 3.0, 0.5])


def test_two_switches_with_a_common_rival_turn_it_off_once() -> None:
    plan = checked([(1, 5, 1.0, 2), (2, 5, 1.0, 2)], some_statistics({1: [7, 2], 2: [7, 8]}))
    assert plan.indices.tolist() == [1, 2, 7, 8]
    assert plan.rival_of.tolist() == [-1, -1, 1, 2]


def test_switching_on_and_banning_need_no_feature_to_fire() -> None:
    pair = random_sae("topk")
    (x,) = embeddings(2, 1)
    silent = np.setdiff1d(np.arange(D_SAE), pair.sae.encode(x[None])[0].top_indices)[:2]
    plan = checked([(int(silent[0]), 4, 0.0, 0)])
    edited = apply_edits(pair.sae, x, plan, np.zeros(1, np.float32))
    assert edited.x.tolist() == x.tolist()
    assert edited.delta_norm == 0.0
    assert edited.cosine == 1.0


def test_no_edits_leave_the_embedding_as_it_is() -> None:
    (x,) = embeddings(2, 1)
    edited = apply_edits(random_sae("standard").sae, x, checked_nothing(), np.empty(0, np.float32))
    assert edited.x.tolist() == x.tolist()


STATISTICS = some_statistics()


@pytest.mark.parametrize(
    ("edits", "statistics", "kind", "field"),
    [
        ([(0, 1, 1.0, 2), (96, 1, 1.0, 2)], None, UnknownFeature, "edits[1].feature"),
        ([(0, 0, 1.0, 2)], None, InvalidField, "edits[0].operation"),
        ([(0, 6, 1.0, 2)], None, InvalidField, "edits[0].operation"),
        ([(0, 1, 1.0, 3)], None, InvalidField, "edits[0].unit"),
        ([(0, 1, 1.0, 2), (1, 2, float("nan"), 2)], None, InvalidField, "edits[1].value"),
        ([(0, 3, float("-inf"), 2)], None, InvalidField, "edits[0].value"),
        ([(0, 4, 1.0, 2)], None, InvalidField, "edits[0].value"),
        ([(0, 1, 1e30, 2)], None, InvalidField, "edits[0].value"),
        ([(0, 3, 1e30, 2)], None, InvalidField, "edits[0].value"),
        ([(95, 1, 1.0, 1)], STATISTICS, InvalidField, "edits[0].unit"),
        ([(94, 1, 1.0, 1), (95, 2, -1.0, 1)], STATISTICS, InvalidField, "edits[1].unit"),
        ([(0, 1, 1.0, 0)], None, NotInBundle, None),
        ([(0, 5, 1.0, 2)], None, NotInBundle, None),
        ([(i, 1, 1.0, 2) for i in range(5)], None, BatchTooLarge, "edits"),
    ],
)
def test_unusable_edits_are_refused_by_field(
    edits: list[Any], statistics: FeatureStatistics | None, kind: type[FaceteerError], field: str | None
) -> None:
    with pytest.raises(kind) as refused:
        checked(edits, statistics, max_edits=4)
    assert refused.value.field == field


def test_scaling_and_ablating_need_no_statistics() -> None:
    plan = checked([(0, 3, 0.5, 0), (1, 4, 0.0, 0)])
    assert plan.requested(np.ones(2, np.float32)).tolist() == [0.5, 0.0]


def test_edits_that_lead_out_of_all_bounds_are_refused() -> None:
    pair = random_sae("standard")
    (x,) = embeddings(1, 1)
    plan = checked([(0, 1, 0.0, 2), (1, 1, 1e6, 2)])
    with pytest.raises(InvalidField) as refused:
        apply_edits(pair.sae, x, plan, np.array([0, -1e6], np.float32))
    assert refused.value.field == "edits[1].value"


def test_of_two_edits_of_a_feature_the_last_counts_in_the_place_of_the_first() -> None:
    plan = checked([(3, 1, 1.0, 2), (5, 1, 1.0, 2), (3, 2, 7.0, 2)])
    assert (plan.indices.tolist(), plan.operations.tolist(), plan.terms.tolist()) == ([3, 5], [2, 1], [7.0, 1.0])
    # A switch that a later edit replaces turns nothing off.
    statistics = some_statistics({3: [4]})
    assert checked([(3, 5, 1.0, 1), (3, 1, 1.0, 1)], statistics).indices.tolist() == [3]
    assert checked([(3, 1, 1.0, 1), (3, 5, 1.0, 1)], statistics).indices.tolist() == [3, 4]


def warned(
    *edits: tuple[int, int, float, int],
    before: dict[int, float] | None = None,
    after: dict[int, float] | None = None,
    rivals: dict[int, list[int]] | None = None,
) -> list[tuple[str, tuple[int, ...]]]:
    """Codes and features of the warnings; ``after`` are the activations of the edited embedding, None: not measured."""
    pair, statistics = random_sae("standard"), some_statistics(rivals)
    (x,) = embeddings(1, 1)
    columns = EditColumns(*(np.array(column) for column in zip(*edits, strict=True)))
    plan = checked(list(edits), statistics)
    f = np.array([(before or {}).get(index, 0.0) for index in plan.indices.tolist()], np.float32)
    edited = apply_edits(pair.sae, x, plan, f)
    reached = measured = None
    if after is not None:
        indices = np.array(sorted(after), np.int32)
        reached = FeatureActivations(indices, np.array([after[i] for i in sorted(after)], np.float32), np.nan)
        measured = measure(reached, reached, plan.indices, 8)
    found = edit_warnings(columns, plan, edited, statistics, measured, reached)
    for warning in found:
        assert all(f"#{index}" in warning.message for index in warning.feature_indices)
    return [(warning.code, warning.feature_indices) for warning in found]


def test_far_fetched_edits_come_with_a_warning() -> None:
    assert warned((0, 1, 1.0, 1), (1, 1, 3.9, 1)) == []
    assert warned((0, 1, 1.0, 1), (1, 1, 4.1, 1)) == [("EDIT_OUT_OF_RANGE", (1,))]
    assert warned((0, 1, -0.1, 2)) == [("EDIT_OUT_OF_RANGE", (0,))]


def test_a_feature_edited_twice_is_named() -> None:
    assert warned((2, 1, 1.0, 1), (3, 1, 1.0, 1), (2, 4, 0.0, 1)) == [("EDIT_REPLACED", (2,))]


def test_rivals_that_stay_on_beside_a_set_feature_are_named_strongest_first() -> None:
    rivals = {0: [1, 2, 3, 4]}
    # 3 is hardly on, 4 is edited itself.
    after = {0: 1.0, 1: 0.3, 2: 1.0, 3: 0.1, 4: 1.4}
    assert warned((0, 1, 1.0, 1), (4, 1, 1.0, 1), after=after, rivals=rivals) == [
        ("EDITS_CONFLICT", (0, 4)),
        ("RIVALS_ON", (0, 2, 1)),
    ]
    assert warned((0, 5, 1.0, 1), after=after, rivals=rivals) == [], "switch"
    assert warned((0, 1, 0.3, 1), after=after, rivals=rivals) == [], "a little of it may stand beside its rivals"
    assert warned((0, 1, 1.0, 1), rivals=rivals) == [], "not measured"
    assert warned((0, 4, 0.0, 1), before={0: 1.0}, after={1: 1.0}, rivals=rivals) == []


def test_rivals_turned_up_in_one_edit_are_in_conflict() -> None:
    rivals = {0: [1], 1: [0]}
    assert warned((0, 5, 1.0, 1), (1, 5, 1.0, 1), rivals=rivals) == [("EDITS_CONFLICT", (0, 1))]
    assert warned((0, 5, 1.0, 1), (1, 4, 0.0, 1), rivals=rivals) == []
    assert warned((0, 5, 1.0, 1), (1, 1, 0.5, 1), before={1: 1.0}, rivals=rivals) == [], "the rival goes down"


def test_an_edit_that_achieves_too_little_is_named() -> None:
    assert warned((0, 5, 1.0, 1), (1, 5, 1.0, 1), after={0: 0.29, 1: 0.5}) == [("EDIT_NOT_ACHIEVED", (0,))]
    assert warned((0, 4, 0.0, 1), before={0: 1.0}, after={0: 0.8}) == [("EDIT_NOT_ACHIEVED", (0,))]
    assert warned((0, 1, 0.05, 1), after={1: 1.0}) == [], "hardly anything was asked for"


def test_measuring_tells_what_was_reached_and_what_drifted() -> None:
    before = FeatureActivations(np.array([1, 2, 3], np.int32), np.array([5.0, 3.0, 4.0], np.float32), np.nan)
    after = FeatureActivations(np.array([1, 3, 7], np.int32), np.array([9.0, 4.5, 1.0], np.float32), np.nan)
    measured = measure(before, after, np.array([1, 60]), 2)
    assert measured.achieved.tolist() == [9.0, 0.0]
    # 2: 3 -> 0, 7: 0 -> 1, 3: 4 -> 4.5; the rest was (3, 4), of length 5.
    assert np.isclose(measured.drift, np.sqrt(9 + 0.25 + 1) / 5)
    assert measured.drifted.tolist() == [2, 7]
    assert (measured.drifted_before.tolist(), measured.drifted_after.tolist()) == ([3.0, 0.0], [0.0, 1.0])
    assert measure(before, before, np.array([1]), 8).drift == 0.0
    assert len(measure(before, before, np.array([1]), 8).drifted) == 0


def test_operations_and_units_have_the_contracts_numbers() -> None:
    for operation in Operation:
        assert edits_pb2.EditOperation.Value(f"EDIT_OPERATION_{operation.name}") == operation
    for unit in Unit:
        assert edits_pb2.EditUnit.Value(f"EDIT_UNIT_{unit.name}") == unit

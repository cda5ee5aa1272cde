"""What is said about an embedding; feature statistics; messages written in bulk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faceteer.v1 import edits_pb2
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.embeddings import Embedding
from faceteer_sae.application import EditResult
from faceteer_sae.edits import Edited, Edits, Measured, activations
from faceteer_sae.features import Encoding, InputWarning, cosine, describe, input_warnings, strongest
from faceteer_sae.model import FeatureActivations
from faceteer_sae.servicer import write_report
from faceteer_sae.statistics import FeatureStatistics, embedding_statistics, load_statistics, save_statistics
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from unit.sae.random_sae import Pair, embeddings


def arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Statistics of three features, of which 0 and 2 are rivals."""
    good: dict[str, np.ndarray | None] = {
        "firing_share": np.array([0.5, 0.0, 0.25], np.float32),
        "p99": np.array([2.0, 0.0, 4.0], np.float32),
        "rivals_offsets": np.array([0, 1, 1, 2], np.int64),
        "rivals_indices": np.array([2, 0], np.int32),
    }
    return {name: array for name, array in (good | changes).items() if array is not None}


def loaded(tmp_path: Path, **changes: np.ndarray | None) -> FeatureStatistics | None:
    save_file(arrays(**changes), tmp_path / "feature_statistics.safetensors")
    return load_statistics(tmp_path, d_in=2, d_sae=3)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3, 4], [3, 4], 1.0),
        ([3, 4], [-3, -4], -1.0),
        ([1, 0], [0, 5], 0.0),
        ([1, 0], [-3, 4], -0.6),
        ([0, 0], [3, 4], 0.0),
        ([3, 4], [0, 0], 0.0),
    ],
)
def test_a_cosine_is_that_done_by_hand(a: list[int], b: list[int], expected: float) -> None:
    assert cosine(np.array(a, np.float32), np.array(b, np.float32)) == pytest.approx(expected)


def test_a_cosine_does_not_leave_its_range_by_rounding() -> None:
    for row in embeddings(3, 200):
        assert -1.0 <= cosine(row, -3 * row) <= cosine(row, 3 * row) <= 1.0


def test_statistics_give_scales_and_rivals(tmp_path: Path) -> None:
    assert load_statistics(tmp_path, 2, 3) is None
    statistics = loaded(tmp_path)
    assert statistics is not None
    assert [statistics.rivals(i).tolist() for i in range(3)] == [[2], [], [0]]
    assert statistics.scaled(np.array([0, 1, 2]), np.array([1.0, 5.0, 1.0])).tolist() == [0.5, 0.0, 0.25]
    assert statistics.embedding_mean is None
    mean = loaded(tmp_path, embedding_mean=np.array([1.0, 2.0], np.float32))
    assert mean is not None
    assert mean.embedding_mean is not None


@pytest.mark.parametrize("mean", [None, np.array([1, 2], np.float32)], ids=["without mean", "with mean"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, mean: np.ndarray | None) -> None:
    saved = FeatureStatistics(
        np.array([0.5, 0, 0.25], np.float32), np.array([2, 0, 4], np.float32), np.array([0, 1, 1, 2]),
        np.array([2, 0], np.int32), mean,
    )  # fmt: skip
    save_statistics(tmp_path, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["feature_statistics.safetensors"]
    found = load_statistics(tmp_path, 2, 3)
    assert found is not None
    for name in ("firing_share", "p99", "rivals_offsets", "rivals_indices", "embedding_mean"):
        assert np.array_equal(getattr(found, name), getattr(saved, name)), name


def test_statistics_that_cannot_be_written_are_an_os_error_and_leave_nothing(tmp_path: Path) -> None:
    saved = loaded(tmp_path)
    assert saved is not None
    with pytest.raises(OSError, match="feature_statistics"):
        save_statistics(tmp_path / "nowhere", saved)


def test_percentiles_of_norm_and_l0_are_linear_between_neighbours() -> None:
    found = embedding_statistics(np.arange(101, dtype=np.float32) * 2, np.array([1, 2]))
    assert found == {"norm": {"p01": 2, "p50": 100, "p99": 198}, "l0": {"p01": 1.01, "p50": 1.5, "p99": 1.99}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p99": None}, "'p99' is missing"),
        ({"p99": np.zeros(4, np.float32)}, r"'p99' has shape \[4\]"),
        ({"p99": np.array([1, np.nan, 1], np.float32)}, "not finite"),
        ({"p99": np.array([1, -1, 1], np.float32)}, "negative"),
        ({"rivals_offsets": np.array([0, 2, 1, 2], np.int64)}, "does not divide"),
        ({"rivals_offsets": np.array([0, 1, 1, 3], np.int64)}, "does not divide"),
        ({"rivals_indices": np.array([3, 0], np.int32)}, r"outside \[0, 3\)"),
        ({"embedding_mean": np.zeros(3, np.float32)}, "'embedding_mean' has shape"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        loaded(tmp_path, **changes)


def test_broken_statistics_are_refused(tmp_path: Path) -> None:
    (tmp_path / "feature_statistics.safetensors").write_bytes(b"junk")
    with pytest.raises(BundleError, match="not a readable"):
        load_statistics(tmp_path, 2, 3)


def test_an_embedding_is_described_by_what_its_features_leave_over(pair: Pair) -> None:
    (x,) = embeddings(1, 1)
    (features,) = pair.sae.encode(x[None])
    said = describe(pair.sae, None, x, features)
    f = pair.dense.encode(x.astype(float))
    x_hat = pair.dense.decode(f)
    assert said.l0 == np.count_nonzero(f)
    assert np.isclose(said.norm, np.linalg.norm(x))
    assert np.isclose(said.cosine, x @ x_hat / np.linalg.norm(x) / np.linalg.norm(x_hat), atol=1e-5)
    spread = np.sum((x - pair.dense.b_dec) ** 2)
    assert np.isclose(said.explained_variance, 1 - np.sum((x - x_hat) ** 2) / spread, rtol=1e-4, atol=1e-4)
    mean = np.full(24, 0.5, np.float32)
    none = np.zeros(96, np.float32)
    statistics = FeatureStatistics(none, none, np.zeros(97, np.int64), np.empty(0, np.int32), mean)
    about_mean = describe(pair.sae, statistics, x, features).explained_variance
    assert np.isclose(about_mean, 1 - np.sum((x - x_hat) ** 2) / np.sum((x - mean) ** 2), rtol=1e-4, atol=1e-4)


def test_the_strongest_features_come_first_by_their_own_scale() -> None:
    features = FeatureActivations(np.array([0, 2], np.int32), np.array([1.5, 2.0], np.float32), np.nan)
    table = arrays()
    statistics = FeatureStatistics(**table)
    indices, raw, scaled = strongest(features, statistics)
    assert (indices.tolist(), raw.tolist(), scaled.tolist()) == ([0, 2], [1.5, 2.0], [0.75, 0.5])
    assert strongest(features, None)[0].tolist() == [2, 0]
    assert strongest(features, None, 1)[0].tolist() == [2]
    assert strongest(features, None)[2].tolist() == []


def test_an_embedding_unlike_the_corpus_is_warned_about() -> None:
    metadata = {"embedding_statistics": {"norm": {"p01": 35, "p50": 40, "p99": 45}, "l0": {"p01": 8, "p99": 40}}}

    def codes(norm: float, l0: int) -> list[str]:
        features = FeatureActivations(np.empty(0, np.int32), np.empty(0, np.float32), np.nan)
        return [w.code for w in input_warnings(metadata, np.zeros(2), Encoding(features, l0, 1.0, 1.0, norm))]

    assert codes(40.0, 20) == []
    assert codes(1.0, 20) == ["NORM_OUT_OF_RANGE"]
    assert codes(40.0, 122_631) == ["L0_OUT_OF_RANGE"]
    assert codes(400.0, 1) == ["NORM_OUT_OF_RANGE", "L0_OUT_OF_RANGE"]
    # Between p01 / 1.5 and 1.5 p99 the norm is nothing to speak of, and so is L0 between p01 / 3 and 3 p99.
    assert codes(35 / 1.5 + 0.01, 120) == codes(45 * 1.5 - 0.01, 3) == []
    assert codes(35 / 1.5 - 0.01, 121) == codes(45 * 1.5 + 0.01, 2) == ["NORM_OUT_OF_RANGE", "L0_OUT_OF_RANGE"]
    # Without features only the norm, which is then the embedding's own, can be judged.
    assert input_warnings(metadata, np.float32([0, 40]), None) == []
    assert input_warnings({}, np.float32([0, 1]), None) == []
    (warning,) = input_warnings(metadata, np.float32([0, 1]), None)
    assert warning.message.startswith("the embedding's norm is 1, the training corpus has 35 to 45; was it normalised")


numbers = st.floats(width=32, allow_nan=False)


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 5), numbers, numbers, numbers), max_size=20),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), numbers, numbers, st.integers(0, 2**32 - 1)), max_size=5),
    st.booleans(),
)
def test_a_report_written_in_bulk_is_the_report_written_field_by_field(
    named: list[tuple[int, int, float, float, float]], rivals: list[tuple[int, float, float, int]], anew: bool
) -> None:
    rows = [(*row, -1) for row in named] + [(i, 4, before, 0.0, after, of) for i, before, after, of in rivals]
    indices, operations, before, requested, achieved, rival_of = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0, int),) * 6
    )
    edits = Edits(indices, operations, before, before, rival_of)
    edited = Edited(np.zeros(2), before.astype(np.float32), requested.astype(np.float32), 2.5, 0.5)
    drifted = (np.array([3]), np.float32([1.5]), np.float32([2.5]))
    measured = Measured(achieved.astype(np.float32), 0.25, *drifted) if anew else None
    expected = edits_pb2.EditReport(delta_norm=2.5, cosine=0.5)
    for index, operation, f, v, a, of in rows:
        outcome = expected.outcomes.add(feature_index=index, operation=operation, before=f, requested=v)
        if anew:
            outcome.achieved, outcome.achieved_scaled = a, 0.0
        if of >= 0:
            outcome.rival_of = of
    if anew:
        expected.measured, expected.drift = True, 0.25
        expected.drifted.add(feature_index=3, before=1.5, after=2.5)
    expected.warnings.add(code="CODE", message="words")
    report = edits_pb2.EditReport()
    says = activations(edits, edited, measured, None)
    warnings = [InputWarning("CODE", "words")]
    write_report(report, EditResult(Embedding("id", edited.x), edits, says, 2.5, 0.5, measured, warnings))
    assert report == expected

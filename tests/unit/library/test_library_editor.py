"""A library changed by jobs: kept whole or not at all, with labels' scores that belong to the label."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from faceteer_library.editor import LibraryEditor
from faceteer_library.store import Filter, Store
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter


def row(index: int, label: str = "", **more: object) -> FeatureRow:
    edges, counts = np.ones(1, np.float32), np.ones(1, np.int64)
    return FeatureRow(index, label, 0.5, 1.0, 1.0, 2.0, 3.0, edges, counts, **more)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with LibraryWriter(
        tmp_path / "library.sqlite", sae_revision="s", corpus="c", n_pictures=9, encoder_revision="e", embed_dim=4
    ) as writer:
        writer.feature(row(0, "snow", detection_score=0.9, causal_score=0.8, terms=("ice", "winter")))
        writer.feature(row(1))
        writer.examples(0, [ExampleRow("a", 2.0, b"A"), ExampleRow("b", 1.0, b"B", "caption")])
        writer.examples(0, [ExampleRow("c", 0.5, b"A", quantiles=(0.25, 0.5))], "quantiles")
        writer.icon(0, b"icon", [0.5, 1.0], "key-0")
    return tmp_path / "library.sqlite"


def test_what_the_writer_wrote_is_what_the_editor_reads(path: Path) -> None:
    with LibraryEditor(path) as editor:
        snow, nothing = editor.features()
        assert (snow.label, snow.terms, snow.detection_score, snow.causal_score) == (
            "snow",
            ("ice", "winter"),
            0.9,
            0.8,
        )
        assert (nothing.label, nothing.label_source, nothing.terms) == ("", "", ())
        assert [example.picture for example in editor.examples(0)] == ["a", "b"]
        assert editor.examples(0, "quantiles")[0].quantiles == (0.25, 0.5)
        assert editor.icon_keys() == {0: "key-0"}
        assert (editor.facts["encoder_revision"], editor.facts["embed_dim"]) == ("e", "4")


def test_a_new_label_loses_the_old_ones_scores_and_the_same_one_keeps_them(path: Path) -> None:
    with LibraryEditor(path) as editor:
        editor.label(0, "snow", causal_score=0.7)
        editor.label(1, "night", source="model", detection_score=0.6, detection_balanced_accuracy=0.55)
    with LibraryEditor(path) as editor:
        snow, night = editor.features()
        assert (snow.detection_score, snow.causal_score) == (0.9, 0.7)
        assert (night.label_source, night.detection_score, night.detection_balanced_accuracy) == ("model", 0.6, 0.55)
        editor.label(0, "rain")
    with LibraryEditor(path) as editor:
        rain = next(editor.features())
        assert (rain.label, rain.detection_score, rain.causal_score, rain.terms) == ("rain", None, None, ())
    store = Store(path, path.parent / "people.sqlite")
    assert [hit.row.index for hit in store.search("rain", Filter(), 0, 10)[0]] == [0]
    assert store.search("snow", Filter(), 0, 10)[1] == 0


def test_a_change_that_fails_leaves_the_library_as_it_was(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stopped"), LibraryEditor(path) as editor:  # noqa: PT012 (the block is what stops)
        editor.label(0, "rain")
        editor.icon(1, b"new", [1.0], "key-1")
        raise RuntimeError("stopped")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["library.sqlite"]


def test_two_jobs_on_one_library_each_put_theirs_in_place_whole(path: Path) -> None:
    with LibraryEditor(path) as first, LibraryEditor(path) as second:
        first.label(0, "rain")
        second.icon(1, b"new", [1.0], "key-1")
    # The first block ends last, and its library stands: without what the second one did, but whole.
    with LibraryEditor(path) as editor:
        assert [feature.label for feature in editor.features()] == ["rain", ""]
        assert editor.icon_keys() == {0: "key-0"}


def test_every_figure_is_changed_where_it_stands_and_nowhere_else(path: Path) -> None:
    with LibraryEditor(path) as editor:
        editor.detection(0, 0.6, 0.55)
        editor.causal_score(1, 0.4, "classifier")
        editor.safety_class(1, "violence")
        editor.icon(0, b"newer", [0.25], "key-9")
        editor.meta("corpus", "another")
        assert editor.facts["corpus"] == "another"
        assert editor.icon_of(0) == (b"newer", [0.25])
        assert editor.icon_of(1) is None
    with LibraryEditor(path) as editor:
        snow, nothing = editor.features()
        assert (snow.detection_score, snow.detection_balanced_accuracy, snow.causal_score) == (0.6, 0.55, 0.8)
        assert (nothing.detection_score, nothing.causal_score, nothing.safety_class) == (None, 0.4, "violence")
        assert (snow.causal_judge, nothing.causal_judge) == ("text_tower", "classifier")
        assert (snow.safety_class, snow.firing_share, snow.p99, snow.max) == ("", 0.5, 2.0, 3.0)
        assert editor.facts["corpus"] == "another"
        editor.meaning("snow", np.ones(4))
        editor.forget_meanings()
        editor.label(0, "", terms=("ice",))
    store = Store(path, path.parent / "people.sqlite")
    assert not store.searches_meaning
    assert (store.get(0).label, store.get(0).source, store.get(0).terms) == ("", "", ())


def test_a_causal_score_that_is_not_measured_has_no_judge(path: Path) -> None:
    with LibraryEditor(path) as editor:
        editor.causal_score(0, None, "classifier")
        with pytest.raises(ValueError, match="judge must be one of"):
            editor.causal_score(0, 0.4, "somebody")
    with LibraryEditor(path) as editor:
        snow = next(editor.features())
        assert (snow.causal_score, snow.causal_judge) == (None, "")
    row = Store(path, path.parent / "people.sqlite").get(0)
    assert (row.causal_score, row.causal_judge) == (None, "")


def test_a_library_of_version_2_reads_exactly_a_half_as_not_measured_and_is_brought_up_to_date(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """ALTER TABLE features DROP COLUMN causal_judge; UPDATE meta SET value = '2' WHERE key = 'version';
            UPDATE features SET label = 'ice', causal_score = 0.5 WHERE feature = 1;"""
        )
    store = Store(path, path.parent / "people.sqlite")
    assert [(row.causal_score, row.causal_judge) for row in (store.get(0), store.get(1))] == [
        (0.8, "text_tower"),
        (None, ""),
    ]
    with LibraryEditor(path) as editor:
        editor.causal_score(0, 0.5)
    with LibraryEditor(path) as editor:
        snow, ice = editor.features()
        assert editor.facts["version"] == "3"
        assert (snow.causal_score, ice.causal_score, ice.causal_judge) == (0.5, None, "")
    assert Store(path, path.parent / "people.sqlite").get(0).causal_score == 0.5


def test_a_discarded_change_leaves_the_library_as_it_was(path: Path) -> None:
    before = path.read_bytes()
    editor = LibraryEditor(path)
    editor.label(0, "rain")
    editor.discard()
    assert path.read_bytes() == before


def test_what_was_saved_on_the_way_stays_when_a_long_job_is_stopped(path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"), LibraryEditor(path) as editor:  # noqa: PT012 (the block is what stops)
        editor.icon(1, b"new", [1.0], "key-1")
        editor.save()
        editor.icon(0, b"lost", [1.0], "key-2")
        raise RuntimeError("stopped")
    with LibraryEditor(path) as editor:
        assert editor.icon_keys() == {0: "key-0", 1: "key-1"}
    assert [file.name for file in path.parent.iterdir()] == ["library.sqlite"]


def test_meanings_are_stored_with_norm_one(path: Path) -> None:
    with LibraryEditor(path) as editor:
        editor.meaning("snow", np.array([3.0, 0.0, 4.0, 0.0]))
        (packed,) = editor._connection.execute("SELECT embeds FROM meanings").fetchone()
    assert np.allclose(np.frombuffer(packed, "<f2"), [0.6, 0.0, 0.8, 0.0], atol=1e-3)


def test_what_is_no_library_and_what_is_no_feature_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no library there; make one with build-library"):
        LibraryEditor(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("hello")
    with pytest.raises(ValueError, match="not a feature library that can be changed"):
        LibraryEditor(tmp_path / "text.sqlite")
    with LibraryEditor(path) as editor:
        with pytest.raises(ValueError, match="there is no feature 7"):
            editor.label(7, "x")
        with pytest.raises(ValueError, match="label source must be one of"):
            editor.label(0, "x", source="person")
    assert len(list(tmp_path.glob("*.part"))) == 0

"""Search, resolution, people's labels and the writer, on real SQLite files."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from faceteer_library.naming import Kind
from faceteer_library.person_labels import PersonLabels
from faceteer_library.spelling import SpellingIndex
from faceteer_library.store import Filter, Store
from faceteer_library.texts import Texts, match_expression
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.errors import UnknownFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LABELS = ("night", "snow", "night sky", "two boats", "Night", "", "café", "snow at night")


def row(index: int, label: str, **changes: object) -> FeatureRow:
    fields: dict[str, object] = {
        "index": index,
        "label": label,
        "firing_share": (index + 1) / 100,
        "mean": 1.0,
        "p50": 1.0,
        "p99": 2.0,
        "max": 3.0,
        "histogram_edges": np.array([1, 2, 3], np.float32),
        "histogram_counts": np.array([5, 6, 7]),
        "detection_score": 0.9,
    }
    return FeatureRow(**(fields | changes))  # type: ignore[arg-type]


def write(path: Path, labels: tuple[str, ...] = LABELS) -> None:
    with LibraryWriter(path, sae_revision="sae1", corpus="none", n_pictures=100) as writer:
        for index, label in enumerate(labels):
            writer.feature(row(index, label))
        writer.examples(0, [ExampleRow("a", 3.0, b"webp one", "a boat"), ExampleRow("b", 2.0, b"webp one")])
        writer.relatives(0, "nearest", [(2, 0.8), (4, 0.7)])
        writer.icon(1, b"webp icon", [0.0, 0.5, 1.0])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write(tmp_path / "library.sqlite")
    return Store(tmp_path / "library.sqlite", tmp_path / "labels.sqlite")


def found(store: Store, words: str) -> list[int]:
    return [hit.row.index for hit in store.search(words, Filter(), 0, 50)[0]]


def test_what_is_written_is_read(store: Store) -> None:
    assert (store.size, store.meta["sae_revision"], store.meta["n_pictures"]) == (8, "sae1", "100")
    assert store.get(3).label == "two boats"
    edges, counts = store.histogram(0)
    assert (edges.tolist(), counts.tolist()) == ([1, 2, 3], [5, 6, 7])
    examples, total = store.examples(0, 0, 10)
    strongest = (0.0, 0.0)
    assert [tuple(each) for each in examples] == [
        ("a", 3.0, b"webp one", "a boat", *strongest),
        ("b", 2.0, b"webp one", "", *strongest),
    ]
    assert total == 2
    assert store.examples(0, 1, 10)[0][0][0] == "b"
    assert [(other, label) for other, label, _ in store.relatives(0, "nearest")] == [(2, "night sky"), (4, "Night")]
    icon = store.icon(1)
    assert icon == (b"webp icon", [0.0, 0.5, 1.0])
    assert store.icon(0) is None
    with pytest.raises(UnknownFeature, match="there is no feature 8"):
        store.get(8)


def test_words_are_found_with_the_exact_label_first_and_the_last_one_unfinished(store: Store) -> None:
    assert set(found(store, "night")[:2]) == {0, 4}
    assert set(found(store, "night")) == {0, 2, 4, 7}
    assert found(store, "two bo") == [3]
    assert set(found(store, "sno")) == {1, 7}
    assert found(store, "cafe") == [6]
    assert found(store, "night boats") == []


@given(st.text(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_whatever_a_person_types_is_no_syntax(store: Store, text: str) -> None:
    hits, total = store.search(text, Filter(), 0, 5)
    assert total >= len(hits)


def test_operators_are_quoted() -> None:
    assert match_expression('snow OR "x" NEAR(y) -z*') == '"snow" "OR" "x" "NEAR" "y" "z"*'
    assert match_expression("'\"*()") == ""


def test_a_label_is_resolved_without_regard_to_case_to_what_causes_most_then_to_what_fires_most(
    tmp_path: Path,
) -> None:
    with LibraryWriter(tmp_path / "l.sqlite", sae_revision="s", corpus="", n_pictures=1) as writer:
        writer.feature(row(0, "night", causal_score=0.5, firing_share=0.9))
        writer.feature(row(1, "night", causal_score=0.93, firing_share=0.1))
        writer.feature(row(2, "Night", causal_score=0.91, firing_share=0.2))
    store = Store(tmp_path / "l.sqlite", tmp_path / "labels.sqlite")
    meant, match = store.resolve(" NIGHT ")
    assert (meant.index, meant.label_rank, meant.label_count) == (2, 1, 3)
    assert (match.kind, match.strength, match.sharing) == (Kind.LABEL, 1.0, 3)
    assert match.note == '3 features are called "Night"; #2 is meant, which fires on 20 % of pictures.'
    assert [store.get(index).label_rank for index in (0, 1)] == [3, 2]


def test_an_unknown_label_comes_with_near_ones(store: Store) -> None:
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("nihgt")
    assert caught.value.metadata["nearest"].lower().split(", ")[0] == "night"
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("quantum chromodynamics")
    assert caught.value.metadata == {}


def test_peoples_labels_are_suggested_beside_the_librarys_own(store: Store, tmp_path: Path) -> None:
    labels = PersonLabels(tmp_path / "labels.sqlite")
    labels.set(3, "nights", "ada")
    labels.set(5, "lighthouse", "ada")
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("nightss")
    suggested = caught.value.metadata["nearest"].split(", ")
    assert suggested[0] == "nights"
    assert {"night", "Night"} <= set(suggested)
    # A label that nobody sees any more is not suggested.
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("two boatz")
    assert "two boats" not in caught.value.metadata.get("nearest", "")
    # What is quoted of a long text, and compared, are its first 120 characters.
    with pytest.raises(UnknownFeature, match="x" * 120) as caught:
        store.resolve("x" * 200)
    assert "x" * 121 not in caught.value.message


def test_near_labels_come_closest_first() -> None:
    assert SpellingIndex(["blue balls", "red balls", "snow", "red"]).nearest("red bal")[0] == "red balls"


def test_five_near_labels_are_named() -> None:
    assert SpellingIndex([f"red ball{letter}" for letter in "abcdefg"]).nearest("red ball") == [
        f"red ball{letter}" for letter in "abcde"
    ]


def test_the_near_label_is_found_among_more_than_are_sorted_whole() -> None:
    texts = [f"{n:b}" for n in range(5000)]
    assert SpellingIndex([*texts, "red balls", *texts]).nearest("red ball 1") == ["red balls"]


def test_a_persons_label_that_the_library_has_already_is_that_label(store: Store, tmp_path: Path) -> None:
    PersonLabels(tmp_path / "labels.sqlite").set(3, "snow", "ada")
    assert (store.get(3).label, store.get(3).source) == ("snow", "person")
    assert set(found(store, "snow")[:2]) == {1, 3}


def test_a_persons_label_wins_is_found_at_once_and_can_be_taken_back(store: Store, tmp_path: Path) -> None:
    people = PersonLabels(tmp_path / "labels.sqlite")
    assert found(store, "lighthouse") == []
    people.set(1, "lighthouse", "ada")
    assert (store.get(1).label, store.get(1).source) == ("lighthouse", "person")
    assert store.resolve("Lighthouse").row.index == 1
    assert found(store, "light") == [1]
    assert 1 not in found(store, "snow"), "the automatic label is hidden"
    with pytest.raises(UnknownFeature):
        store.resolve("snow")
    people.set(1, "", "ada")
    assert (store.get(1).label, store.get(1).source) == ("snow", "automatic")
    assert 1 in found(store, "snow")


def test_rebuilding_the_library_keeps_peoples_labels(store: Store, tmp_path: Path) -> None:
    PersonLabels(tmp_path / "labels.sqlite").set(1, "lighthouse", "ada")
    write(tmp_path / "library.sqlite", ("new", "labels"))
    again = Store(tmp_path / "library.sqlite", tmp_path / "labels.sqlite")
    assert [again.get(0).label, again.get(1).label] == ["new", "lighthouse"]


def test_a_failed_build_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "library.sqlite")
    before = (tmp_path / "library.sqlite").read_bytes()

    def fail_midway() -> None:
        with LibraryWriter(tmp_path / "library.sqlite", sae_revision="s", corpus="", n_pictures=1) as writer:
            writer.feature(row(0, "x"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert (tmp_path / "library.sqlite").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["library.sqlite"]


def test_a_file_that_is_no_library_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_bytes(b"hello")
    for name in ("x.sqlite", "none.sqlite"):
        with pytest.raises(BundleError, match=name):
            Store(tmp_path / name, tmp_path / "labels.sqlite")


def test_a_foreign_file_of_labels_is_refused_when_the_library_opens(tmp_path: Path) -> None:
    write(tmp_path / "library.sqlite")
    (tmp_path / "labels.sqlite").write_bytes(b"no database, though long enough to be taken for one " * 50)
    with pytest.raises(BundleError, match=r"labels\.sqlite"):
        Store(tmp_path / "library.sqlite", tmp_path / "labels.sqlite")


def test_labels_given_by_many_at_once_are_all_recorded(tmp_path: Path) -> None:
    labels = PersonLabels(tmp_path / "labels.sqlite")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: labels.set(n % 10, f"label {n}", "ada"), range(40)))
    with closing(sqlite3.connect(tmp_path / "labels.sqlite")) as connection:
        history = connection.execute("SELECT label, author FROM history").fetchall()
        shown = dict(connection.execute("SELECT feature, label FROM labels"))
    assert sorted(history) == sorted((f"label {n}", "ada") for n in range(40))
    assert shown.keys() == set(range(10))


def test_a_new_label_is_read_once_however_many_ask_at_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.get(1)
    PersonLabels(tmp_path / "labels.sqlite").set(1, "lighthouse", "ada")
    made, show = [], store._show

    def slowly(given: dict[int, str]) -> object:
        made.append(given)
        time.sleep(0.2)
        return show(given)

    monkeypatch.setattr(store, "_show", slowly)
    with ThreadPoolExecutor(4) as pool:
        labels = list(pool.map(lambda _: store.get(1).label, range(4)))
    assert (labels, made) == (["lighthouse"] * 4, [{1: "lighthouse"}])


def test_full_text_queries_take_turns_on_their_one_connection() -> None:
    texts = Texts(["night", "night sky"])
    connection, lock = texts._connection, texts._lock

    class Watched:
        def execute(self, *query: object) -> object:
            assert lock.locked()
            return connection.execute(*query)  # type: ignore[arg-type]

    texts._connection = Watched()  # type: ignore[assignment]
    assert texts.matching("night").tolist() == [0, 1]


def test_labels_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere"):
        PersonLabels(tmp_path / "nowhere" / "labels.sqlite").set(1, "x", "")


def test_a_library_of_the_published_size_is_searched_in_milliseconds(tmp_path: Path) -> None:
    words = ["night", "snow", "boat", "tree", "red", "fog", "house", "cat", "blue", "sky", "road", "hand", "glass"]
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(words), (163_840, 3))
    path = tmp_path / "library.sqlite"
    with LibraryWriter(path, sae_revision="s", corpus="made up", n_pictures=1) as writer:
        for index, (a, b, c) in enumerate(picks.tolist()):
            writer.feature(row(index, f"{words[a]} {words[b]} {words[c]} {index % 997}"))
    store = Store(path, tmp_path / "labels.sqlite")
    for words_typed in ("lighthouse", "boat sno 12", "red fog house"):
        store.search(words_typed, Filter(), 0, 50)
        started = time.process_time()
        store.search(words_typed, Filter(), 0, 50)
        # Milliseconds on an idle core; the bound leaves room for a busy machine, and none for a scan of all labels.
        assert time.process_time() - started < 0.5

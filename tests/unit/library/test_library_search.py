"""Search by words and meaning, filters, orders and what is gated, against what one can count by hand."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from faceteer_library.access import EVERYTHING, AccessPolicy
from faceteer_library.filters import Filter
from faceteer_library.label_embeddings import CANDIDATES, LabelEmbeddings
from faceteer_library.person_labels import PersonLabels
from faceteer_library.semantic import SemanticIndex
from faceteer_library.store import Store
from faceteer_library.texts import Texts
from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter
from faceteer_runtime.errors import NotPermitted, UnknownFeature

# label, other words, firing share, detection, causal, safety class
FEATURES = (
    ("night", ("dusk", "evening"), 0.1, 0.9, 0.2, ""),
    ("night", (), 0.5, 0.8, 0.9, ""),
    ("night sky", (), 0.2, 0.95, None, ""),
    ("darkness", (), 0.3, 0.6, 0.75, ""),
    ("snow", ("night",), 0.4, None, None, ""),
    ("", (), 0.0, None, None, ""),
    ("knife", (), 0.2, 0.9, 0.9, "violence"),
    ("nude", (), 0.2, 0.3, 0.1, "nudity"),
    ("Night", (), 0.05, 0.7, 0.7, ""),
)
# Two dimensions of meaning and one that all texts share: night and darkness lie close together.
MEANINGS = {"night": (1, 0.1), "Night": (1, 0.1), "night sky": (1, 0.3), "darkness": (1, 0), "snow": (-1, 1),
            "knife": (-1, -1), "nude": (-1, -0.9)}  # fmt: skip


def meaning(x: float, y: float) -> np.ndarray:
    return np.array([x, y, 4.0], np.float32)


def write(path: Path) -> None:
    edges, counts = np.array([1, 2], np.float32), np.array([5, 6])
    with LibraryWriter(path, sae_revision="s", corpus="c", n_pictures=9, embed_dim=3) as writer:
        for index, (label, terms, share, detection, causal, safety_class) in enumerate(FEATURES):
            writer.feature(
                FeatureRow(index, label, share, 1.0, 1.0, 2.0 * (share > 0), 3.0, edges, counts, terms=terms,
                           detection_score=detection, causal_score=causal, safety_class=safety_class)
            )  # fmt: skip
        for label, place in MEANINGS.items():
            writer.meaning(label, meaning(*place))
        writer.relatives(0, "nearest", [(6, 0.9), (1, 0.8)])
        writer.examples(0, [ExampleRow("a", 3.0, b"webp"), ExampleRow("b", 2.0, b"webp")])
        writer.examples(0, [ExampleRow("c", 1.0, b"webp", "", (0.25, 0.5))], "quantiles")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    write(tmp_path / "library.sqlite")
    return Store(tmp_path / "library.sqlite", tmp_path / "labels.sqlite")


def found(store: Store, words: str, embeds: np.ndarray | None = None, chosen: Filter | None = None) -> list[int]:
    hits, total = store.search(words, chosen or Filter(), 0, 50, embeds)
    assert total == len(hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    return [hit.row.index for hit in hits]


def listed(store: Store, order: str = "index", **chosen: object) -> list[int]:
    return [row.index for row in store.list(Filter(**chosen), order, 0, 50)[0]]  # type: ignore[arg-type]


def test_the_label_itself_comes_first_then_labels_with_the_word_then_other_words(store: Store) -> None:
    # Of three that are called night those lead that cause it.
    assert found(store, "night") == [1, 8, 0, 4, 2]
    assert found(store, "even") == [0]
    assert found(store, "dark") == [1, 8, 0, 4, 3], "what it means, then what holds it"
    assert found(store, "") == found(store, "nothing like it") == []


def test_words_and_their_meaning_together_find_what_words_alone_do_not(store: Store) -> None:
    both = found(store, "night", meaning(1, 0.1))
    assert both[:3] == [1, 8, 0], "the label that was typed"
    assert set(both) == {0, 1, 2, 3, 4, 8}, "darkness means much the same; knife does not"
    assert found(store, "gloom", meaning(1, 0.05))[-1] != 4
    assert 3 in found(store, "gloom", meaning(1, 0.05))


def test_a_meaning_that_is_near_to_no_label_finds_nothing(store: Store) -> None:
    assert found(store, "gibberish", meaning(0.42, -0.9)) == []


def score_of(store: Store, words: str, embeds: np.ndarray | None = None) -> dict[int, float]:
    return {hit.row.index: hit.score for hit in store.search(words, Filter(), 0, 50, embeds)[0]}


def test_scores_are_strengths_of_the_match_with_the_typed_label_ahead(store: Store) -> None:
    # The label; another word; the words' share of a label's letters.
    assert score_of(store, "night") == pytest.approx({0: 1, 1: 1, 8: 1, 4: 0.95, 2: 0.6 * 5 / 8})
    # By meaning, three quarters of the cosine.
    query = meaning(1, 0.1)
    assert store._embeddings is not None
    rows, cosines = store._embeddings.closest(query)
    near = {list(MEANINGS)[row]: cosine for row, cosine in zip(rows, cosines, strict=True)}
    # The label of #3 hardly tells where it fires, but it causes darkness.
    assert score_of(store, "gloom", query)[3] == pytest.approx(0.75 * near["darkness"])
    assert score_of(store, "sky", query)[2] == pytest.approx(0.75 * near["night sky"])


def test_labels_close_in_meaning_come_with_their_cosine_and_texts_of_one_row_share_it() -> None:
    embeddings = LabelEmbeddings(np.array([[1, 0.1, 4], [-1, 1, 4], [1, 0, 4], [-1, -1, 4]], np.float16) / 4)
    # Two spellings of the last row's label; row 1 has no text here.
    semantic = SemanticIndex(embeddings, ["a", "b", "c", "D"], Texts(["", "d", "D", "c", "a"]))
    numbers, cosines = semantic.closest(np.array([1, 0.02, 4], np.float32))
    assert numbers.tolist() == [3, 4]
    assert cosines[0] > cosines[1]
    numbers, cosines = semantic.closest(np.array([-1, -1, 4], np.float32))
    assert numbers.tolist() == [1, 2]
    assert cosines[0] == cosines[1]
    numbers, _ = semantic.with_person_labels(Texts(["C", "other"])).closest(np.array([1, 0.02, 4], np.float32))
    assert numbers.tolist() == [3, 5, 4]


def test_pages_of_a_search_are_the_whole_search_cut(store: Store) -> None:
    whole = found(store, "night", meaning(1, 0.1))
    for size in (1, 2, 4):
        pages = [store.search("night", Filter(), start, size, meaning(1, 0.1)) for start in range(0, 8, size)]
        assert [hit.row.index for hits, _ in pages for hit in hits] == whole
        assert {total for _, total in pages} == {len(whole)}


def test_lists_are_filtered_by_scores(store: Store) -> None:
    assert listed(store, scores_disagree=True) == [0, 3]
    assert listed(store, scores_disagree=False) == [1, 6, 7, 8]
    assert listed(store, min_detection_score=0.8, max_detection_score=0.9) == [0, 1, 6]
    assert listed(store, min_causal_score=0.75) == [1, 3, 6]
    assert listed(store, max_causal_score=0.2) == [0, 7]
    assert listed(store, labelled=False) == listed(store, alive=False) == [5]
    assert listed(store, sources=("automatic",), max_firing_share=0.1) == [0, 8]
    assert found(store, "night", None, Filter(scores_disagree=True)) == [0]


def test_lists_are_ordered_with_what_is_not_known_last(store: Store) -> None:
    assert listed(store, "detection_score") == [2, 0, 6, 1, 8, 3, 7, 4, 5]
    assert listed(store, "causal_score") == [1, 6, 3, 8, 0, 7, 2, 4, 5]
    assert listed(store, "score_disagreement") == [0, 7, 3, 1, 6, 8, 2, 4, 5]
    assert listed(store, "firing_share")[:3] == [1, 4, 3]
    assert listed(store, "label") == [3, 6, 0, 1, 8, 2, 7, 4, 5]


def test_a_pictures_features_come_by_their_share_of_p99(store: Store) -> None:
    indices, activations = np.array([8, 5, 2, 4, 77, 1]), np.array([1, 9, 4, 0, 9, 3], np.float32)
    hits, total = store.firing(indices, activations, Filter(), 0, 10)
    # 5 never fired on the corpus and has no p99; 4 does not fire here; 77 is not in the library.
    assert [(hit.row.index, hit.score) for hit in hits] == [(2, 2.0), (1, 1.5), (8, 0.5), (5, 0.0)]
    assert total == 4
    assert [hit.row.index for hit in store.firing(indices, activations, Filter(alive=True), 1, 1)[0]] == [1]


def test_examples_of_each_selection(store: Store) -> None:
    assert [example.picture for example in store.examples(0, 0, 10)[0]] == ["a", "b"]
    examples, total = store.examples(0, 0, 10, "quantiles")
    assert total == 1
    assert examples[0][:2] + examples[0][4:] == ("c", 1.0, 0.25, 0.5)


def test_a_persons_label_takes_words_scores_and_meaning_of_the_automatic_one_away(store: Store, tmp_path: Path) -> None:
    PersonLabels(tmp_path / "labels.sqlite").set(0, "Darkness", "ada")
    row = store.get(0)
    assert (row.label, row.source, row.detection_score, row.causal_score) == ("Darkness", "person", None, None)
    assert 0 not in found(store, "evening")
    assert set(found(store, "darkness")[:2]) == {0, 3}
    # It means what the automatic label of the same text means.
    assert {0, 3} <= set(found(store, "gloom", meaning(1, 0)))
    assert listed(store, scores_disagree=True) == [3]
    # With the automatic label's own words the scores stay.
    PersonLabels(tmp_path / "labels.sqlite").set(0, "NIGHT", "ada")
    assert store.get(0).detection_score == 0.9
    assert listed(store, sources=("person",)) == [0]


def test_labels_given_while_others_search_are_seen_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    people, wrong = PersonLabels(tmp_path / "labels.sqlite"), []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            row = store.get(1)
            if (row.label, row.source) not in (("night", "automatic"), ("lamp", "person")):
                wrong.append(row)
            store.search("lamp", Filter(), 0, 5)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for label in itertools.islice(itertools.cycle(("lamp", "")), 20):
        people.set(1, label, "ada")
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_a_library_of_version_1_is_read(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    path = tmp_path / "library.sqlite"
    write(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(
            """UPDATE meta SET value = '1' WHERE key = 'version'; DROP TABLE meanings;
            ALTER TABLE features DROP COLUMN terms; ALTER TABLE features DROP COLUMN detection_balanced_accuracy;
            CREATE TABLE old AS SELECT feature, rank, picture, activation, caption, thumbnail FROM examples
                WHERE selection = 'strongest';
            DROP TABLE examples; ALTER TABLE old RENAME TO examples;"""
        )
    store = Store(path, tmp_path / "labels.sqlite")
    assert not store.searches_meaning
    assert found(store, "night", np.ones(3, np.float32)) == [1, 8, 0, 2]
    assert store.get(0).terms == ()
    assert [example.picture for example in store.examples(0, 0, 10)[0]] == ["a", "b"]
    assert store.examples(0, 0, 10, "quantiles") == ([], 0)


def test_without_a_key_gated_features_are_nowhere(store: Store) -> None:
    visible = AccessPolicy(["violence"]).named("")
    everything = Filter()
    assert store.get(7, visible).label == "nude", "a class that the operator does not gate"
    for ask in (lambda: store.get(6, visible), lambda: store.resolve("knife", visible)):
        with pytest.raises(UnknownFeature):
            ask()
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("knive", visible)
    assert caught.value.metadata == {}
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("knive")
    assert caught.value.metadata == {"nearest": "knife"}
    rows, total = store.list(everything, "index", 0, 50, visible)
    assert (6 in [row.index for row in rows], total) == (False, 8)
    assert store.search("knife", everything, 0, 50, None, visible) == ([], 0)
    assert 6 not in [hit.row.index for hit in store.search("x", everything, 0, 50, meaning(-1, -1), visible)[0]]
    assert [hit.row.index for hit in store.similar(0, everything, 0, 50, visible)[0]] == [1]
    assert [other for other, _, _ in store.relatives(0, "nearest", visible)] == [1]
    assert store.firing(np.array([6]), np.ones(1, np.float32), everything, 0, 5, visible) == ([], 0)
    facts = store.facts(visible)
    assert facts == (8, 7, 7, ("nudity",))
    assert store.facts(EVERYTHING) == (9, 8, 8, ("nudity", "violence"))


def test_a_person_who_renames_a_gated_feature_does_not_free_it(store: Store, tmp_path: Path) -> None:
    PersonLabels(tmp_path / "labels.sqlite").set(6, "harmless", "ada")
    visible = AccessPolicy().named("")
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("harmles", visible)
    assert "harmless" not in caught.value.message
    with pytest.raises(UnknownFeature) as caught:
        store.resolve("harmles")
    assert "harmless" in caught.value.message
    assert store.search("harmless", Filter(), 0, 5, None, visible) == ([], 0)


def test_keys_open_gates_where_lists_name_the_class() -> None:
    gate = AccessPolicy(["*"], ["first-key", "second-key"])
    assert gate.named("second-key").sees("violence")
    assert not gate.named("second-ke").sees("violence")
    assert not gate.named("").sees("violence")
    assert gate.named("").sees("")
    assert not gate.listed("first-key", []).sees("violence")
    opened = gate.listed("first-key", ["violence"])
    assert (opened.sees("violence"), opened.sees("nudity")) == (True, False)
    assert gate.listed("first-key", ["*"]).sees("nudity")
    for named in (["violence"], ["*"], ["never heard of"]):
        with pytest.raises(NotPermitted, match=r"include_safety_classes"):
            gate.listed("wrong", named)


def test_a_class_that_is_not_gated_needs_no_key() -> None:
    some, none = AccessPolicy(["violence"]), AccessPolicy([])
    assert some.listed("", ["nudity"]).sees("nudity")
    assert none.listed("", ["*"]).sees("violence")
    assert none.named("").sees("violence")
    # Without any key in the settings nobody may, and an empty key is none.
    assert not AccessPolicy(["*"], [""]).permits("")


@pytest.mark.parametrize("n", [1, 40, 5000])
def test_the_closest_labels_are_those_of_a_plain_comparison(n: int) -> None:
    rng = np.random.default_rng(n)
    spectrum = 1 / np.sqrt(np.arange(1, 1025))
    embeds = rng.standard_normal((n, 1024)) * spectrum + 2 * rng.standard_normal(1024) / 32
    embeds = (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).astype(np.float16)
    meanings = LabelEmbeddings(embeds)
    exact = embeds.astype(np.float64)
    centred = exact - exact.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    for row in range(0, n, max(1, n // 10)):
        query = exact[row] + rng.standard_normal(1024) * 0.01
        wanted = query / np.linalg.norm(query) - exact.mean(0)
        cosines = centred @ (wanted / np.linalg.norm(wanted))
        order = [at for at in np.argsort(-cosines)[:CANDIDATES] if cosines[at] >= meanings.floor]
        meant = meanings.closest(query.astype(np.float32))
        assert len(set(meant.rows[:20]) & set(order[:20])) >= min(19, len(order)), "screening loses next to nothing"
        assert np.allclose(meant.cosines, cosines[meant.rows], atol=1e-3)
        if n > 1:
            assert meant.rows[0] == row

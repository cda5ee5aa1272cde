"""What a name means: the order of candidates, the ways in which words find features, and what is said about the choice.

The judged words of tests/words.toml are tried on the shipped bundle, as a search and an edit try them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faceteer_encoder.model import ClipEncoder, load_encoder
from faceteer_library.filters import Filter
from faceteer_library.naming import Kind
from faceteer_library.person_labels import PersonLabels
from faceteer_library.standing import CAUSES, NOTHING, PREDICTS, RARE
from faceteer_library.store import Store
from faceteer_library.synonyms import Synonyms, general
from faceteer_library.words import forms, is_negated, split
from faceteer_library.writer import FeatureRow, LibraryWriter
from faceteer_runtime.errors import UnknownFeature

TESTS = Path(__file__).parents[2]
POSTCARDS = TESTS.parent / "deploy" / "bundles" / "postcards"
WORDS: dict[str, dict[str, Any]] = tomllib.loads((TESTS / "words.toml").read_text(encoding="utf-8"))
# How postcards' features are labelled where the label is not the factor's value itself.
LABELS = {"ground:water": "sea", "weather:clear": "clear sky", "border:none": "unframed", "border:white": "white frame",
          "border:black": "black frame"}  # fmt: skip
# Each value of a factor is on at least an eighth of all postcards, on which its feature fires.
LEAST_SHARE = 0.1


def library(path: Path, *features: dict[str, Any]) -> Store:
    edges, counts = np.array([1], np.float32), np.array([1])
    with LibraryWriter(path / "library.sqlite", sae_revision="s", corpus="c", n_pictures=9) as writer:
        for index, given in enumerate(features):
            row = {"firing_share": 0.1, "mean": 1.0, "p50": 1.0, "p99": 2.0, "max": 3.0, **given}
            writer.feature(FeatureRow(index=index, histogram_edges=edges, histogram_counts=counts, **row))
    return Store(path / "library.sqlite", path / "labels.sqlite")


def meant(store: Store, name: str) -> int:
    return store.resolve(name).row.index


@pytest.fixture(scope="module")
def postcards(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(POSTCARDS / "library" / "library.sqlite", tmp_path_factory.mktemp("labels") / "labels.sqlite")


@pytest.fixture(scope="module")
def tower() -> ClipEncoder:
    return load_encoder(POSTCARDS / "encoder")[0]


def embedding(tower: ClipEncoder, words: str) -> np.ndarray | None:
    """As the studio gives it: none for words that the tower does not know."""
    return None if tower.unknown_words(words) else tower.encode_texts([words])[0]


# -- which of several ----------------------------------------------------------------------------


def test_a_name_means_what_a_person_called_so_then_what_causes_it_then_what_fires_most(tmp_path: Path) -> None:
    store = library(
        tmp_path,
        {"label": "blue", "firing_share": 0.3, "causal_score": 0.5, "detection_score": 0.99},
        {"label": "blue", "firing_share": 0.1, "causal_score": 0.95, "detection_score": 0.9},
        {"label": "blue", "firing_share": RARE / 2, "causal_score": 1.0, "detection_score": 1.0},
        {"label": "blue", "firing_share": 0.2, "causal_score": 0.93, "detection_score": 0.9},
    )
    assert meant(store, "blue") == 1, "0.95 rounds to 1.0, 0.93 to 0.9"
    assert [store.get(index).label_rank for index in range(4)] == [3, 1, 4, 2]
    PersonLabels(tmp_path / "labels.sqlite").set(0, "Blue", "ada")
    assert meant(store, "blue") == 0
    PersonLabels(tmp_path / "labels.sqlite").set(0, "sky", "ada")
    PersonLabels(tmp_path / "labels.sqlite").set(2, "blue", "ada")
    assert meant(store, "blue") == 2, "a person may name what is rare"


@pytest.mark.parametrize(
    "weak",
    [
        {"firing_share": RARE * 0.99, "causal_score": 1.0, "detection_score": 1.0},
        {"firing_share": 0.5, "causal_score": NOTHING - 0.01, "detection_score": 1.0},
        {"firing_share": 0.5, "causal_score": None, "detection_score": PREDICTS - 0.01},
        {"firing_share": 0.5, "causal_score": CAUSES - 0.01, "detection_score": PREDICTS - 0.01},
    ],
)
def test_a_weak_feature_is_named_only_where_no_other_is_and_then_it_is_said(
    tmp_path: Path, weak: dict[str, Any]
) -> None:
    alone, among = tmp_path / "alone", tmp_path / "among"
    alone.mkdir(), among.mkdir()
    store = library(alone, {"label": "lamp", **weak}, {"label": "lantern light"})
    found = store.resolve("lamp")
    assert found.row.index == 0
    assert "no better feature of that name" in found.match.note
    # Another that has it only as another word is better; one that it is merely a synonym of is not.
    strong = {"firing_share": RARE, "causal_score": None, "detection_score": PREDICTS}
    store = library(among, {"label": "lamp", **weak}, {"label": "street", "terms": ("lamp",), **strong},
                    {"label": "lantern", **strong})  # fmt: skip
    assert meant(store, "lamp") == 1
    assert store.resolve("lamp").match.kind == Kind.OTHER_WORD
    assert store.resolve("lantern").row.index == 2


def test_a_choice_among_features_of_one_label_is_said_and_a_plain_one_is_not(tmp_path: Path) -> None:
    share = {"firing_share": 0.158}
    store = library(tmp_path, {"label": "blue", **share}, {"label": "blue"}, {"label": "Blue"}, {"label": "red"})
    assert store.resolve("blue").match[1:] == (
        Kind.LABEL, "blue", 1.0, 3, '3 features are called "blue"; #0 is meant, which fires on 15.8 % of pictures.'
    )  # fmt: skip
    assert store.resolve("red").match.note == ""
    assert store.resolve("scarlet").match.note == '"scarlet" is taken to mean "red" (#3).'
    row = store.get(2)
    assert (row.label_rank, row.label_count) == (3, 3)


# -- ways to a feature ---------------------------------------------------------------------------


def test_each_way_to_a_feature_is_weaker_than_the_one_before(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "snow", "terms": ("powder",)}, {"label": "snowy owl"})
    strengths = [store.resolve(word).match.strength for word in ("snow", "snowy", "powder", "winter")]
    assert strengths == sorted(strengths, reverse=True)
    hits, _ = store.search("snow", Filter(), 0, 5)
    assert [(hit.row.index, hit.match.kind) for hit in hits] == [(0, Kind.LABEL), (1, Kind.PART)]
    with pytest.raises(UnknownFeature):
        store.resolve("owl")


def test_synonyms_of_parts_mean_the_whole(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "white frame"}, {"label": "forest"}, {"label": "frame"})
    assert [meant(store, name) for name in ("white border", "the woods", "in a wood", "edging")] == [0, 1, 1, 2]


def test_a_kitten_is_a_cat_but_a_cat_is_no_kitten(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "kitten"}, {"label": "dog"})
    with pytest.raises(UnknownFeature):
        store.resolve("cat")
    assert meant(store, "puppy") == 1


def test_what_is_denied_is_not_there_unless_a_label_says_so(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "red"}, {"label": "snow"}, {"label": "unframed", "terms": ("no border",)})
    for words in ("not red", "without snow", "no snow", "snowless", "snow free"):
        assert store.search(words, Filter(), 0, 5) == ([], 0), words
        with pytest.raises(UnknownFeature):
            store.resolve(words)
    for words in ("no border", "without a frame", "borderless", "no frame"):
        assert meant(store, words) == 2, words
    assert is_negated(split("isn't red"))
    assert not is_negated(split("no"))


def test_parts_of_words_without_spaces_between_them_are_found(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "青い海と空"}, {"label": "夜景"}, {"label": "sea"})
    for words, index in (("海", 0), ("海と空", 0), ("景", 1)):
        assert [hit.row.index for hit in store.search(words, Filter(), 0, 5)[0]] == [index], words
    assert store.search("山", Filter(), 0, 5) == ([], 0)


def test_only_labels_spelt_nearly_so_are_suggested(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "balloon"}, {"label": "white"}, {"label": "flower"}, {"label": "car"})
    assert list(store.nearly_spelt("baloon")) == ["balloon"]
    for word in ("water", "guitar", "angry"):
        assert list(store.nearly_spelt(word)) == [], word


def test_a_word_that_only_means_a_feature_does_not_rename_it(tmp_path: Path) -> None:
    store = library(tmp_path, {"label": "sea", "terms": ("water",)})
    assert store.resolve("Sea", by_label=True).row.index == 0
    for name in ("water", "ocean"):
        with pytest.raises(UnknownFeature):
            store.resolve(name, by_label=True)


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "base"),
    [("rainy", "rain"), ("snowing", "snow"), ("foggy", "fog"), ("grassy", "grass"), ("hazy", "haze"), ("icy", "ice"),
     ("striped", "stripe"), ("reddish", "red"), ("berries", "berry"), ("boxes", "box"), ("mice", "mouse"),
     ("leaves", "leaf"), ("running", "run"), ("caring", "care")],
)  # fmt: skip
def test_a_form_of_a_word_leads_to_the_word(word: str, base: str) -> None:
    assert base in forms(word)


@pytest.mark.parametrize(
    ("word", "other"),
    [("story", "store"), ("bunny", "bun"), ("caring", "car"), ("spring", "spr"), ("glass", "glas"), ("king", "k"),
     ("bed", "b"), ("evening", "even"), ("party", "part")],
)  # fmt: skip
def test_words_that_only_look_like_a_form_do_not(word: str, other: str) -> None:
    assert other not in forms(word)


def test_the_table_of_synonyms_goes_by_groups_and_directions() -> None:
    table = Synonyms(iter(["sea, ocean", "pond > lake", "lake, mere", "# a comment", "ocean, main > water  # why"]))
    assert table.of(("sea",)).keys() == {("ocean",), ("water",)}
    assert table.of(("ponds",)).keys() == {("lake",), ("mere",)}
    assert table.of(("water",)) == {}
    sea = table.of(("sea",))
    assert 1 > sea[("ocean",)] > sea[("water",)] > 0.7
    with pytest.raises(ValueError, match="names nothing"):
        Synonyms(iter(["alone"]))
    assert len(general().of(("automobile",))) >= 1


# -- the shipped bundle --------------------------------------------------------------------------


def does_what(store: Store, name: str, wanted: list[str]) -> bool:
    try:
        row = store.resolve(name).row
    except UnknownFeature:
        return False
    labels = [LABELS.get(value, value.partition(":")[2]) for value in wanted]
    return row.label in labels and row.firing_share >= LEAST_SHARE


def test_every_plain_word_leads_to_the_feature_that_does_what_it_says(postcards: Store) -> None:
    wrong = [word for word, wanted in WORDS["plain"].items() if not does_what(postcards, word, wanted)]
    assert not wrong


def test_synonyms_lead_to_the_feature_that_does_what_they_say(postcards: Store) -> None:
    wrong = [word for word, wanted in WORDS["synonyms"].items() if not does_what(postcards, word, wanted)]
    assert len(wrong) <= 7, wrong


def test_words_for_what_postcards_cannot_show_find_nothing(postcards: Store, tower: ClipEncoder) -> None:
    found = {}
    for word in WORDS["nothing"]["words"]:
        hits, total = postcards.search(word, Filter(), 0, 3, embedding(tower, word))
        if total:
            found[word] = [(hit.row.label, hit.match) for hit in hits]
        with pytest.raises(UnknownFeature):
            postcards.resolve(word)
    assert not found


def test_the_towers_vocabulary_is_told_by_its_tokens(tower: ClipEncoder) -> None:
    assert [tower.unknown_words(words) for words in ("a blue house at night", "sea", "snowfall 3")] == [(), (), ()]
    assert tower.unknown_words("Airplane at night, angry dog") == ("airplane", "angry", "dog")
    for word in ("train", "castle", "海"):
        assert tower.unknown_words(word) == (word,)

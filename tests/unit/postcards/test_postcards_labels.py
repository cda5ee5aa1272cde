"""Words and what they mean, the judge of icons, and whether the shipped library and SAE say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_library.store import Store
from faceteer_postcards.evaluation.icon_judge import ClassifierJudge
from faceteer_postcards.evaluation.representation import NOWHERE, ValueFeature, features_by_label
from faceteer_postcards.words import MEANT, WORDS
from faceteer_postcards.world import FACTORS, VALUES
from faceteer_sae.statistics import load_statistics
from faceteer_trainer.labels.vocabulary import read_terms
from PIL import Image

POSTCARDS = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"


def test_every_word_that_labels_are_chosen_from_names_one_value() -> None:
    assert set(read_terms("postcards")) <= set(MEANT)
    assert set(WORDS) == set(VALUES)
    assert len({words[0] for words in WORDS.values()}) == len(VALUES), "38 words for 38 values"


class Colours(torch.nn.Module):
    """Sees night instead of day where pixels are dark, and red instead of green where the red channel leads."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        logits = [torch.zeros(len(images), len(values)) for values in FACTORS.values()]
        names = list(FACTORS)
        for row, image in enumerate(images):
            red, green, _ = image.mean((1, 2))
            logits[names.index("time")][row, FACTORS["time"].index("night" if red + green < -1 else "day")] = 20
            logits[names.index("colour")][row, FACTORS["colour"].index("red" if red > green else "green")] = 20
        return logits


def strip(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


def test_a_classifier_says_what_an_icon_shows_and_nothing_where_it_sees_no_change() -> None:
    judge = ClassifierJudge(Colours())  # type: ignore[arg-type]
    assert judge.knows("moonlight")
    assert not judge.knows("quay")
    green, red, dark = (100, 250, 100), (250, 100, 100), (10, 20, 10)
    assert judge.score(strip(green, red, red), "red") == 1.0
    assert judge.score(strip(green, green, red), "red") == 0.75, "half strength shows nothing, which is chance"
    # Turned red where blue was meant: no better than the values that stay where they are.
    others = judge.score(strip(green, green, red), "blue")
    assert others is not None
    assert others < 0.6
    assert judge.score(strip(green, dark, dark), "midnight") == 1.0
    assert judge.score(strip(green, green, green), "red") is None
    assert judge.score(strip(red, red, green), "red") is None, "the template shows it already"


def test_a_words_feature_is_the_one_that_an_edit_by_label_takes() -> None:
    values = [ValueFeature("time", "night", 7, 1.0), ValueFeature("border", "none", 36, 1.0)]
    night, _ = features_by_label(POSTCARDS, values)
    assert (night.feature, night.value) == (24, "night")
    assert np.isnan(night.auc)


def test_a_word_that_leads_nowhere_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORDS, ("time", "night"), ("zzyzx",))
    (found,) = features_by_label(POSTCARDS, [ValueFeature("time", "night", 24, 1.0)])
    assert found.feature == NOWHERE


def test_the_shipped_library_and_sae_are_of_one_measurement() -> None:
    store = Store(POSTCARDS / "library" / "library.sqlite", POSTCARDS / "none.sqlite")
    if store.meta["version"] == "2":
        pytest.skip("made before library and statistics were written together")
    features = [store.get(index) for index in range(store.size)]
    statistics = load_statistics(POSTCARDS / "sae", 64, 128)
    assert statistics is not None
    assert [f.p99 for f in features] == statistics.p99.tolist()
    assert [f.firing_share for f in features] == statistics.firing_share.tolist()

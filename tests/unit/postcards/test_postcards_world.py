"""The postcards' world: scenes, their pictures and what captions say of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faceteer_postcards.captions import (
    CONTEXT_LENGTH,
    UNNAMED,
    caption,
    claims_of,
    describe,
    is_true,
    value_claims,
    write_vocabulary,
)
from faceteer_postcards.corpus import draw_corpus, open_corpus
from faceteer_postcards.render import FRAME, SIZE, render
from faceteer_postcards.world import FACTOR_NAMES, FACTORS, VALUES, Scene, sample_codes, sample_scene
from open_clip.tokenizer import SimpleTokenizer

PLAIN = Scene("day", "grass", "house", "red", "one", "clear", "none", "plain", seed=7)


def test_the_same_scene_is_the_same_picture_and_another_seed_another_one() -> None:
    np.testing.assert_array_equal(render(PLAIN), render(PLAIN))
    assert (render(PLAIN) != render(replace(PLAIN, seed=8))).any()


def test_an_unknown_value_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="weather is 'hail', not one of clear, rain, snowfall, fog"):
        replace(PLAIN, weather="hail")


@pytest.mark.parametrize("name", FACTOR_NAMES)
def test_every_value_of_a_factor_changes_the_picture_visibly(name: str) -> None:
    pictures = [render(replace(PLAIN, **{name: value})).astype(int) for value in FACTORS[name]]
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert (np.abs(one - other).max(-1) > 40).mean() > 0.01


def test_a_border_is_a_frame_of_its_colour() -> None:
    picture = render(replace(PLAIN, border="black"))
    assert picture.shape == (SIZE, SIZE, 3)
    assert (picture[:FRAME] == 0).all()
    assert (picture[:, -FRAME:] == 0).all()
    assert picture[FRAME:-FRAME, FRAME:-FRAME].mean() > 60


def test_night_is_darker_than_day() -> None:
    assert render(replace(PLAIN, time="night")).mean() < 0.6 * render(PLAIN).mean()


def test_codes_and_scene_lead_back_to_each_other() -> None:
    scene = sample_scene(3)
    assert Scene.from_codes(scene.codes, 3) == scene


def test_factors_are_drawn_independently() -> None:
    codes = sample_codes(20_000, 0).astype(float)
    correlation = np.corrcoef(codes.T) - np.eye(len(FACTOR_NAMES))
    assert np.abs(correlation).max() < 0.03


def test_a_corpus_drawn_twice_is_the_same_and_a_half_drawn_one_is_drawn_again(tmp_path: Path) -> None:
    first = np.array(draw_corpus(tmp_path / "a", 12, seed=5).pictures)
    again = open_corpus(tmp_path / "a")
    np.testing.assert_array_equal(first, again.pictures)
    np.testing.assert_array_equal(first[4], render(again.scene(4)))
    (tmp_path / "a" / "corpus.json").unlink()  # as after a kill: the card is written last
    np.testing.assert_array_equal(first, draw_corpus(tmp_path / "a", 12, seed=5).pictures)


def test_a_core_draws_hundreds_of_pictures_a_second() -> None:
    scenes = [Scene.from_codes(codes, i) for i, codes in enumerate(sample_codes(600, 1))]
    for scene in scenes:
        render(scene)  # sprites and skies are drawn once
    started = time.process_time()
    for scene in scenes:
        render(scene)
    assert 600 / (time.process_time() - started) > 300  # 1,900 on an idle core; slack for a busy one


def test_a_full_caption_is_true_of_its_own_scene_and_of_no_other() -> None:
    codes = np.unique(sample_codes(200, 2), axis=0)
    rng = np.random.default_rng(0)
    claims = np.stack([describe(row, rng).claims for row in codes])
    np.testing.assert_array_equal(is_true(claims, codes), np.eye(len(codes), dtype=bool))


def test_a_caption_names_what_it_claims_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    codes = np.array(PLAIN.codes, np.uint8)
    for _ in range(40):
        text = caption(claims_of(codes, np.array([n in ("subject", "count") for n in FACTOR_NAMES])), rng).text
        assert "house" in text
        assert not any(colour in text.split() for colour in FACTORS["colour"])
        assert "night" not in text


def test_one_value_captions_are_true_of_exactly_the_scenes_with_that_value() -> None:
    codes = sample_codes(300, 3)
    truth = is_true(value_claims(), codes)
    for column, (name, value) in enumerate(VALUES):
        expected = codes[:, FACTOR_NAMES.index(name)] == FACTORS[name].index(value)
        np.testing.assert_array_equal(truth[:, column], expected)
    assert (value_claims() != UNNAMED).sum() == len(VALUES)


def test_the_vocabulary_makes_every_word_one_token_and_ends_with_the_end_token(tmp_path: Path) -> None:
    size = write_vocabulary(tmp_path / "bpe.txt.gz")
    tokenizer = SimpleTokenizer(str(tmp_path / "bpe.txt.gz"), context_length=CONTEXT_LENGTH)
    assert tokenizer.vocab_size == size
    assert tokenizer.eot_token_id == size - 1
    rng = np.random.default_rng(4)
    for codes in sample_codes(200, 4):
        text = describe(codes, rng).text
        tokens = tokenizer([text])[0].tolist()
        assert tokens.index(size - 1) == len(text.split()) + 1
        assert tokenizer.decode(tokens[1 : tokens.index(size - 1)]).strip() == text

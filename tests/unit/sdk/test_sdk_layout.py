"""Keeping a photo's layout: what is sent, what is refused, and what a recipe remembers of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import faceteer
import numpy as np
import pytest
from faceteer.v1 import studio_pb2
from unit.sdk.fake_server import D, FakeServer, Fault, png


def kept(server: FakeServer) -> studio_pb2.KeepLayout:
    sent = server.calls[-1][1]
    assert sent.HasField("keep_layout")
    return sent.keep_layout  # type: ignore[no-any-return]


def test_a_layout_is_kept_with_the_photos_own_bytes(either: Any, server: FakeServer) -> None:
    photo = either.open(png(9, 9))
    photo.edit().set("night", 1).render(seed=1, keep_layout="inversion")
    assert kept(server).method == studio_pb2.LAYOUT_METHOD_INVERSION
    assert kept(server).image == png(9, 9)
    assert not kept(server).HasField("strength")
    photo.edit().render(seed=1, keep_layout="image_to_image", strength=0.4)
    assert kept(server).method == studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE
    assert kept(server).strength == pytest.approx(0.4)
    photo.edit().render(seed=1)
    assert not server.calls[-1][1].HasField("keep_layout")


def test_an_edit_can_keep_the_layout_in_all_its_drawings(either: Any, server: FakeServer) -> None:
    edit = either.open(png(9)).edit().using(keep_layout="image_to_image", strength=0.3)
    edit.render(seed=1)
    assert kept(server).strength == pytest.approx(0.3)
    edit.render(seed=1, keep_layout="inversion")
    assert not kept(server).HasField("strength"), "a strength belongs to its method"
    edit.render(seed=1, keep_layout="none")
    assert not server.calls[-1][1].HasField("keep_layout")
    list(edit.events(seed=1))
    assert kept(server).strength == pytest.approx(0.3)
    edit.report()
    edit.set("night", 1).report()
    assert not server.calls[-1][1].HasField("keep_layout"), "a report draws nothing, so no picture travels"


def test_a_photo_without_a_picture_has_no_layout_and_the_error_says_what_to_do(either: Any, server: FakeServer) -> None:
    for photo in (either.open_embeds(np.ones(D, np.float32)), either.embed_prompt("night")):
        calls = len(server.calls)
        with pytest.raises(faceteer.InvalidArgumentError, match=r"open the picture itself with client\.open") as raised:
            photo.edit().render(keep_layout="inversion")
        assert raised.value.field == "keep_layout"
        assert len(server.calls) == calls


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"keep_layout": "tracing"}, "keep_layout"),
        ({"keep_layout": "image_to_image", "strength": 0}, "strength"),
        ({"keep_layout": "image_to_image", "strength": 1.5}, "strength"),
        ({"keep_layout": "image_to_image", "strength": float("nan")}, "strength"),
        ({"keep_layout": "inversion", "strength": 0.5}, "strength"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_call(
    either: Any, server: FakeServer, options: dict[str, Any], field: str
) -> None:
    photo = either.open(png(9))
    with pytest.raises(faceteer.InvalidArgumentError) as raised:
        photo.edit().render(**options)
    assert raised.value.field == field
    assert server.names() == ["OpenImage"]


def test_a_lost_noise_is_made_again_once(either: Any, server: FakeServer) -> None:
    edit = either.open(png(9)).edit().using(keep_layout="inversion", seed=1)
    server.fail("EditImage", Fault("NOT_FOUND", "NOISE_EXPIRED", "gone", after=1))
    assert edit.render().info["seed"] == 1
    assert server.names().count("EditImage") == 2
    server.fail("EditImage", *[Fault("NOT_FOUND", "NOISE_EXPIRED", "gone")] * 2)
    with pytest.raises(faceteer.NoiseExpiredError):
        edit.render()


def test_a_recipe_remembers_method_strength_and_the_pictures_digest(either: Any, tmp_path: Any) -> None:
    edit = either.open(png(9)).edit().set("night", 1)
    image = edit.render(seed=3, keep_layout="image_to_image", strength=0.4)
    recipe = edit.recipe()
    assert (recipe.settings.keep_layout, recipe.settings.strength) == ("image_to_image", 0.4)
    assert recipe.photo == hashlib.sha256(png(9)).hexdigest()
    assert faceteer.Recipe.from_json(image.info["recipe"]) == recipe
    loaded = faceteer.Recipe.load(recipe.save(tmp_path / "r.json"))
    assert (loaded, loaded.photo, loaded.hash) == (recipe, recipe.photo, recipe.hash)
    assert edit.recipe(keep_layout="none").settings.keep_layout is None
    assert "photo" not in json.loads(edit.recipe(keep_layout="none").to_json())


def test_a_recipe_replayed_keeps_the_layout_of_the_photo_at_hand(either: Any, server: FakeServer) -> None:
    edit = either.open(png(9)).edit().set("night", 1)
    edit.render(seed=3, keep_layout="inversion")
    recipe = edit.recipe()
    other = either.open(png(50, 60)).edit(recipe)
    other.render()
    assert kept(server).image == png(50, 60)
    assert other.recipe().photo != recipe.photo
    assert other.recipe() == recipe, "the edited photo is no part of a recipe"
    with pytest.raises(faceteer.InvalidArgumentError, match=f"the recipe's had SHA-256 {recipe.photo}"):
        either.embed_prompt("fog").edit(recipe).render()
    assert either.embed_prompt("fog").edit(recipe).render(keep_layout="none").info["seed"] == 3


def test_a_recipe_without_a_layout_hashes_as_it_always_did() -> None:
    recipe = faceteer.Recipe((faceteer.FeatureEdit(3, "set", 1.0),), faceteer.Revisions(sae="s"))
    assert recipe.canonical == (
        b'{"edits":[{"feature":3,"operation":"set","unit":"scaled","value":1}],"format":"faceteer-recipe/1",'
        b'"revisions":{"sae":"s"},"settings":{}}'
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"settings": {"keep_layout": "tracing"}}, "settings.keep_layout"),
        ({"settings": {"strength": 0.5}}, "settings.strength"),
        ({"settings": {"keep_layout": "image_to_image", "strength": 2}}, "settings.strength"),
        ({"photo": "boat.png"}, "photo"),
        ({"photo": 3}, "photo"),
    ],
)
def test_a_recipes_layout_is_checked_and_the_error_says_where(change: dict[str, Any], where: str) -> None:
    text = {"format": "faceteer-recipe/1", "edits": [], "revisions": {}, "settings": {}} | change
    with pytest.raises(faceteer.InvalidRecipeError) as raised:
        faceteer.Recipe.from_json(json.dumps(text))
    assert raised.value.field == where

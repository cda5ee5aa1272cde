"""Recipes: one canonical form, a hash, errors that say where, and refusal by other models."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import faceteer
import numpy as np
import pytest
from faceteer import FeatureEdit, Recipe, Revisions, Settings
from faceteer._models.picture_recipe import recipe_in, save_options
from faceteer._models.recipe import _number
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from unit.sdk.fake_server import FakeServer, png

BOAT = png(10, 20, 30, 40, 50, 250)
MODELS = Revisions("e", "s", "g")
RECIPE = Recipe(
    (FeatureEdit(412, "add", 0.5), FeatureEdit(3, "set", 1.0, label="night"), FeatureEdit(5, "ablate", label="snow")),
    MODELS,
    Settings((7,), 25, 2.5, (512, 384), "ddim"),
)

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
edits = st.lists(
    st.one_of(
        st.builds(
            FeatureEdit,
            st.integers(0, 2**32 - 1),
            st.sampled_from(["set", "add", "switch"]),
            float32s,
            st.sampled_from(["scaled", "raw"]),
            st.text(max_size=8),
        ),
        st.builds(FeatureEdit, st.integers(0, 2**32 - 1), st.just("scale"), float32s, label=st.text(max_size=8)),
        st.builds(FeatureEdit, st.integers(0, 2**32 - 1), st.just("ablate"), label=st.text(max_size=8)),
    ),
    max_size=6,
    unique_by=lambda edit: edit.feature,
)
settings = st.builds(
    Settings,
    seeds=st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple),
    steps=st.none() | st.integers(1, 1000),
    guidance_scale=st.none() | float32s,
    size=st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    scheduler=st.sampled_from([None, "ddpm", "ddim", "dpm_solver_pp", "lcm"]),
)
recipes = st.builds(lambda e, s: Recipe(tuple(e), MODELS, s), edits, settings)


def test_the_canonical_form_is_written_out_once_by_hand() -> None:
    assert RECIPE.canonical.decode() == (
        '{"edits":[{"feature":3,"operation":"set","unit":"scaled","value":1},{"feature":5,"operation":"ablate"},'
        '{"feature":412,"operation":"add","unit":"scaled","value":0.5}],"format":"faceteer-recipe/1",'
        '"revisions":{"encoder":"e","generator":"g","sae":"s"},"settings":{"guidance_scale":2.5,"height":384,'
        '"scheduler":"ddim","seeds":[7],"steps":25,"width":512}}'
    )
    assert RECIPE.hash == hashlib.sha256(RECIPE.canonical).hexdigest()


@given(recipes)
def test_a_recipe_comes_back_from_its_json_with_the_same_hash(recipe: Recipe) -> None:
    for text in (recipe.to_json(), recipe.canonical):
        again = Recipe.from_json(text)
        assert again == recipe
        assert again.hash == recipe.hash
    assert [edit.label for edit in Recipe.from_json(recipe.to_json()).edits] == [edit.label for edit in recipe.edits]


@given(recipes, st.randoms())
def test_neither_the_order_of_edits_nor_labels_change_a_recipe(recipe: Recipe, random: Any) -> None:
    shuffled = list(recipe.edits)
    random.shuffle(shuffled)
    renamed = [FeatureEdit(e.feature, e.operation, e.value, e.unit, "another name") for e in shuffled]
    other = Recipe(tuple(renamed), recipe.revisions, recipe.settings)
    assert other == recipe
    assert hash(other) == hash(recipe)


@given(float32s)
def test_a_value_survives_as_the_float32_it_is(value: float) -> None:
    edit = FeatureEdit(1, "set", value)
    again = Recipe.from_json(Recipe((edit,), MODELS).canonical).edits[0]
    assert np.float32(again.value) == np.float32(value)
    assert np.float32(edit.to_proto().value) == np.float32(value)


def test_one_float32_has_one_form_however_it_was_written() -> None:
    forms = {Recipe((FeatureEdit(1, "set", value),), MODELS).hash for value in (0.1, float(np.float32(0.1)))}
    assert len(forms) == 1


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (-1.5, "-1.5"),
        (0.1, "0.1"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (1.25e-9, "1.25e-9"),
        (123456789.0, "123456789"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (1.5e300, "1.5e+300"),
        (5e-324, "5e-324"),
        (333333333.33333329, "333333333.3333333"),
        (4.5, "4.5"),
        (2e-3, "0.002"),
        (9007199254740993.0, "9007199254740992"),
    ],
)
def test_numbers_are_written_as_rfc_8785_does(value: float, written: str) -> None:
    assert _number(value) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_number_reads_back_as_itself(value: float) -> None:
    assert float(_number(value)) == value


def test_saving_writes_a_file_for_people_that_loads_again(tmp_path: Path) -> None:
    path = RECIPE.save(tmp_path / "night.json")
    assert Recipe.load(path) == RECIPE
    assert '"label": "night"' in path.read_text()
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_what_differs_makes_another_recipe() -> None:
    for other in (
        Recipe(RECIPE.edits[:2], RECIPE.revisions, RECIPE.settings),
        Recipe(RECIPE.edits, Revisions("e", "s", "other"), RECIPE.settings),
        Recipe(RECIPE.edits, RECIPE.revisions, Settings((8,), 25, 2.5, (512, 384), "ddim")),
    ):
        assert other != RECIPE
        assert other.hash != RECIPE.hash
    assert Recipe(RECIPE.edits, Revisions("e", "s", "g", "library does not count"), RECIPE.settings) == RECIPE


def changed(**changes: Any) -> str:
    data = json.loads(RECIPE.to_json())
    data.update(changes)
    return json.dumps(data)


def edited(**changes: Any) -> str:
    data = json.loads(RECIPE.to_json())
    data["edits"][0].update(changes)
    return json.dumps({**data})


def without(name: str) -> str:
    data = json.loads(RECIPE.to_json())
    del data[name]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("", "", "line 1, column 1"),
        ("{", "", "line 1, column 2"),
        (b"\xff\xfe\x00", "", "not UTF-8|line 1"),
        ("[]", "the file", "is not an object"),
        ("null", "the file", "is not an object"),
        (without("edits"), "edits", "is missing"),
        (without("revisions"), "revisions", "is missing"),
        (changed(format="faceteer-recipe/9"), "format", "the only format"),
        (changed(surprise=1), "surprise", "is unknown; known are format, edits"),
        (changed(edits={}), "edits", "is not a list"),
        (changed(edits=[1]), "edits[0]", "is not an object"),
        (edited(feature="night"), "edits[0].feature", "is not a feature's index"),
        (edited(feature=-1), "edits[0].feature", "is not an index"),
        (edited(feature=5), "edits", "edited twice"),
        (edited(operation="melt"), "edits[0].operation", "'melt' is unknown; one of set, add"),
        (edited(value="1"), "edits[0].value", "is not a number"),
        (edited(value=1e300), "edits[0].value", "not a finite float32"),
        (edited(unit="percent"), "edits[0].unit", "one of scaled, raw"),
        (edited(label=3), "edits[0].label", "is not a string"),
        (changed(revisions={"encoder": 3}), "revisions.encoder", "is not a string"),
        (changed(revisions={"decoder": "x"}), "revisions.decoder", "is unknown"),
        (changed(settings={"steps": 0}), "settings.steps", "not a whole number from 1"),
        (changed(settings={"seeds": [-1]}), "settings.seeds", "not a whole number from 0"),
        (changed(settings={"seeds": 7}), "settings.seeds", "is not a list"),
        (changed(settings={"width": 7}), "settings", "width and height go together"),
        (changed(settings={"scheduler": "euler"}), "settings.scheduler", "is unknown"),
        ('{"format": NaN}', "", "NaN is not a JSON number"),
        ('{"format": 1, "format": 2}', "format", "is given twice"),
    ],
)
def test_a_file_that_is_no_recipe_says_where_and_why(text: str, field: str, says: str) -> None:
    with pytest.raises(faceteer.InvalidRecipeError, match=says) as raised:
        Recipe.from_json(text)
    assert raised.value.field == field
    assert str(raised.value).startswith("not a recipe")


def test_loading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(faceteer.InvalidRecipeError, match=r"broken\.json: not a recipe: format: is missing"):
        Recipe.load(path)
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "nowhere.json")


def test_labels_are_looked_up_by_the_server(either: Any, server: FakeServer) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0).ablate("SNOW").add(412, 0.5)
    recipe = edit.recipe(seed=3)
    assert [(e.feature, e.label) for e in recipe.edits] == [(3, "night"), (5, "snow"), (412, "")]
    assert recipe.revisions == Revisions("enc0", "sae0", "gen0")
    assert recipe.settings == Settings(seeds=(3,))
    assert server.calls[-1][1].skip_measuring
    with pytest.raises(faceteer.InvalidRecipeError, match=r"looks labels up"):
        Recipe(edit.edits, MODELS)


def test_a_recipe_replays_on_another_photo(either: Any, tmp_path: Path) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0).ablate("snow")
    edit.render(seed=7, steps=3)
    edit.recipe().save(tmp_path / "night.json")
    other = either.open(png(200, 0, 0, 0, 0, 100))
    replayed = other.edit(Recipe.load(tmp_path / "night.json"))
    picture = replayed.render()
    assert picture.info["seed"] == 7
    assert replayed.recipe() == edit.recipe()
    assert replayed.report().outcomes[0].achieved_scaled == pytest.approx(1.0)


def test_a_recipe_of_other_models_is_refused_without_a_call(either: Any, server: FakeServer) -> None:
    photo = either.open(BOAT)
    with pytest.raises(faceteer.RevisionMismatchError, match="made for encoder revision e, but the server runs enc0"):
        photo.edit(RECIPE)
    assert server.names() == ["OpenImage"]


def test_a_recipe_is_refused_by_a_server_whose_models_changed_since_the_photo_was_opened(
    either: Any, server: FakeServer
) -> None:
    photo = either.open(BOAT)
    edit = photo.edit(Recipe((FeatureEdit(3, "set", 1.0),), Revisions("enc0", "sae0", "gen0")))
    server.revisions["generator"] = "gen1"
    with pytest.raises(faceteer.RevisionMismatchError) as raised:
        edit.report()
    assert (raised.value.part, raised.value.actual) == ("generator", "gen1")


def test_a_written_recipe_is_indented_by_two_spaces_a_level() -> None:
    recipe = Recipe((FeatureEdit(3, "ablate"),), Revisions(sae="s"), Settings((1, 2), size=(8, 4)))
    assert recipe.to_json() == (
        '{\n  "edits": [\n    {\n      "feature": 3,\n      "operation": "ablate"\n    }\n  ],\n'
        f'  "format": "faceteer-recipe/1",\n  "hash": "{recipe.hash}",\n  "revisions": {{\n    "sae": "s"\n  }},\n'
        '  "settings": {\n    "height": 4,\n    "seeds": [1, 2],\n    "width": 8\n  }\n}\n'
    )


# -- what was changed, and what lies in a picture ----------------------------------------------------------


def test_a_file_carries_its_hash_and_an_edited_value_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = RECIPE.save(tmp_path / "r.json")
    data = json.loads(path.read_text())
    assert data["hash"] == RECIPE.hash
    assert Recipe.load(path).changed_from == ""
    data["edits"][0]["value"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(faceteer.InvalidRecipeError, match=r"r\.json: the recipe was changed after.*--accept-changed"):
        Recipe.load(path)
    accepted = Recipe.load(path, accept_changed=True)
    assert (accepted.edits[0].value, accepted.changed_from) == (2.0, RECIPE.hash)
    assert "changed since it was saved" in str(accepted)
    # Saved again it is a recipe like any other.
    assert Recipe.load(accepted.save(path)).changed_from == ""


def test_labels_and_a_missing_hash_are_no_change() -> None:
    data = json.loads(RECIPE.to_json())
    data["edits"][0]["label"] = "nuit"
    assert Recipe.from_json(json.dumps(data)) == RECIPE
    del data["hash"]
    assert Recipe.from_json(json.dumps(data)) == RECIPE


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.JPEG"])
def test_a_rendered_picture_carries_its_recipe_wherever_it_is_saved(either: Any, tmp_path: Path, name: str) -> None:
    edit = either.open(BOAT).edit().set("night", 1.0)
    picture = edit.render(seed=7, steps=1)
    picture.save(tmp_path / name)
    assert Recipe.load(tmp_path / name) == edit.recipe()
    # What is made of it is another picture.
    picture.crop((0, 0, 4, 4)).save(tmp_path / name)
    with pytest.raises(faceteer.InvalidRecipeError, match="holds no recipe"):
        Recipe.load(tmp_path / name)


@given(recipes)
def test_every_recipe_survives_in_every_kind_of_picture(recipe: Recipe) -> None:
    for format in ("PNG", "WEBP", "JPEG"):
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, format, **save_options(recipe.to_json(), format))
        found = recipe_in(file.getvalue())
        assert found is not None
        assert Recipe.from_json(found) == recipe
        assert [edit.label for edit in Recipe.from_json(found).edits] == [edit.label for edit in recipe.edits]


def test_what_is_no_picture_or_holds_another_packet_has_no_recipe() -> None:
    assert recipe_in(b"\x89PNG\r\n\x1a\n and no more") is None
    for packet in (b"<a", b"<a/>", b"\xff\xfe", b'<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>'):
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, "WEBP", xmp=packet)
        assert recipe_in(file.getvalue()) is None

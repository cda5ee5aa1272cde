"""The commands: what they print for people and for scripts, and what they write."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faceteer import Recipe
from PIL import Image
from unit.sdk.fake_server import FakeServer, png

Run = Callable[..., Any]


def test_open_prints_json_for_scripts(faceteer: Run) -> None:
    ran = faceteer("open", "boat.png", "--json")
    assert (ran.status, ran.err) == (0, "")
    answer = ran.json
    assert answer["embedding_id"].startswith("enc0-")
    assert answer["features"][0] == {
        "index": 5,
        "label": "snow",
        "activation": 0.98039216,
        "scaled": 0.49019608,
        "firing_share": 0.25,
        "label_rank": 0,
        "label_count": 0,
    }
    assert (answer["l0"], answer["explained_variance"]) == (6, 1.0)
    assert ran.out.count("\n") == 1


def test_open_prints_a_table_for_people(faceteer: Run) -> None:
    ran = faceteer("open", "boat.png", "--top", "3")
    assert ran.status == 0
    assert "boat.png\n  6 features · 100.0% of the variance explained" in ran.out
    assert "#5 snow 0.980 0.49 ███" in ran.words
    assert "… and 3 weaker ones" in ran.out
    assert "\x1b" not in ran.out, "no colours into a pipe"


def test_labels_are_never_read_as_markup(faceteer: Run) -> None:
    assert "[bold]odd & <b>label</b>" in faceteer("open", "other.png").out


def test_edit_writes_the_picture_and_prints_the_report_for_scripts(faceteer: Run, tmp_path: Path) -> None:
    words = "--set night=1.0 --ablate snow --add #412=0.5 --scale 1=2 --seed 7 --steps 3 -o out.png --json"
    ran = faceteer("edit", "boat.png", *words.split())
    assert (ran.status, ran.err) == (0, "")
    answer = ran.json
    assert (answer["output"], answer["seed"], answer["width"], answer["height"]) == ("out.png", 7, 8, 8)
    by_feature = {outcome["index"]: outcome for outcome in answer["outcomes"]}
    assert by_feature[3]["achieved_scaled"] == 1.0
    assert by_feature[5]["operation"] == "ablate"
    assert by_feature[412]["requested_scaled"] == 0.5
    assert by_feature[1]["requested"] == pytest.approx(2 * 20 / 255)
    assert answer["recipe"]["settings"]["seeds"] == [7]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.getpixel((0, 0))[0] == 7
        assert Recipe.from_json(picture.text["faceteer:recipe"]).hash == answer["recipe_hash"]


def test_edit_prints_a_table_for_people(faceteer: Run) -> None:
    ran = faceteer("edit", "boat.png", "--switch", "night=1", "-o", "out.webp", "--seed", "3")
    assert ran.status == 0
    assert "#3 night switch 0.08 1.00 1.00" in ran.words
    assert "#4 day rival of #3 0.10 0.00 0.00" in ran.words
    assert "Drift of the features that were not edited: 5.0%" in ran.out
    assert "wrote out.webp (8x8, seed 3)" in ran.out


def test_edit_without_an_output_only_reports(faceteer: Run, server: FakeServer) -> None:
    ran = faceteer("edit", "boat.png", "--set", "night=1")
    assert "nothing drawn: name a file with -o" in ran.out
    assert server.calls[-1][1].report_only


def test_edit_takes_raw_units_and_every_setting(faceteer: Run, server: FakeServer) -> None:
    words = "--set night=1.5 --unit raw --guidance 1.5 --size 16x8 --scheduler ddpm --steps 2 -o out.png"
    assert faceteer("edit", "boat.png", *words.split()).status == 0
    request = server.calls[-1][1]
    assert (request.edits[0].value, request.edits[0].unit) == (1.5, 2)
    settings = request.settings
    assert (settings.width, settings.height, settings.steps, settings.scheduler) == (16, 8, 2, 1)
    assert settings.guidance_scale == 1.5


@pytest.mark.parametrize(
    ("name", "format"), [("a.png", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")]
)
def test_the_files_ending_decides_its_format(faceteer: Run, tmp_path: Path, name: str, format: str) -> None:
    assert faceteer("edit", "boat.png", "-o", name).status == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == format
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"


def test_a_recipe_is_saved_shown_and_applied_to_another_picture(faceteer: Run, tmp_path: Path) -> None:
    words = "--set night=1 --ablate snow --seed 7 --steps 2 -o a.png --save-recipe night.json"
    assert faceteer("edit", "boat.png", *words.split()).status == 0
    recipe = Recipe.load(tmp_path / "night.json")
    assert recipe.settings.seeds == (7,)
    shown = faceteer("recipe", "show", "night.json")
    assert "set night to 1 (#3)" in shown.out
    assert recipe.hash[:16] in shown.out
    assert faceteer("recipe", "show", "night.json", "--json").json["hash"] == recipe.hash
    applied = faceteer("recipe", "apply", "night.json", "other.png", "-o", "b.png", "--json")
    assert applied.status == 0
    assert applied.json["seed"] == 7
    assert applied.json["recipe_hash"] == recipe.hash


def test_a_recipe_is_read_out_of_the_picture_that_was_drawn_with_it(faceteer: Run, tmp_path: Path) -> None:
    for name in ("a.png", "a.webp", "a.jpg"):
        assert faceteer("edit", "boat.png", "--set", "night=1", "--seed", "7", "-o", name).status == 0
        assert "set night to 1" in faceteer("recipe", "show", name).words
    assert faceteer("recipe", "apply", "a.png", "other.png", "-o", "b.png").status == 0
    ran = faceteer("recipe", "show", "boat.png")
    assert ran.status == 2
    assert "boat.png: this picture holds no recipe" in ran.err


def test_a_changed_recipe_is_refused_until_the_change_is_accepted(faceteer: Run, tmp_path: Path) -> None:
    assert faceteer("edit", "boat.png", "--set", "night=1", "--save-recipe", "n.json").status == 0
    saved = (tmp_path / "n.json").read_text()
    (tmp_path / "n.json").write_text(saved.replace('"value": 1', '"value": 0.5'))
    for words in (["show", "n.json"], ["apply", "n.json", "other.png"]):
        ran = faceteer("recipe", *words)
        assert ran.status == 2
        assert ran.err.startswith("faceteer: n.json: the recipe was changed after it was saved")
        accepted = faceteer("recipe", *words, "--accept-changed")
        assert accepted.status == 0
        assert "changed after it was saved: it was recipe" in " ".join((accepted.out + accepted.err).split())


def test_a_recipe_can_be_saved_without_drawing(faceteer: Run, tmp_path: Path) -> None:
    assert faceteer("edit", "boat.png", "--set", "night=1", "--seed", "9", "--save-recipe", "n.json").status == 0
    assert Recipe.load(tmp_path / "n.json").settings.seeds == (9,)


def test_diff_names_what_leads_from_one_to_the_other(faceteer: Run) -> None:
    ran = faceteer("diff", "boat.png", "other.png", "--coverage", "1")
    assert "boat.png → other.png" in ran.out
    assert "#5 snow 0.980 0.000 -0.980" in ran.words
    answer = faceteer("diff", "boat.png", "other.png", "--json").json
    assert answer["features"][0]["label"] == "snow"
    assert answer["coverage"] >= 0.9


def test_measure_shows_what_the_drawn_picture_shows(faceteer: Run) -> None:
    ran = faceteer("edit", "boat.png", "--set", "night=1", "--measure", "-o", "m.png")
    assert "requested achieved picture" in ran.words
    assert "1.00 1.00 0.50" in ran.words
    ran = faceteer("edit", "boat.png", "--set", "night=1", "--measure")
    assert ran.status == 2
    assert "name its file with -o" in ran.err


def test_transfer_says_what_it_carries_and_takes_some_parts(faceteer: Run) -> None:
    parts = faceteer("transfer", "boat.png", "other.png", "--json").json["parts"]
    index = str(parts[0]["index"])
    some = faceteer("transfer", "boat.png", "other.png", "--only", index, "--json").json
    assert [part["index"] for part in some["parts"] if part["taken"]] == [int(index)]
    shown = faceteer("transfer", "boat.png", "other.png", "--without", index)
    assert "leaves out" in shown.words


def test_transfer_draws_the_one_with_features_of_the_other(faceteer: Run, tmp_path: Path) -> None:
    ran = faceteer("transfer", "boat.png", "other.png", "-o", "mixed.png", "--seed", "4", "--json")
    assert ran.json["seed"] == 4
    assert ran.json["coverage"] >= 0.9
    assert (tmp_path / "mixed.png").exists()
    against = faceteer("transfer", "boat.png", "other.png", "--reference", "other.png", "--json")
    assert against.json["outcomes"] == []


def test_features_are_searched_and_shown(faceteer: Run, tmp_path: Path) -> None:
    found = faceteer("features", "search", "sn")
    assert "#5 snow 25.00% 2 0.90" in found.words
    assert faceteer("features", "search", "n", "--limit", "1", "--json").json["features"][0]["label"] == "night"
    assert "Nothing is close." in faceteer("features", "search", "zebra").out
    shown = faceteer("features", "show", "night", "--icon", "icon.png")
    assert "feature #3 · labelled automatically" in shown.out
    assert "hardly ever with day #4" in shown.out
    assert (tmp_path / "icon.png").exists()
    answer = faceteer("features", "show", "#3", "--json").json
    assert (answer["index"], answer["statistics"]["p99"], answer["examples"][0]["picture"]) == (3, 2.0, "a")


def test_status_shows_what_runs(faceteer: Run, server: FakeServer) -> None:
    ran = faceteer("status")
    assert f"{server.address}\n  bundle fake" in ran.out
    assert "encoder ● serving enc0" in ran.words
    answer = faceteer("status", "--json").json
    assert answer["health"]["studio"] == "serving"
    assert answer["generator"]["defaults"]["steps"] == 4


def test_status_names_the_part_that_is_down_and_what_still_works(faceteer: Run, server: FakeServer) -> None:
    server.down["generator"] = "generator: cannot be reached"
    ran = faceteer("status")
    assert ran.status == 0
    assert "generator ● down" in ran.words
    assert "⚠ generator: cannot be reached does not work: drawing still works: opening pictures" in ran.words
    assert faceteer("status", "--json").json["down"] == {"generator": "generator: cannot be reached"}


def test_the_address_may_stand_before_or_after_the_command(
    faceteer: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACETEER_ADDRESS", "127.0.0.1:1")
    assert faceteer("--address", server.address, "open", "boat.png").status == 0
    assert faceteer("open", "boat.png", "--address", server.address).status == 0
    assert faceteer("--address", "127.0.0.1:2", "open", "boat.png", "--address", server.address).status == 0


def test_help_and_version_need_no_server(faceteer: Run, server: FakeServer) -> None:
    assert "Edit images by their features" in faceteer("--help").out
    assert "--set" in faceteer("edit", "--help").out
    assert faceteer("--version").out.strip() == "0.1.0"
    assert server.calls == []
    for words in ([], ["features"]):
        bare = faceteer(*words)
        assert (bare.status, bare.err) == (2, "")
        assert "Usage: faceteer" in bare.out


def test_a_picture_in_place_is_replaced_only_by_a_whole_one(faceteer: Run, server: FakeServer, tmp_path: Path) -> None:
    from unit.sdk.fake_server import Fault

    (tmp_path / "out.png").write_bytes(png(1))
    server.fail("EditImage", Fault("INTERNAL", after=4))
    assert faceteer("edit", "boat.png", "-o", "out.png").status == 5
    assert (tmp_path / "out.png").read_bytes() == png(1)


def test_features_are_found_by_a_picture_and_by_likeness(faceteer: Run, server: FakeServer) -> None:
    by_picture = faceteer("features", "search", "--picture", "boat.png", "--json").json
    assert [feature["index"] for feature in by_picture["features"]] == [0, 1, 2, 3, 4, 5]
    like = faceteer("features", "search", "--like", "night")
    assert like.out.startswith("like night\n  2 features")
    assert "#5 snow" in like.words
    assert faceteer("features", "search", "--like", "#3", "--json").json["total"] == 2


def test_features_are_listed_with_every_filter(faceteer: Run, server: FakeServer) -> None:
    words = (
        "--order disagreement --limit 2 --alive --labelled --source model --source person --min-share 0.1 "
        "--max-share 0.5 --min-detection 0.5 --max-detection 0.75 --min-causal 0.25 --max-causal 1 --disagree "
        "--include-class violence --include-class all"
    )
    ran = faceteer("features", "list", *words.split())
    assert (ran.status, ran.err) == (0, "")
    assert "#3 night 25.00% 2 0.90 –" in ran.words
    request = server.calls[-1][1]
    sent = request.filter
    assert (request.order, sent.alive, sent.labelled, sent.scores_disagree) == (6, True, True, True)
    assert list(sent.label_sources) == [2, 3]
    assert list(sent.include_safety_classes) == ["violence", "*"]
    assert [sent.min_detection_score, sent.max_detection_score] == [0.5, 0.75]
    assert [sent.min_causal_score, sent.max_causal_score, sent.max_firing_share] == [0.25, 1.0, 0.5]
    assert faceteer("features", "search", "n", "--dead", "--unlabelled", "--agree", "--json").status == 0
    sent = server.calls[-1][1].filter
    assert (sent.HasField("alive"), sent.alive, sent.labelled, sent.scores_disagree) == (True, False, False, False)


def test_a_search_says_how_many_there_are_in_all(faceteer: Run) -> None:
    assert "n\n  1 of 2 features\n" in faceteer("features", "search", "n", "--limit", "1").out


def test_pages_with_pictures_are_saved(faceteer: Run, tmp_path: Path) -> None:
    commands = {
        "search": "features search n",
        "list": "features list --labelled --limit 3",
        "show": "features show night",
        "open": "open boat.png",
        "edit": "edit boat.png --switch night=1 -o out.png",
        "diff": "diff boat.png other.png",
        "prompt": "prompt snow at night",
    }
    for name, words in commands.items():
        ran = faceteer(*words.split(), "--save-html", f"{name}.html")
        assert (ran.status, ran.err) == (0, ""), name
        assert f"wrote {name}.html" in ran.out
        page = (tmp_path / f"{name}.html").read_text()
        assert page.startswith("<!doctype html>")
        assert ("data:image/" in page) == (name not in ("diff", "prompt")), name
    assert faceteer("features", "show", "night", "--html", "again.html", "--json").json["index"] == 3
    assert (tmp_path / "again.html").read_text() == (tmp_path / "show.html").read_text()


def test_examples_of_the_quantiles_are_named(faceteer: Run) -> None:
    shown = faceteer("features", "show", "night", "--quantiles")
    assert "from 50% to 100% q0 (2.00)" in shown.words
    assert "also dusk, evening" in shown.words
    assert "detection 0.90, balanced accuracy 0.80" in shown.words
    answer = faceteer("features", "show", "night", "--quantiles", "--json").json
    assert answer["examples"][0]["quantile_from"] == 0.5
    assert answer["terms"] == ["dusk", "evening"]


def test_an_icon_is_written_in_the_format_of_its_ending(faceteer: Run, tmp_path: Path) -> None:
    ran = faceteer("features", "icon", "night", "-o", "icon.webp")
    assert "wrote icon.webp (64x16, strengths 0.5, 1, 2)" in ran.out
    with Image.open(tmp_path / "icon.webp") as icon:
        assert (icon.format, icon.size) == ("WEBP", (64, 16))
    answer = faceteer("features", "icon", "3", "-o", "icon.png", "--json").json
    assert answer == {"index": 3, "output": "icon.png", "strengths": [0.5, 1.0, 2.0]}


def test_a_person_labels_a_feature_and_takes_it_back(faceteer: Run, server: FakeServer) -> None:
    assert "#412 is lighthouse, labelled by a person" in faceteer("features", "label", "412", "lighthouse").words
    assert faceteer("features", "label", "412", "tower", "--author", "me", "--json").json["label"] == "tower"
    assert server.calls[-1][1].author == "me"
    assert faceteer("features", "label", "412", "--clear").status == 0
    assert server.calls[-1][1].label == ""


def test_the_library_says_what_it_covers(faceteer: Run) -> None:
    ran = faceteer("library")
    assert "fake 40 pictures of made up" in ran.words
    assert "512, of which 16 fire and 6 are labelled" in ran.words
    assert faceteer("library", "--json").json["searches_meaning"] is True


def test_a_prompt_is_imagined_edited_and_drawn(faceteer: Run, server: FakeServer, tmp_path: Path) -> None:
    shown = faceteer("prompt", "snow at night", "--prior-seed", "1", "--negative", "day")
    assert shown.out.startswith("snow at night\n  2 features")
    sent = server.calls[0][1]
    assert (sent.prompt, sent.seed, sent.negative_prompt) == ("snow at night", 1, "day")
    assert faceteer("prompt", "snow", "--json").json["features"][0]["label"] == "snow"
    words = "prompt snow at night --ablate snow --seed 7 -o p.png --save-recipe p.json --json"
    drawn = faceteer(*words.split())
    assert (drawn.status, drawn.json["seed"], drawn.json["outcomes"][0]["label"]) == (0, 7, "snow")
    assert (tmp_path / "p.png").exists()
    assert Recipe.load(tmp_path / "p.json").settings.seeds == (7,)


def test_an_edit_keeps_the_pictures_layout(faceteer: Run, server: FakeServer, tmp_path: Path) -> None:
    words = "edit boat.png --set night=1 -o out.png --save-recipe r.json --keep-layout"
    assert faceteer(*words.split(), "inversion").status == 0
    assert server.calls[-1][1].keep_layout.image == (tmp_path / "boat.png").read_bytes()
    assert faceteer(*words.split(), "image_to_image", "--strength", "0.5", "--json").status == 0
    recipe = Recipe.load(tmp_path / "r.json")
    assert (recipe.settings.keep_layout, recipe.settings.strength) == ("image_to_image", 0.5)
    assert faceteer("recipe", "apply", "r.json", "other.png", "-o", "b.png").status == 0
    assert server.calls[-1][1].keep_layout.image == (tmp_path / "other.png").read_bytes()
    assert faceteer("recipe", "apply", "r.json", "other.png", "-o", "b.png", "--keep-layout", "none").status == 0
    assert not server.calls[-1][1].HasField("keep_layout")
    assert "keep layout image_to_image, strength 0.5" in faceteer("recipe", "show", "r.json").words


@pytest.mark.parametrize("columns", [36, 40, 60, 100])
def test_labels_are_whole_in_a_narrow_terminal_and_bars_go_first(
    faceteer: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (
        ("open", "boat.png"),
        ("edit", "boat.png", "--set", "night"),
        ("diff", "boat.png", "other.png", "--coverage", "1"),
        ("features", "list"),
    ):
        out = faceteer(*words).out
        assert re.search(r"\b(night|snow)\b", out), words
        assert "…" not in out.replace("… and", ""), words
        assert max(map(len, out.splitlines())) <= columns
    assert ("█" in faceteer("open", "boat.png").out) == (columns >= 60)


def test_a_feature_named_without_a_value_is_set_to_1(faceteer: Run) -> None:
    assert (
        faceteer("edit", "boat.png", "--switch", "fog", "--json").json["recipe"]
        == (faceteer("edit", "boat.png", "--switch", "fog=1", "--json").json["recipe"])
    )
    assert "1.00" in faceteer("edit", "boat.png", "--set", "night").words
    refused = faceteer("edit", "boat.png", "--add", "fog")
    assert refused.status == 2
    assert "--add 'fog' names no value" in refused.err


def test_a_picture_is_read_from_stdin(faceteer: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Piped(io.StringIO):
        buffer = io.BytesIO((tmp_path / "boat.png").read_bytes())

    monkeypatch.setattr("sys.stdin", Piped())
    named = faceteer("open", "boat.png", "--json").json
    assert faceteer("open", "-", "--json").json["features"] == named["features"]
    empty = faceteer("open", "-")
    assert empty.status == 2
    assert "stdin holds no picture" in empty.err
    monkeypatch.setattr(Piped, "isatty", lambda self: True)
    assert "nothing is piped in" in faceteer("open", "-").err


def test_a_shell_completes_commands_and_labels_of_the_running_server(
    faceteer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offered(line: str) -> list[str]:
        monkeypatch.setenv("_FACETEER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        try:
            return faceteer().out.split("\n")[:-1]
        finally:
            monkeypatch.delenv("_FACETEER_COMPLETE")

    assert offered("faceteer fea") == ["features"]
    assert offered("faceteer edit boat.png --swi") == ["--switch"]
    assert offered("faceteer edit boat.png --switch ni") == ["night"]
    assert offered("faceteer features show sn") == ["snow"]
    assert "day" in offered("faceteer edit boat.png --set ")
    monkeypatch.setenv("FACETEER_ADDRESS", "127.0.0.1:1")
    assert offered("faceteer edit boat.png --switch ni") in ([], [""])
    # Which shell it is is looked up among parent processes; a test may have none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_FACETEER_COMPLETE=complete_bash" in faceteer("--show-completion", "bash").out

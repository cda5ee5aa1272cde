"""Failures of the command line: the right status, one sentence on stderr, nothing on stdout, no work done in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.sdk.fake_server import FakeServer, Fault

Run = Callable[..., Any]

BAD_INPUT = [
    (["open"], "missing argument"),
    (["open", "nowhere.png"], "nowhere.png: no such file or directory"),
    (["open", "notes.txt"], "not a picture"),
    (["open", "boat.png", "--top", "0"], "--top"),
    (["open", "boat.png", "--timeout", "-1"], "timeout"),
    (["paint", "boat.png"], "no such command 'paint'"),
    (["edit", "boat.png", "--louder"], "no such option"),
    (["edit", "boat.png", "--add", "night"], "--add 'night' names no value; write --add 'night=1.0'"),
    (["edit", "boat.png", "--set", "=1"], "names no value"),
    (["edit", "boat.png", "--set", "night=loud"], "'loud' is not a number"),
    (["edit", "boat.png", "--set", "night=nan"], "nan is not a finite float32"),
    (["edit", "boat.png", "--set", "night=1", "--unit", "percent"], "one of scaled, raw"),
    (["edit", "boat.png", "--set", "night=1", "--ablate", "3"], "feature 3 twice"),
    (["edit", "boat.png", "-o", "out.gif"], "out.gif has the ending '.gif'; end it with .png, .webp or .jpg"),
    (["edit", "boat.png", "-o", "out"], "out has no ending"),
    (["edit", "boat.png", "-o", "no/such/out.png"], "no/such is not a directory"),
    (["edit", "boat.png", "-o", "folder.png"], "folder.png is a directory"),
    (["edit", "boat.png", "--save-recipe", "no/such/r.json"], "no/such is not a directory"),
    (["edit", "boat.png", "--size", "big"], "--size 'big' is neither"),
    (["edit", "boat.png", "--seed", "-1"], "not a whole number from 0"),
    (["edit", "boat.png", "--steps", "0"], "not a whole number from 1"),
    (["edit", "boat.png", "--scheduler", "euler"], "one of ddpm, ddim"),
    (["diff", "boat.png", "boat.png", "--coverage", "2"], "coverage"),
    (["recipe", "apply", "notes.txt", "boat.png"], "notes.txt: not a recipe: line 1, column 1"),
    (["edit", "boat.png", "--keep-layout", "tracing", "-o", "o.png"], "one of image_to_image, inversion, none"),
    (["edit", "boat.png", "--strength", "0.5", "-o", "o.png"], "only for keep_layout='image_to_image'"),
    (["edit", "boat.png", "--keep-layout", "inversion", "--strength", "0.5", "-o", "o.png"], "strength"),
    (["edit", "boat.png", "--save-html", "page.pdf"], "page.pdf does not name a page; end it with .html"),
    (["prompt", " "], "prompt: is empty"),
    (["prompt", "night", "--prior-seed", "-1"], "not a whole number"),
    (["prompt", "night", "-o", "out.gif"], "end it with .png"),
    (["features", "search"], "search for one thing: WORDS, --picture FILE or --like FEATURE"),
    (["features", "search", "n", "--like", "night"], "search for one thing"),
    (["features", "search", "--picture", "nowhere.png"], "nowhere.png: no such file"),
    (["features", "search", "n", "--source", "hearsay"], "automatic, model or person"),
    (["features", "search", "n", "--min-causal", "nan"], "min_causal_score"),
    (["features", "search", "n", "--save-html", "no/such/page.html"], "no/such is not a directory"),
    (["features", "list", "--order", "beauty"], "one of index, firing_share"),
    (["features", "icon", "night"], "missing option '-o'"),
    (["features", "icon", "night", "-o", "icon.gif"], "end it with .png"),
    (["features", "label", "night"], "give a LABEL, or --clear"),
    (["features", "label", "night", "dark", "--clear"], "give a LABEL, or --clear"),
    (["status", "--address", "nonsense"], "'nonsense' is not an address; pass host:port"),
]


@pytest.fixture(autouse=True)
def _files(faceteer: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture and no recipe")
    (tmp_path / "folder.png").mkdir()


@pytest.mark.parametrize(
    ("words", "says"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_status_2_and_one_sentence(faceteer: Run, words: list[str], says: str) -> None:
    ran = faceteer(*words)
    assert ran.status == 2
    assert ran.err.startswith("faceteer: ")
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""


@pytest.mark.parametrize("words", [words for words, _ in BAD_INPUT if "-o" in words or "--size" in words])
def test_nothing_is_asked_of_the_server_before_the_words_are_known_to_be_good(
    faceteer: Run, server: FakeServer, words: list[str]
) -> None:
    faceteer(*words)
    assert server.calls == []


def test_an_unknown_feature_is_status_3_with_the_nearest(faceteer: Run) -> None:
    for words in (["edit", "boat.png", "--set", "nigth=1"], ["features", "show", "nigth"]):
        ran = faceteer(*words)
        assert ran.status == 3
        assert ran.err == "faceteer: no feature is labelled 'nigth'; nearest: night, snow\n"
    assert faceteer("features", "show", "9999").status == 3


def test_an_icon_that_was_not_made_is_status_3(faceteer: Run, tmp_path: Path) -> None:
    assert faceteer("features", "icon", "snow", "-o", "i.webp").status == 3
    assert not (tmp_path / "i.webp").exists()
    assert faceteer("features", "show", "snow", "--icon", "i.png").status == 3


def test_an_unreachable_server_is_status_4_with_how_to_start_one(faceteer: Run) -> None:
    ran = faceteer("status", "--address", "127.0.0.1:1", "--timeout", "0.5")
    assert ran.status == 4
    assert ran.err.startswith("faceteer: no Faceteer server answers at 127.0.0.1:1; start one with `make up`")
    assert ran.err.count("\n") == 1


def test_a_starting_server_is_status_4(faceteer: Run, server: FakeServer) -> None:
    server.fail("GetStudio", *[Fault("UNAVAILABLE", "STARTING", "the server is starting")] * 9)
    ran = faceteer("status")
    assert (ran.status, ran.err) == (4, "faceteer: the server is starting\n")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("INTERNAL", "INTERNAL", "internal error"), "internal error (request request-1 in the server's log)"),
        (Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full"), "the queue is full"),
        (Fault("FAILED_PRECONDITION", "NOT_IN_BUNDLE", "no statistics"), "no statistics"),
    ],
)
def test_other_failures_are_status_5(faceteer: Run, server: FakeServer, fault: Fault, says: str) -> None:
    server.fail("EditImage", fault)
    ran = faceteer("edit", "boat.png", "--json")
    assert (ran.status, ran.out, ran.err) == (5, "", f"faceteer: {says}\n")


def test_a_deadline_is_status_5(faceteer: Run, server: FakeServer) -> None:
    server.answer_seconds = 2
    ran = faceteer("open", "boat.png", "--timeout", "0.2")
    assert ran.status == 5
    assert "deadline of 0.2 s" in ran.err


def test_a_recipe_of_other_models_is_refused(faceteer: Run, server: FakeServer) -> None:
    assert faceteer("edit", "boat.png", "--set", "night=1", "--save-recipe", "night.json").status == 0
    server.revisions["sae"] = "sae1"
    ran = faceteer("recipe", "apply", "night.json", "boat.png", "-o", "out.png")
    assert ran.status == 5
    assert "made for sae revision sae0, but the server runs sae1" in ran.err
    assert not os.path.exists("out.png")


def _process(server: FakeServer, tmp_path: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "faceteer.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "FACETEER_ADDRESS": server.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_control_c_stops_the_drawing_and_is_status_130(server: FakeServer, tmp_path: Path) -> None:
    server.step_seconds = 0.05
    process = _process(server, tmp_path, "edit", "boat.png", "-o", "out.png", "--steps", "1000")
    deadline = time.monotonic() + 20
    while server.steps_done < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "faceteer: interrupted\n")
    assert server.cancelled.wait(3)
    assert not (tmp_path / "out.png").exists()


def test_a_reader_that_leaves_early_is_no_failure(server: FakeServer, tmp_path: Path) -> None:
    process = _process(server, tmp_path, "open", "boat.png", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(10) == 0


def test_a_terminal_that_lacks_letters_shows_question_marks(server: FakeServer, tmp_path: Path) -> None:
    environment = {**os.environ, "FACETEER_ADDRESS": server.address, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(
        [sys.executable, "-m", "faceteer.cli", "open", "boat.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "snow" in ran.stdout


def test_without_the_extra_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from faceteer.cli import main; main(['status'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 5
    assert ran.stderr == "faceteer: the command line needs two more packages: pip install 'faceteer[cli]'\n"

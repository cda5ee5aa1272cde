"""Labels and icons on a bundle whose pictures and words agree, by the commands that anyone uses."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faceteer_library.editor import LibraryEditor
from faceteer_library.person_labels import PersonLabels
from faceteer_library.store import Filter, Store
from faceteer_postcards.corpus import draw_corpus
from faceteer_runtime.bundle import Bundle, verify
from faceteer_runtime.icons import icon_pictures
from faceteer_trainer.__main__ import main
from faceteer_trainer.errors import JobError
from faceteer_trainer.labels.safety import read_classes, safety_class
from faceteer_trainer.labels.vision_model import VisionModel
from faceteer_trainer.labels.vocabulary import caption_terms, read_terms
from PIL import Image

POSTCARDS = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"


# -- words, classes --------------------------------------------------------------------------------


def test_vocabularies_come_along_and_may_be_brought(tmp_path: Path) -> None:
    assert len(read_terms("general")) > 1000
    assert "night" in read_terms("postcards")
    both = read_terms("general, composed")
    assert len(both) == len(set(both)) > 1900
    assert {"snow", "red dress"} <= set(both)
    (tmp_path / "mine.txt").write_text("# mine\nsnow\n\nsnow\n  two cats # more than one\n")
    assert read_terms(str(tmp_path / "mine.txt")) == ("snow", "two cats")
    for fault, words in (("", "holds no terms"), ("x" * 121, "longer than the 120 characters")):
        (tmp_path / "bad.txt").write_text(fault)
        with pytest.raises(JobError, match=words):
            read_terms(str(tmp_path / "bad.txt"))
    with pytest.raises(JobError, match="not a text file that can be read"):
        read_terms(str(tmp_path / "none.txt"))


def test_captions_make_a_vocabulary_of_their_own() -> None:
    captions = ["a red car at night", "the Red car, parked", "three red cars", "red car's picture at night", "x 12"]
    # "at night" begins with no word that names, "red cars" and "car's" are too rare, "picture" says nothing.
    found = caption_terms(captions * 3)
    assert found[0] == "red"
    assert {"red car", "night", "cars", "parked"} <= set(found)
    assert not {"picture", "at", "at night", "the", "x", "12"} & set(found)
    # A pair of words that only happen to stand side by side is none.
    assert "far tree" not in caption_terms(["far tree"] * 3 + ["far house"] * 30 + ["tall tree"] * 30)
    with pytest.raises(JobError, match="no captions that share words"):
        caption_terms([""] * 5)


def test_safety_classes_look_for_whole_words(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"violence": ["gun", "blood"], "alcohol": ["wine glass"]}))
    classes = read_classes(path)
    assert safety_class("a Gun", [], classes) == "violence"
    assert safety_class("gunpowder", ["wine"], classes) == ""
    assert safety_class("table", ["red wine glass"], classes) == "alcohol"
    path.write_text('{"violence": "gun"}')
    with pytest.raises(JobError, match="must be JSON like"):
        read_classes(path)


# -- a vision-language model, through a real small server --------------------------------------------


class FakeEndpoint:
    """A chat-completions server that answers what it is told to."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
                code, text = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                data = (
                    json.dumps({"choices": [{"message": {"content": text}}]}).encode() if code == 200 else text.encode()
                )
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def test_a_model_sees_the_pictures_and_its_answer_is_asked_for_once(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.answers = [(200, 'Sure: ```json\n{"label": " two  cats ", "terms": ["pair", 7, ""]}\n```')]
    answers = tmp_path / "answers.jsonl"
    model = VisionModel(endpoint.url, "looker", answers, "secret", wait=())
    named = model.name([b"A", b"B"], [b"C"])
    assert named is not None
    assert (named.label, named.terms) == ("two cats", ("pair",))
    (asked,) = endpoint.requests
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer secret", "looker")
    content = asked["messages"][0]["content"]
    assert "first 2 pictures" in content[0]["text"]
    urls = [part["image_url"]["url"] for part in content[1:]]
    assert [base64.b64decode(url.removeprefix("data:image/webp;base64,")) for url in urls] == [b"A", b"B", b"C"]
    with answers.open("a") as file:
        file.write('{"key": "cut sho')
    assert VisionModel(endpoint.url, "looker", answers, wait=()).name([b"A", b"B"], [b"C"]) == named
    assert len(endpoint.requests) == 1


def test_an_endpoint_in_trouble_is_asked_again_and_one_that_refuses_is_not(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    endpoint.answers = [(429, "slow down"), (503, "busy"), (200, '{"label": "snow"}')]
    model = VisionModel(endpoint.url, "m", tmp_path / "a", wait=(0.0, 0.0))
    named = model.name([b"A"], [])
    assert named is not None
    assert named.label == "snow"
    endpoint.answers = [(401, "who are you")]
    with pytest.raises(JobError, match="refuses the call \\(401: who are you\\)"):
        model.name([b"B"], [])
    endpoint.answers = [(500, "broken")]
    with pytest.raises(JobError, match="no answer after 3 tries \\(500: broken\\); run again to go on"):
        model.name([b"C"], [])
    with pytest.raises(JobError, match="must begin with http"):
        VisionModel("file:///etc", "m", tmp_path / "a")


@pytest.mark.parametrize("answer", ["no idea", '{"label": ""}', '{"label": 3}', "[1]", '{"label": "x\\u0000y"}', "{"])
def test_an_answer_without_sense_is_no_label(endpoint: FakeEndpoint, tmp_path: Path, answer: str) -> None:
    endpoint.answers = [(200, answer)]
    assert VisionModel(endpoint.url, "m", tmp_path / "a", wait=()).name([b"A"], []) is None


# -- the whole, on postcards -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Postcards drawn as files, embedded, and a library built over them and labelled."""
    home = tmp_path_factory.mktemp("labels")
    pictures = home / "pictures"
    pictures.mkdir()
    corpus = draw_corpus(home / "drawn", 1500, 77)
    for number, pixels in enumerate(corpus.pictures):
        Image.fromarray(pixels).save(pictures / f"{number:05}.png", compress_level=1)
    bundle = home / "postcards"
    shutil.copytree(POSTCARDS, bundle)
    main(["embed", "--images", str(pictures), "--bundle", str(bundle), "--out", str(home / "corpus")])
    main(["build-library", "--corpus", str(home / "corpus"), "--bundle", str(bundle)])
    classes = home / "classes.json"
    classes.write_text('{"darkness": ["night"]}')
    main(["label-library", "--corpus", str(home / "corpus"), "--bundle", str(bundle), "--vocabulary", "postcards",
          "--safety-classes", str(classes)])  # fmt: skip
    return bundle, home / "corpus"


def test_features_are_named_for_what_they_are(labelled: tuple[Path, Path]) -> None:
    verify(labelled[0])
    with LibraryEditor(labelled[0] / "library" / "library.sqlite") as editor:
        features = {
            feature.label: feature for feature in editor.features() if feature.label and feature.firing_share > 0.1
        }
        said = {word for feature in features.values() for word in (feature.label, *feature.terms)}
        # What the world is made of (the words of faceteer_postcards.world), found from pictures alone.
        world = {"dawn", "noon", "dusk", "night", "grass", "sand", "snow", "sea", "rain", "snowfall", "fog", "house",
                 "tree", "boat", "cat", "car", "balloon", "flower", "ball", "red", "orange", "yellow", "green", "blue",
                 "purple", "pink", "white", "one", "two", "three", "striped", "outlined"}  # fmt: skip
        assert len(world & said) >= 28
        scores = [feature.detection_score for feature in features.values() if feature.detection_score is not None]
        assert np.median(scores) > 0.95
        accuracies = [
            f.detection_balanced_accuracy for f in features.values() if f.detection_balanced_accuracy is not None
        ]
        assert np.median(accuracies) > 0.9
        night = next(f for f in features.values() if "night" in (f.label, *f.terms))
        assert night.safety_class == "darkness"
        assert all(not feature.safety_class for feature in features.values() if feature != night)
        meanings = editor._connection.execute("SELECT label, embeds FROM meanings").fetchall()
        assert set(features) <= {label for label, _ in meanings}
        assert all(abs(np.linalg.norm(np.frombuffer(e, "<f2").astype(float)) - 1) < 1e-2 for _, e in meanings)


def test_a_persons_label_outlives_a_relabelling(labelled: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "postcards"
    shutil.copytree(labelled[0], bundle)
    PersonLabels(bundle / "labels.sqlite").set(24, "the small hours", "ann")
    main(["label-library", "--corpus", str(labelled[1]), "--bundle", str(bundle), "--vocabulary", "postcards"])
    store = Store(bundle / "library" / "library.sqlite", bundle / "labels.sqlite")
    assert (store.get(24).label, store.get(24).source) == ("the small hours", "person")
    assert [hit.row.index for hit in store.search("small hours", Filter(), 0, 5)[0]] == [24]


def test_icons_show_what_features_cause_and_are_drawn_once(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "postcards"
    shutil.copytree(labelled[0], bundle)
    command = ["draw-icons", "--bundle", str(bundle), "--features", "19,21,22,23,24,25,29", "--steps", "6"]
    main(command)
    assert "7 icons drawn" in capsys.readouterr().out
    verify(bundle)
    with LibraryEditor(bundle / "library" / "library.sqlite") as editor:
        moved, scores, templates = [], [], []
        for feature in [feature for feature in editor.features() if feature.index in (19, 21, 22, 23, 24, 25, 29)]:
            icon = editor.icon_of(feature.index)
            assert icon is not None
            webp, strengths = icon
            assert strengths == [0.5, 1.0, 1.5]
            pictures = [np.asarray(picture, float) for picture in icon_pictures(webp, 4)]
            assert pictures[0].shape == (64, 64, 3)
            moved.append(np.abs(pictures[3] - pictures[0]).mean())
            if all(np.abs(pictures[0] - template).mean() > 4 for template in templates):
                templates.append(pictures[0])
            assert feature.causal_score is not None
            scores.append(feature.causal_score)
    # Features that are on in the first template are shown on the other, so that every one has something to show: turned
    # up, it changes the picture, and into what its label says.
    assert len(templates) == 2
    assert min(moved) > 3
    assert np.median(scores) > 0.9
    assert min(scores) > 0.6
    main(command)
    assert re.search(r"0 icons drawn in \d+ s, 7 were there already", capsys.readouterr().out)
    for wrong, words in (("x", "must be alive, labelled, or numbers"), ("9999", "9999 is no feature that ever fires")):
        with pytest.raises(SystemExit):
            main(["draw-icons", "--bundle", str(bundle), "--features", wrong])
        assert words in capsys.readouterr().err


def test_pictures_that_the_encoder_does_not_know_are_refused_or_their_library_is_marked(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, own = tmp_path / "postcards", labelled[1]
    shutil.copytree(labelled[0], bundle)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(8)
    for number in range(300):
        # Blurred noise: what crops of photographs look like to an encoder of drawings.
        small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{number:03}.png")
    foreign = tmp_path / "corpus"
    main(["embed", "--images", str(tmp_path / "pictures"), "--bundle", str(bundle), "--out", str(foreign)])
    statistics = (bundle / "sae" / "feature_statistics.safetensors").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["build-library", "--corpus", str(foreign), "--bundle", str(bundle)])
    assert re.search(r"\d+% of these pictures are unlike those .* --accept-foreign", capsys.readouterr().err)
    main(["build-library", "--corpus", str(foreign), "--bundle", str(bundle), "--accept-foreign"])
    assert "The library is marked" in capsys.readouterr().out
    assert (bundle / "sae" / "feature_statistics.safetensors").read_bytes() == statistics
    main(["label-library", "--corpus", str(foreign), "--bundle", str(bundle), "--vocabulary", "postcards"])
    assert "agrees with itself, no more" in capsys.readouterr().out
    main(["report-library", "--bundle", str(bundle), "--out", str(tmp_path / "report.md")])
    assert "neither says what they show" in capsys.readouterr().out
    main(["build-library", "--corpus", str(own), "--bundle", str(bundle)])
    assert "marked" not in capsys.readouterr().out


def test_a_vision_language_model_names_features_when_it_is_asked_to(
    labelled: tuple[Path, Path], tmp_path: Path, endpoint: FakeEndpoint
) -> None:
    bundle = tmp_path / "postcards"
    shutil.copytree(labelled[0], bundle)
    endpoint.answers = [(200, '{"label": "something nice", "terms": ["nice"]}')]
    main(["label-library", "--corpus", str(labelled[1]), "--bundle", str(bundle), "--vocabulary", "postcards",
          "--endpoint", endpoint.url, "--model", "m", "--only", "missing"])  # fmt: skip
    assert endpoint.requests
    with LibraryEditor(bundle / "library" / "library.sqlite") as editor:
        sources = {feature.label_source for feature in editor.features() if feature.label == "something nice"}
        assert sources == {"model"}
        assert any(feature.label == "rain" and feature.label_source == "automatic" for feature in editor.features())


def test_the_report_says_how_good_every_part_is(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _ = labelled
    before = (bundle / "library" / "library.sqlite").read_bytes()
    main(["report-library", "--bundle", str(bundle), "--out", str(tmp_path / "report.md")])
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "report.md").read_text().strip()
    assert "128 features over 1,500 pictures" in text
    assert "Not made yet: icons and causal scores (draw-icons)." in text
    assert "| predicts: AUC |" in text
    explained = re.search(r"explains (\d+\.\d)% of the variance with 1\d\.\d features a picture", text)
    assert explained is not None
    assert float(explained[1]) > 99
    assert re.search(r"live features have no label.*make up 9\d\.\d% of all firings", text)
    page = (tmp_path / "report.html").read_text()
    assert "data:image/webp;base64," in page
    assert "Labels that predict best" in page
    # Nothing was changed, and nothing is left lying about.
    assert (bundle / "library" / "library.sqlite").read_bytes() == before
    assert [file.name for file in (bundle / "library").iterdir()] == ["library.sqlite"]


def test_what_cannot_be_labelled_is_refused_in_a_sentence(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, corpus = labelled
    for arguments, words in (
        (["--endpoint", "http://127.0.0.1:9"], "--endpoint needs --model"),
        (["--vocabulary", str(tmp_path / "none")], "not a text file"),
        (["--vocabulary", "captions"], "the corpus holds no captions that share words"),
        (["--endpoint", "http://127.0.0.1:9", "--model", "m", "--api-key-env", "NOT_SET_AT_ALL"], "is not set"),
    ):
        with pytest.raises(SystemExit):
            main(["label-library", "--bundle", str(bundle), "--corpus", str(corpus), *arguments])
        assert words in capsys.readouterr().err
    assert Bundle.open(bundle)

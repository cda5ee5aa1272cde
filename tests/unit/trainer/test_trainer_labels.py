"""Labels and icons on a bundle whose pictures and words agree, and every score against a reckoning by hand."""

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
from faceteer_library.people import People
from faceteer_library.store import Filter, Store
from faceteer_runtime.bundle import Bundle, verify
from faceteer_runtime.icons import icon_pictures
from faceteer_trainer.__main__ import main
from faceteer_trainer.errors import JobError
from faceteer_trainer.icons.templates import template_of, unlike
from faceteer_trainer.labels.agreement import agree
from faceteer_trainer.labels.causal import causal_score
from faceteer_trainer.labels.contrast import name_features
from faceteer_trainer.labels.detection import best_threshold, detect
from faceteer_trainer.labels.safety import read_classes, safety_class
from faceteer_trainer.labels.sample import Side
from faceteer_trainer.labels.vision_model import VisionModel
from faceteer_trainer.labels.vocabulary import read_terms
from faceteer_trainer.postcards.corpus import draw_corpus
from PIL import Image
from scipy import sparse

POSTCARDS = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"


# -- scores, by hand -------------------------------------------------------------------------------


def test_the_causal_score_is_what_is_done_by_hand() -> None:
    texts = np.eye(3, dtype=np.float32)
    # From the template (norm 5) to three strengths: by 4 towards label 0 and 3 towards 1, by 2 towards 2 alone, and by
    # 0.4, which is less than a tenth of the norm and does not count. The weights are 5 - 0.5 and 2 - 0.5.
    embeds = np.array([[3, 4, 0], [7, 7, 0], [3, 4, 2], [3, 3.6, 0]], np.float32)
    assert causal_score(embeds, 0, texts) == pytest.approx((4.5 * 1 + 1.5 * 0.25) / 6)  # beats both; ties with 1 only
    assert causal_score(embeds, 1, texts) == pytest.approx((4.5 * 0.5 + 1.5 * 0.25) / 6)
    assert causal_score(embeds, 2, texts) == pytest.approx((4.5 * 0 + 1.5 * 1) / 6)


def test_a_feature_that_changes_nothing_to_be_seen_causes_nothing() -> None:
    embeds = np.array([[3, 4, 0], [3.3, 4, 0], [3.4, 4, 0.1]], np.float32)
    assert causal_score(embeds, 0, np.eye(3, dtype=np.float32)) == 0.5


def test_a_feature_that_is_on_in_the_template_starts_from_the_picture_least_like_it() -> None:
    # Features 0 and 1 are on in the first template; 2 is hardly on, and 3 is dead.
    p99 = np.array([1, 2, 1, 0], np.float32)
    first = np.array([1, 0.5, 0.1, 0], np.float32)
    acts = np.zeros((4, 4))
    acts[0] = [0.9, 0, 0, 0]
    acts[1] = [0, 0, 3, 0]  # shares nothing that counts, but is far from the mean
    acts[2] = [0, 0, 3, 0]
    acts[3] = [0, 2, 0, 0]
    embeds = np.array([[0, 0], [5, 5], [1, 0], [0, 0]], np.float32)
    chosen = unlike(first, sparse.csc_matrix(acts), p99, embeds, np.zeros(2, np.float32))
    assert chosen == 2
    templates, scaled = [embeds[3], embeds[2]], [first, np.array([0.9, 0, 3, 0], np.float32)]
    assert template_of(0, templates, scaled) is templates[1]
    assert template_of(1, templates, scaled) is templates[1]
    assert template_of(2, templates, scaled) is templates[0]
    assert template_of(0, templates, [first, first + 1]) is templates[0]
    assert template_of(0, templates[:1], scaled[:1]) is templates[0]


def test_the_threshold_is_the_one_that_tells_most() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.3, 0.1])
    fires = np.array([True, True, False, True, False])
    assert best_threshold(scores, fires) == pytest.approx(0.6)


def side(embeds: np.ndarray, acts: np.ndarray) -> Side:
    return Side(np.arange(len(embeds)), embeds.astype(np.float32), sparse.csc_matrix(acts.astype(np.float32)))


def test_detection_is_one_for_a_label_that_tells_and_a_half_for_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    fires = rng.random(600) < 0.2
    embeds = rng.standard_normal((600, 4))
    embeds[:, 0] = np.where(fires, 3.0, -1.0)
    pictures = side(embeds, np.where(fires, 1.0 + rng.random(600), 0.0)[:, None])
    told = detect(pictures, pictures, 0, np.array([1, 0, 0, 0], np.float32))
    assert told == (1.0, 1.0)
    blind = detect(pictures, pictures, 0, np.array([0, 1, 0, 0], np.float32))
    assert blind is not None
    assert abs(blind.auc - 0.5) < 0.1
    few = side(embeds[:6], np.ones((6, 1)))
    assert detect(few, few, 0, np.ones(4, np.float32)) is None


def test_scores_agree_when_both_say_the_same() -> None:
    assert [agree(0.9, 0.8), agree(0.5, 0.5), agree(0.9, 0.5), agree(0.5, 0.9)] == [True, True, False, False]
    assert agree(None, 0.9) is None


class Space:
    """Three words at right angles."""

    terms = ("cat", "red car", "red boat", "snow")
    directions = np.eye(4, dtype=np.float32)


def test_a_feature_is_named_by_what_stands_out_on_its_pictures() -> None:
    rng = np.random.default_rng(1)
    embeds = 0.3 * rng.standard_normal((500, 4))
    acts = np.zeros((500, 4))
    acts[:50, 0] = 1 + rng.random(50)
    embeds[:50, 3] += 2
    acts[100:150, 1] = 1 + rng.random(50)
    embeds[100:150, 1] += 2
    embeds[100:150, 2] += 1.8
    # All of them are in snow, the weak ones too; the strong ones happen to show a cat.
    acts[150:250, 3] = np.repeat([0.2, 1], [75, 25])
    embeds[150:250, 3] += 1.5
    embeds[225:250, 0] += 2
    acts[200:, 2] = rng.random(300)
    found = name_features(side(embeds, acts), Space(), np.arange(4), 1.0, 0.65)  # type: ignore[arg-type]
    assert found[0].label == "snow"
    # "red boat" would be as good, but says "red" again.
    assert (found[1].label, found[1].terms) == ("red car", ())
    z = (embeds[100:150, 1].mean() - embeds[:, 1].mean()) / embeds[:, 1].std()
    assert (found[1].z, found[1].auc) == (pytest.approx(z, rel=1e-5), 1.0)
    assert 2 not in found
    assert (found[3].label, found[3].terms) == ("snow", ())


# -- words, classes --------------------------------------------------------------------------------


def test_vocabularies_come_along_and_may_be_brought(tmp_path: Path) -> None:
    assert len(read_terms("general")) > 1000
    assert "night" in read_terms("postcards")
    (tmp_path / "mine.txt").write_text("# mine\nsnow\n\nsnow\n  two cats # more than one\n")
    assert read_terms(str(tmp_path / "mine.txt")) == ("snow", "two cats")
    for fault, words in (("", "holds no terms"), ("x" * 121, "longer than the 120 characters")):
        (tmp_path / "bad.txt").write_text(fault)
        with pytest.raises(JobError, match=words):
            read_terms(str(tmp_path / "bad.txt"))
    with pytest.raises(JobError, match="not a text file that can be read"):
        read_terms(str(tmp_path / "none.txt"))


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
        # What the world is made of (the words of faceteer_trainer.postcards.world), found from pictures alone.
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
    People(bundle / "labels.sqlite").set(24, "the small hours", "ann")
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
        (["--endpoint", "http://127.0.0.1:9", "--model", "m", "--api-key-env", "NOT_SET_AT_ALL"], "is not set"),
    ):
        with pytest.raises(SystemExit):
            main(["label-library", "--bundle", str(bundle), "--corpus", str(corpus), *arguments])
        assert words in capsys.readouterr().err
    assert Bundle.open(bundle)

"""The SDK and the command line against the real all-in-one server: the main job, end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faceteer
import numpy as np
import pytest
from tiny_bundle import EMBED_DIM, N_FEATURES, gate_feature, picture, picture_bytes
from unit.generator.small_prior import write_small_prior
from unit.sdk.test_sdk_views import read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("faceteer_studio.__main__") is None, reason="needs the all-in-one server"
    ),
]


GATED, GATED_LABEL, CLASS, KEY = 50, "fist fight", "violence", "a key"


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on the tiny bundle with a text prior, and with one feature in a gated class."""
    folder = tmp_path_factory.mktemp("server")
    bundle = shutil.copytree(tiny_bundle, folder / "bundle")
    write_small_prior(bundle / "generator" / "prior")
    gate_feature(bundle, GATED, GATED_LABEL, CLASS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "faceteer_studio",
        "--all-in-one",
        "--listen",
        address,
        "--bundle",
        str(bundle),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FACETEER_")}
    environment |= {"OMP_NUM_THREADS": "1", "FACETEER_LIBRARY_LABELS_PATH": str(folder / "labels.sqlite")}
    environment["FACETEER_LIBRARY_ACCESS_KEYS"] = KEY
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    try:
        with faceteer.connect(address, retries=0) as client:
            deadline = time.monotonic() + 90
            while True:
                try:
                    if client.status(timeout=5).healthy:
                        break
                except (faceteer.UnavailableError, faceteer.DeadlineExceededError):
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((folder / "log").read_text()[-3000:])
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[faceteer.Client]:
    with faceteer.connect(address) as connected:
        yield connected


def test_the_main_job_runs_from_a_picture_to_an_edited_one(client: faceteer.Client, tmp_path: Path) -> None:
    photo = client.open(picture(1))
    assert 0 < photo.l0 <= 8
    assert photo.embeds.shape == (EMBED_DIM,)
    strongest, *_ = photo.features.top(3)
    edit = photo.edit().set("night", 1.0).ablate(strongest.index if strongest.label != "night" else 1).add(41, 0.5)
    report = edit.report()
    assert report.outcomes[0].label == "night"
    assert report.outcomes[0].requested_scaled == pytest.approx(1.0, rel=1e-4)
    assert "Drift of the features that were not edited" in str(report)
    image = edit.render(seed=7, steps=3, progress=True)
    assert image.size == (64, 64)
    assert np.array_equal(np.asarray(image), np.asarray(edit.render(seed=7, steps=3)))
    assert not np.array_equal(np.asarray(image), np.asarray(edit.render(seed=8, steps=3)))
    edit.recipe().save(tmp_path / "night.json")
    other = client.open(picture(2))
    replayed = other.edit(faceteer.Recipe.load(tmp_path / "night.json"))
    assert replayed.recipe() == faceteer.Recipe.load(tmp_path / "night.json")
    assert set(replayed.report().edits) == set(edit.report().edits)
    assert client.transfer(photo, other, coverage=0.9).render(steps=2).size == (64, 64)


def test_events_previews_and_several_seeds(client: faceteer.Client) -> None:
    photo = client.open(picture(3))
    previews: list[faceteer.Preview] = []
    images = photo.edit().render(seeds=[5, 6], steps=4, size=(128, 64), previews=previews.append, preview_every=2)
    assert [image.info["seed"] for image in images] == [5, 6]
    assert {image.size for image in images} == {(128, 64)}
    assert {preview.index for preview in previews} == {0, 1}
    kinds = [type(event).__name__ for event in photo.edit().events(seed=1, steps=2)]
    assert (kinds[0], kinds[-1]) == ("Edited", "Finished")


def test_a_difference_applied_leads_to_the_other_picture(address: str, client: faceteer.Client) -> None:
    with faceteer.connect(address, access_key=KEY) as allowed:
        photo, other = allowed.open(picture(4)), allowed.open(picture(5))
        difference = allowed.diff(photo, other, coverage=0.999)
        report = photo.edit(difference).report()
        before = np.linalg.norm(photo.embeds - other.embeds)
        assert np.linalg.norm(report.embeds - other.embeds) < before
    assert GATED in [feature.index for feature in difference.features]
    # Without the key the same difference is told, the gated feature without its name; turning it on is refused.
    photo, other = client.open(picture(4)), client.open(picture(5))
    told = client.diff(photo, other, coverage=0.999)
    assert [feature.index for feature in told.features] == [feature.index for feature in difference.features]
    assert {feature.index: feature.label for feature in told.features}[GATED] == ""
    with pytest.raises(faceteer.UnknownFeatureError):
        photo.edit(told).report()
    client.transfer(photo, other, coverage=0.999).report()


def test_bulk_encoding_equals_opening_one_by_one(client: faceteer.Client) -> None:
    pictures = [picture_bytes(seed) for seed in range(20, 40)]
    embeds = client.encode(pictures, batch_size=4)
    assert embeds.shape == (20, EMBED_DIM)
    for row, data in zip(embeds[:5], pictures, strict=False):
        np.testing.assert_allclose(row, client.open(data).embeds, rtol=1e-4, atol=1e-4)
    with pytest.raises(faceteer.UnreadableImageError) as raised:
        client.encode([pictures[0], b"not a picture", pictures[1]])
    assert raised.value.index == 1
    assert client.encode_texts(["a boat at night", "snow"]).shape == (2, EMBED_DIM)


def test_the_library_answers(client: faceteer.Client) -> None:
    night = client.features["Night"]
    assert night.index == 0
    assert night == client.features[0]
    assert [feature.label for feature in client.features.search("sno")] == ["snow"]
    assert len(list(client.features.list())) == N_FEATURES - 1, "one is gated"
    assert all(example.activation > 0 for example in night.examples())
    with pytest.raises(faceteer.UnknownFeatureError) as raised:
        client.features["nigth"]
    assert "night" in raised.value.nearest
    with pytest.raises(faceteer.NotFoundError):
        client.features[N_FEATURES]


def test_failures_are_typed(client: faceteer.Client) -> None:
    photo = client.open(picture(6))
    with pytest.raises(faceteer.UnreadableImageError):
        client.open(b"not a picture")
    with pytest.raises(faceteer.UnknownFeatureError):
        photo.edit().set("nigth", 1).report()
    with pytest.raises(faceteer.InvalidArgumentError, match="steps"):
        photo.edit().render(steps=100_000)
    with pytest.raises(faceteer.InvalidArgumentError):
        photo.edit().render(size=77)
    alien = faceteer.Recipe((faceteer.FeatureEdit(1, "ablate"),), faceteer.Revisions(generator="another"))
    with pytest.raises(faceteer.RevisionMismatchError):
        photo.edit(alien).report()


def test_of_a_name_and_an_index_that_mean_one_feature_the_last_edit_counts(client: faceteer.Client) -> None:
    report = client.open(picture(6)).edit().set("night", 1).ablate(0).report()
    assert [(one.index, one.operation) for one in report.outcomes] == [(0, "ablate")]
    assert "EDIT_REPLACED" in [warning.code for warning in report.warnings]


def test_an_embedding_that_the_server_does_not_know_is_encoded_again(client: faceteer.Client) -> None:
    photo = client.open(picture(7))
    photo._opened.embedding_id = photo.embedding_id.rsplit("-", 1)[0] + "-" + "0" * 64
    assert photo.edit().set("night", 1).report().outcomes[0].label == "night"
    assert photo._opened.inline


async def test_the_asyncio_client_does_the_same(address: str) -> None:
    async with faceteer.connect_async(address) as client:
        photo = await client.open(picture(1))
        image = await photo.edit().set("night", 1.0).render(seed=7, steps=3)
        assert image.info["seed"] == 7
        assert (await client.encode([picture_bytes(1)])).shape == (1, EMBED_DIM)


def test_the_command_line_does_the_same(address: str, tmp_path: Path) -> None:
    (tmp_path / "boat.png").write_bytes(picture_bytes(1))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "faceteer.cli", *words]
        environment = {**os.environ, "FACETEER_ADDRESS": address}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    opened = run("open", "boat.png", "--json")
    assert opened.returncode == 0, opened.stderr
    assert set(json.loads(opened.stdout)["features"][0]) >= {"index", "label", "activation", "scaled"}
    words = "edit boat.png --set night=1.0 --seed 7 --steps 3 -o out.png --save-recipe r.json --json"
    edited = run(*words.split())
    assert edited.returncode == 0, edited.stderr
    assert json.loads(edited.stdout)["outcomes"][0]["label"] == "night"
    assert (tmp_path / "out.png").exists()
    for words in ("diff boat.png out.png", "features search night", "features show night", "status"):
        done = run(*words.split())
        assert (done.returncode, done.stderr) == (0, ""), words
    assert run("recipe", "apply", "r.json", "out.png", "-o", "again.png").returncode == 0
    assert run("features", "show", "nigth").returncode == 3


def test_the_library_says_what_it_covers_and_finds_by_words_meaning_picture_and_likeness(
    client: faceteer.Client,
) -> None:
    facts = client.features.info()
    assert (facts.n_features, facts.corpus, facts.searches_meaning) == (N_FEATURES - 1, "random pictures", True)
    assert facts == client.status().library
    assert client.features.search("evening")[0].label == "night", "one of its other words"
    photo = client.open(picture(11))
    by_picture = client.features.search(photo, limit=None)
    assert [hit.index for hit in by_picture] == [feature.index for feature in photo.features if feature.index != GATED]
    night = client.features["night"]
    assert [one.index for one in night.similar(3)] == [related.index for related in night.nearest]


def test_scores_filter_and_order_real_features(client: faceteer.Client) -> None:
    disagreeing = {feature.label for feature in client.features.list(scores_disagree=True)}
    assert disagreeing == {"two of something", "boat"}
    causal = [feature.statistics.causal_score for feature in client.features.list(order="causal_score", limit=7)]
    assert causal == sorted(causal, reverse=True)  # type: ignore[type-var]
    good = list(client.features.list(min_causal_score=0.85, min_detection_score=0.7))
    assert {feature.label for feature in good} == {"night", "red"}
    night = client.features["night"]
    assert night.terms == ("darkness", "evening")
    assert night.statistics.detection_balanced_accuracy == pytest.approx(0.95)


def test_examples_come_from_the_quantiles_of_a_real_feature(client: faceteer.Client) -> None:
    examples = client.features["night"].examples(selection="quantiles")
    assert [(e.quantile_from, e.quantile_to) for e in examples] == [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0, 0.25)]
    assert [e.activation for e in examples] == sorted((e.activation for e in examples), reverse=True)


def test_an_icon_is_drawn_when_it_is_asked_for(client: faceteer.Client, tmp_path: Path) -> None:
    icon = client.features["night"].icon()
    assert len(icon.tiles) == len(icon.strengths) + 1
    assert client.features["night"].icon().data == icon.data
    assert icon.save(tmp_path / "icon.webp").read_bytes() == icon.data


def test_views_of_real_features_have_pictures(client: faceteer.Client, tmp_path: Path) -> None:
    night = client.features["night"]
    night.icon()
    assert len(read(night._repr_html_()).sources) == len(night.examples()) + 4
    found = faceteer.FeatureList(client.features.list(order="firing_share", limit=50))
    assert len(read(found._repr_html_()).sources) > 100
    assert len(found._repr_html_()) < 3_000_000
    page = found.save_html(tmp_path / "all.html").read_text()
    assert len(read(page).sources) > 100


def test_what_is_gated_is_seen_with_a_key_alone(address: str, client: faceteer.Client) -> None:
    with pytest.raises(faceteer.UnknownFeatureError):
        client.features[GATED]
    assert GATED_LABEL not in {feature.label for feature in client.features.search(GATED_LABEL)}
    with pytest.raises(faceteer.PermissionDeniedError):
        client.features.search(GATED_LABEL, include_safety_classes=[CLASS])
    assert client.features.info().safety_classes == ()
    with faceteer.connect(address, access_key=KEY) as allowed:
        assert allowed.features.info().safety_classes == (CLASS,)
        (found,) = allowed.features.search(GATED_LABEL, include_safety_classes=[CLASS], labelled=True)[:1]
        assert (found.index, found.safety_class) == (GATED, CLASS)


def test_a_prompt_is_imagined_edited_and_drawn_for_real(client: faceteer.Client) -> None:
    photo = client.embed_prompt("a cat", seed=3, steps=4)
    assert photo.l0 > 0
    np.testing.assert_array_equal(photo.embeds, client.embed_prompt("a cat", seed=3, steps=4).embeds)
    assert not np.allclose(photo.embeds, client.embed_prompt("a cat", seed=4, steps=4).embeds)
    assert photo.edit().set("night", 1.0).render(seed=1, steps=2).size == (64, 64)
    with pytest.raises(faceteer.InvalidArgumentError, match="steps"):
        client.embed_prompt("a cat", steps=100_000)


def test_features_and_their_error_give_real_embeddings_back(client: faceteer.Client) -> None:
    photos = [client.open(picture(seed)) for seed in range(60, 70)]
    encodings = client.encode_features(photos, include_error=True)
    for photo, encoding in zip(photos, encodings, strict=True):
        assert encoding.l0 == photo.l0
        assert encoding.explained_variance == pytest.approx(photo.explained_variance, abs=1e-5)
        named = [feature.index for feature in photo.features]
        assert [index for index in encoding.indices.tolist() if index != GATED] == named
    embeds = np.stack([photo.embeds for photo in photos])
    np.testing.assert_allclose(client.decode_features(encodings), embeds, rtol=1e-4, atol=1e-4)
    kept = client.encode_features([embeds[0], embeds[0][:5]], on_error="return")
    assert isinstance(kept[0], faceteer.FeatureEncoding)
    assert isinstance(kept[1], faceteer.InvalidArgumentError)
    with pytest.raises(faceteer.UnknownFeatureError, match="item 1"):
        client.decode_features([{0: 1.0}, {N_FEATURES: 1.0}])


def test_a_real_layout_is_kept_and_replayed_from_its_recipe(client: faceteer.Client) -> None:
    photo = client.open(picture(12))
    edit = photo.edit().set("night", 1.0)
    plain = np.asarray(edit.render(seed=7, steps=4))
    inverted = edit.render(seed=7, steps=4, keep_layout="inversion")
    replayed = photo.edit(faceteer.Recipe.from_json(inverted.info["recipe"])).render()
    np.testing.assert_array_equal(np.asarray(replayed), np.asarray(inverted))
    partly = np.asarray(edit.render(seed=7, steps=4, keep_layout="image_to_image", strength=0.5))
    assert not np.array_equal(plain, np.asarray(inverted))
    assert not np.array_equal(plain, partly)
    with pytest.raises(faceteer.InvalidArgumentError, match="scheduler"):
        edit.render(seed=7, steps=4, keep_layout="inversion", scheduler="ddpm")


def test_the_command_line_finds_shows_and_draws_the_rest(address: str, tmp_path: Path) -> None:
    (tmp_path / "boat.png").write_bytes(picture_bytes(1))

    def run(*words: str, key: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "faceteer.cli", *words]
        environment = {**os.environ, "FACETEER_ADDRESS": address, "FACETEER_ACCESS_KEY": key}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    for words in (
        "library",
        "features search --picture boat.png --save-html found.html",
        "features search --like night --min-detection 0.5",
        "features list --order disagreement --disagree",
        "features show night --quantiles --save-html night.html",
        "features icon night -o night.webp",
        "prompt a cat --steps 2 -o cat.png",
        "edit boat.png --set night=1 --steps 3 --keep-layout inversion -o kept.png --save-html kept.html",
    ):
        done = run(*words.split())
        assert done.returncode == 0, (words, done.stderr)
    for name in ("found.html", "night.html", "kept.html"):
        assert len(read((tmp_path / name).read_text()).sources) > 1
    refused = run("features", "search", "fist", "--include-class", "all")
    assert (refused.returncode, refused.stderr.count("\n")) == (5, 1)
    assert GATED_LABEL in run("features", "search", "fist", "--include-class", "all", key=KEY).stdout

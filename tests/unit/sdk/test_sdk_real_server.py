"""The SDK and the command line against the real all-in-one server: the main job, end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faceteer
import numpy as np
import pytest
from tiny_bundle import EMBED_DIM, N_FEATURES, picture, picture_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("faceteer_studio.__main__") is None, reason="needs the all-in-one server"
    ),
]


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on the tiny bundle."""
    folder = tmp_path_factory.mktemp("server")
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
        str(tiny_bundle),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FACETEER_")}
    environment |= {"OMP_NUM_THREADS": "1", "FACETEER_LIBRARY_LABELS_PATH": str(folder / "labels.sqlite")}
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


def test_a_difference_applied_leads_to_the_other_picture(client: faceteer.Client) -> None:
    photo, other = client.open(picture(4)), client.open(picture(5))
    difference = client.diff(photo, other, coverage=0.999)
    report = photo.edit(difference).report()
    before = np.linalg.norm(photo.embeds - other.embeds)
    assert np.linalg.norm(report.embeds - other.embeds) < before


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
    assert len(list(client.features.list())) == N_FEATURES
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
        photo.edit().set("night", 1).ablate(0).report()
    with pytest.raises(faceteer.InvalidArgumentError):
        photo.edit().render(size=77)
    alien = faceteer.Recipe((faceteer.FeatureEdit(1, "ablate"),), faceteer.Revisions(generator="another"))
    with pytest.raises(faceteer.RevisionMismatchError):
        photo.edit(alien).report()


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

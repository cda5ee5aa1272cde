"""The embed job, run as a user runs it: the service's embeddings, and the same bytes however a run went."""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc
from faceteer_encoder.service import build
from faceteer_encoder.settings import EncoderSettings
from faceteer_postcards.synthetic import SparseMixtures
from faceteer_runtime.image_files import FORMATS
from faceteer_runtime.server import start
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from PIL import Image
from tiny_bundle import picture_bytes

N = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in two folders, every third with a caption, and two files that are none."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for n in range(N):
        path = root / ("more" if n % 2 else "") / f"p{n}.png"
        path.write_bytes(picture_bytes(n, 96))
        if n % 3 == 0:
            path.with_suffix(".txt").write_text(f"number {n}")
    (root / "broken.jpg").write_bytes(picture_bytes(1, 96, "JPEG")[:300])
    (root / "text.png").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def unbroken(pictures: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of those pictures, made without interruption."""
    out = tmp_path_factory.mktemp("unbroken") / "corpus"
    main(command(pictures, tiny_bundle, out))
    return out


def command(images: Path | str, bundle: Path, out: Path, *more: str) -> list[str]:
    """The job's command line, with shards of four pictures."""
    options = ["--images", str(images), "--bundle", str(bundle), "--out", str(out), "--name", "test"]
    return ["embed", *options, "--shard-size", "4", "--batch", "3", *more]


def files(directory: Path) -> dict[str, bytes]:
    """What lies in a corpus' folder, but for its plan, which names times of change."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "plan.json"}


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a failing command says."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def rows_by_name(directory: Path) -> dict[str, np.ndarray]:
    """Every picture's embedding."""
    corpus = EmbeddingCorpus.open(directory)
    everything = np.arange(len(corpus))
    names = [row.name for row in corpus.pictures(everything)]
    return dict(zip(names, corpus.rows(everything), strict=True))


async def test_embeddings_are_those_of_the_encoder_service(
    pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    main(command(pictures, tiny_bundle, tmp_path / "wide", "--dtype", "float32", "--workers", "2"))
    server = await start(EncoderSettings(listen="127.0.0.1:0", bundle=tiny_bundle), build)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = encoder_pb2_grpc.EncoderServiceStub(channel)
            found = rows_by_name(tmp_path / "wide")
            assert len(found) == N
            request = encoder_pb2.EncodeImagesRequest(images=[(pictures / name).read_bytes() for name in found])
            results = (await stub.EncodeImages(request)).results
    finally:
        await server.stop(0.0)
    served = np.stack([np.frombuffer(r.embedding.embeds.data, np.float32) for r in results])
    np.testing.assert_allclose(np.stack(list(found.values())), served, rtol=1e-5, atol=1e-5)
    half = np.stack(list(rows_by_name(unbroken).values()))
    np.testing.assert_array_equal(half, np.stack(list(found.values())).astype(np.float16).astype(np.float32))


def test_names_captions_and_thumbnails_lie_beside_and_bad_pictures_are_recorded(unbroken: Path) -> None:
    corpus = EmbeddingCorpus.open(unbroken)
    first, second, later = corpus.pictures([0, 1, N - 1])
    assert (first.name, first.caption) == ("more/p1.png", "")
    assert (second.name, second.caption) == ("more/p3.png", "number 3")
    assert later.name == "p58.png"
    with Image.open(io.BytesIO(first.thumbnail)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (64, 64))
    bad = [json.loads(line) for line in (unbroken / "bad.jsonl").read_text().splitlines()]
    assert {line["name"]: line["reason"].split(" (")[0] for line in bad} == {
        "broken.jpg": "is damaged or cut off",
        "text.png": f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file",
    }
    assert (corpus.card.n_bad, corpus.card.name, len(corpus)) == (2, "test", N)
    assert not list(unbroken.glob("bad-*")) + list(unbroken.glob("*.part"))


def test_a_folder_a_tar_and_a_parquet_file_of_the_same_pictures_give_the_same_embeddings(
    pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    names = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("*.png"))]
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in names:
            archive.add(pictures / name, name)
    table = pa.table({"bytes": [(pictures / name).read_bytes() for name in names], "name": names})
    pq.write_table(table, tmp_path / "t.parquet")
    main(command(tmp_path / "t.tar", tiny_bundle, tmp_path / "a", "--thumbnails", "0"))
    main(command(tmp_path / "*.parquet", tiny_bundle, tmp_path / "b", "--thumbnails", "32"))
    expected = rows_by_name(unbroken)
    for found in (rows_by_name(tmp_path / "a"), rows_by_name(tmp_path / "b")):
        found = {name.removeprefix("t.tar/"): row for name, row in found.items()}
        assert found.keys() == expected.keys()
        for name, row in found.items():
            # Other neighbours in the batch: the last bits may differ.
            np.testing.assert_allclose(row, expected[name], rtol=2e-3, atol=2e-3)


def test_a_run_that_was_killed_goes_on_to_the_bytes_of_an_unbroken_one(
    pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "corpus"
    process = subprocess.Popen(
        [sys.executable, "-m", "faceteer_trainer", *command(pictures, tiny_bundle, out)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out / "embeds-00003.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("embeds-*.safetensors")}
    assert 4 <= len(before) < len(list(unbroken.glob("embeds-*")))
    with pytest.raises(JobError, match="has not finished; run it again"):
        EmbeddingCorpus.open(out)
    # As a kill in the middle of a write leaves it.
    (out / "embeds-00009.safetensors.part").write_bytes(b"half")
    main(command(pictures, tiny_bundle, out, "--workers", "3"))
    assert files(out) == files(unbroken)
    # What was done was kept.
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_corpus_is_left_as_it_is_and_a_damaged_shard_made_anew(
    pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    main(command(pictures, tiny_bundle, out))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("embeds-*")}
    shard, table = out / "embeds-00002.safetensors", out / "pictures-00005.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    table.write_bytes(b"")
    main(command(pictures, tiny_bundle, out))
    assert files(out) == files(unbroken)
    changed = {path.name for path in out.glob("embeds-*") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"embeds-00002.safetensors", "embeds-00005.safetensors"}


@pytest.mark.slow
def test_two_ray_workers_give_the_same_bytes(pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "corpus"
    # Its own process: Ray leaves threads and warnings behind.
    job = command(pictures, tiny_bundle, out, "--ray", "local", "--workers", "2")
    ran = subprocess.run([sys.executable, "-m", "faceteer_trainer", *job], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert files(out) == files(unbroken)


def test_without_ray_the_option_says_what_to_install(
    pictures: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = error(capsys, *command(pictures, tiny_bundle, tmp_path / "c", "--ray", "local"))
    assert said == "error: --ray needs Ray: pip install 'faceteer-trainer[ray]'"


def test_folders_without_pictures_are_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, texts, out = tmp_path / "empty", tmp_path / "texts", tmp_path / "out"
    empty.mkdir()
    texts.mkdir()
    (texts / "a.txt").write_text("words")
    assert "empty: holds no pictures (jpg, jpeg, png" in error(capsys, *command(empty, tiny_bundle, out))
    assert "texts: holds no pictures (jpg, jpeg, png" in error(capsys, *command(texts, tiny_bundle, out))
    assert "nowhere: no such folder or file" in error(capsys, *command(tmp_path / "nowhere", tiny_bundle, out))
    assert "a.txt: must be a folder, or tar files" in error(capsys, *command(texts / "a.txt", tiny_bundle, out))
    assert not out.exists()
    (texts / "a.png").write_text("words")
    said = error(capsys, *command(texts, tiny_bundle, out))
    assert "not one of 1 pictures could be read; a.png: is not a PNG" in said
    with pytest.raises(JobError, match="has not finished"):
        EmbeddingCorpus.open(out)


def test_pictures_above_the_services_limits_are_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.png").write_bytes(picture_bytes(0))
    with (images / "heavy.png").open("wb") as file:
        file.truncate(20_000_001)
    Image.new("1", (10_000, 5_001)).save(images / "wide.png")
    main(command(images, tiny_bundle, tmp_path / "out"))
    bad = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [(line["name"], line["reason"]) for line in bad] == [
        ("heavy.png", "20000001 bytes are more than the 20000000 that are taken"),
        ("wide.png", "10000 x 5001 pixels are more than the 50000000 that are taken; send a smaller one"),
    ]


def test_a_folder_that_was_begun_otherwise_is_refused_with_the_difference(
    pictures: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "a.png").write_bytes(picture_bytes(0))
    main(command(images, tiny_bundle, out))
    assert "was begun with --dtype float16" in error(capsys, *command(images, tiny_bundle, out, "--dtype", "float32"))
    assert "was begun with --shard-size 4" in error(capsys, *command(images, tiny_bundle, out, "--shard-size", "5"))
    assert "was begun with other pictures" in error(capsys, *command(pictures, tiny_bundle, out))
    kept = files(out)
    (images / "b.png").write_bytes(picture_bytes(1))
    assert "files were added" in error(capsys, *command(images, tiny_bundle, out))
    assert files(out) == kept
    plan = json.loads((out / "plan.json").read_text())
    plan["fixed"]["encoder_revision"] = "0123456789abcdef"
    (out / "plan.json").write_text(json.dumps(plan))
    said = error(capsys, *command(images, tiny_bundle, out))
    assert "holds embeddings of encoder 0123456789abcdef, but --bundle has encoder" in said
    SparseMixtures(64, 8, 4).write(tmp_path / "synthetic", 10)
    said = error(capsys, *command(images, tiny_bundle, tmp_path / "synthetic"))
    assert "holds a corpus that embed has not made" in said
    assert "lies among the pictures" in error(capsys, *command(images, tiny_bundle, images / "out"))


def test_two_runs_into_one_folder_are_refused_but_a_dead_runs_lock_is_not(
    pictures: Path, unbroken: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holds = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    holds += "print(os.getpid(), file=f, flush=True); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holds, str(out / ".lock")], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    said = error(capsys, *command(pictures, tiny_bundle, out))
    assert f"another run (process {other.pid}) works in it" in said
    other.kill()
    other.wait()
    other.stdout.close()
    assert (out / ".lock").read_text() == f"{other.pid}\n"
    main(command(pictures, tiny_bundle, out))
    assert files(out) == files(unbroken)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond this fail with EFBIG, as those to a full disk do with ENOSPC; Python ignores SIGXFSZ itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "file"), [(2500, "pictures-00000.parquet"), (200, "plan.jsonl")])
def test_a_full_disk_is_one_clear_error_and_nothing_is_left_half_written(
    size: int,
    file: str,
    pictures: Path,
    unbroken: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with largest_file(size):
        said = error(capsys, *command(pictures, tiny_bundle, out))
    assert said == (
        f"error: {out / file}: could not be written (File too large); make room and run the same command again: what "
        "is done is kept"
    )
    assert not list(out.glob("*.part"))
    assert not (out / file).exists()
    main(command(pictures, tiny_bundle, out))
    assert files(out) == files(unbroken)


def test_what_was_left_out_and_passed_over_is_counted_and_said(
    pictures: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("faceteer_runtime.image_files.FORMATS", ("PNG", "JPEG"))
    folder = tmp_path / "phone"
    folder.mkdir()
    for name in ("a.png", "b.PNG"):
        (folder / name).write_bytes((pictures / "p0.png").read_bytes())
    (folder / "a.txt").write_text("a caption")
    for name in ("IMG_1.HEIC", "IMG_2.heic"):
        (folder / name).write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))
    for name in ("IMG_3.MOV", "IMG_4.mov", "raw.cr2", "README"):
        (folder / name).write_bytes(b"something")
    for _ in range(2):
        main(command(folder, tiny_bundle, tmp_path / "out"))
        said = capsys.readouterr().out
        assert "2 pictures in 1 shards" in said
        assert "2 bad ones left out" in said
        assert "left out 2: is a HEIC file, as iPhones write them" in said
        assert "passed over 4 files that are no pictures: 2 .mov, 1 .cr2, 1 no ending" in said.replace(
            "1 no ending, 1 .cr2", "1 .cr2, 1 no ending"
        )

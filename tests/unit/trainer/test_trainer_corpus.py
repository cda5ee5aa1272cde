"""Corpora on disk, and the lists that they are made from: read as written, and refused with the reason when damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faceteer_trainer.corpus.pictures import Piece
from faceteer_trainer.corpus.plan import packed
from faceteer_trainer.corpus.shards import CorpusCard, EmbeddingCorpus, Shard, write_embeds
from faceteer_trainer.corpus.sources import open_source
from faceteer_trainer.errors import JobError
from safetensors.numpy import load_file
from tiny_bundle import picture_bytes

PNG = picture_bytes(0, 8)


def corpus(directory: Path, values: np.ndarray, dtype: str = "float32", revision: str = "r1") -> Path:
    """Two shards: all rows but the last three, and those."""
    directory.mkdir(exist_ok=True)
    for number, rows in enumerate((values[:-3], values[-3:])):
        write_embeds(directory / f"embeds-{number:05d}.safetensors", rows, dtype=dtype, encoder_revision=revision)
    shards = (Shard("embeds-00000.safetensors", len(values) - 3), Shard("embeds-00001.safetensors", 3))
    CorpusCard("c", revision, values.shape[1], dtype, shards).write(directory)
    return directory


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """A tar file with these members, in order."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(source: str, captions: str = "auto", size: int = 100) -> list[tuple[str, str]]:
    """Names and captions that a source yields, by shards of `size`."""
    opened = open_source(source, captions)
    groups = list(packed(opened.pieces(), size))
    for group in groups[:-1]:
        assert sum(piece.count for piece in group) == size
    found = [entry for group in groups for piece in group for entry in opened.entries(piece)]
    assert all(entry.data is not None for entry in found)
    return [(entry.name, entry.caption) for entry in found]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_corpus_is_read_by_chunks_and_by_rows_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)
    read = EmbeddingCorpus.open(corpus(tmp_path, values, dtype), encoder_revision="r1")
    expected = values.astype(dtype).astype(np.float32)
    chunks = list(read.chunks(5))
    assert [first for first, _ in chunks] == [0, 5, 8]
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in chunks]), expected)
    np.testing.assert_array_equal(read.rows([10, 0, 7, 8, 0]), expected[[10, 0, 7, 8, 0]])
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            read.rows([0, outside])
    # Anybody's safetensors reader sees the same.
    np.testing.assert_array_equal(load_file(tmp_path / "embeds-00001.safetensors")["embeds"], values[-3:].astype(dtype))


def test_a_shard_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = corpus(tmp_path, np.ones((9, 4), np.float32)) / "embeds-00001.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, 40, 3, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(JobError, match=r"embeds-00001\.safetensors.*(cut short|not an embedding shard)"):
            EmbeddingCorpus.open(tmp_path)
    path.unlink()
    with pytest.raises(JobError, match=r"embeds-00001\.safetensors: missing"):
        EmbeddingCorpus.open(tmp_path)


def test_embeddings_of_another_encoder_are_refused_by_revision(tmp_path: Path) -> None:
    values = np.ones((9, 4), np.float32)
    with pytest.raises(JobError, match="embeddings of encoder r1, but r2 is needed"):
        EmbeddingCorpus.open(corpus(tmp_path, values), encoder_revision="r2")
    write_embeds(tmp_path / "embeds-00000.safetensors", values[:6], dtype="float32", encoder_revision="other")
    with pytest.raises(JobError, match="made by encoder other, but the corpus is of r1"):
        EmbeddingCorpus.open(tmp_path)


def test_rows_that_are_not_finite_are_named_when_they_are_read_and_never_written(tmp_path: Path) -> None:
    corpus(tmp_path, np.ones((9, 4), np.float32))
    path = tmp_path / "embeds-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-16] + np.full(4, np.nan, np.float32).tobytes())
    read = EmbeddingCorpus.open(tmp_path)
    np.testing.assert_array_equal(read.rows([0, 7]), 1)
    with pytest.raises(JobError, match=r"embeds-00001\.safetensors: row 2 holds NaN"):
        read.rows([0, 8])
    with pytest.raises(JobError, match=r"embeds-00001\.safetensors: row 2 holds NaN"):
        list(read.chunks())
    with pytest.raises(JobError, match="row 1 is not finite in float16"):
        write_embeds(tmp_path / "x", np.array([[1.0], [70_000.0]]), dtype="float16", encoder_revision="r1")
    assert not (tmp_path / "x").exists()


def test_a_folder_is_listed_naturally_with_captions_beside_pictures(tmp_path: Path) -> None:
    for name in ("b10.png", "b2.PNG", "a/x.jpg", "notes.md", ".hidden.png", "b2.txt", "a/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "b2.txt").write_text(" two of something \n")
    (tmp_path / "a/x.json").write_text(json.dumps({"text": "a boat"}))
    assert listed(str(tmp_path)) == [("a/x.jpg", "a boat"), ("b2.PNG", "two of something"), ("b10.png", "")]
    assert listed(str(tmp_path), "json", 2) == [("a/x.jpg", "a boat"), ("b2.PNG", ""), ("b10.png", "")]


def test_names_that_are_no_utf8_are_read_all_the_same(tmp_path: Path) -> None:
    (tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(PNG)
    assert listed(str(tmp_path)) == [("caf?.png", "")]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_tar_members_of_one_key_are_one_picture_wherever_shards_begin(
    tmp_path: Path, suffix: str, mode: str, size: int
) -> None:
    # A name of more than 100 characters has a header of its own before it.
    long = "d/" + "n" * 120
    members = {"d/1.jpg": PNG, "d/1.txt": b"one", "d/2.json": b'{"caption": "two"}', "d/2.seg.png": PNG}
    members |= {"d/3.txt": b"no picture", f"{long}.png": PNG, f"{long}.txt": b"long", "d/._x.jpg": b"?"}
    tar(tmp_path / f"t2{suffix}", members, mode)
    tar(tmp_path / f"t10{suffix}", {"9.png": PNG}, mode)
    first, second = f"t2{suffix}/", f"t10{suffix}/"
    expected = [("d/1.jpg", "one"), ("d/2.seg.png", "two"), (f"{long}.png", "long")]
    assert listed(str(tmp_path), size=size) == [*((first + n, c) for n, c in expected), (second + "9.png", "")]
    assert listed(str(tmp_path / f"t2*{suffix}"), "none", size) == [(first + name, "") for name, _ in expected]


def test_a_tar_that_is_cut_short_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", {f"{n}.png": PNG + bytes(2000) for n in range(5)})
    whole = path.read_bytes()
    for broken in (whole[:5000], whole[:2560] + b"\xff" * 600 + whole[3160:], b"text", b""):
        path.write_bytes(broken)
        with pytest.raises(JobError, match=r"t\.tar: (not a whole tar file|holds no pictures)"):
            listed(str(path))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_parquet_rows_are_read_from_any_row_group_on(tmp_path: Path, size: int) -> None:
    bytes_of = [PNG + bytes([n]) for n in range(20)]
    table = pa.table({"jpg": bytes_of, "text": [f"c{n}" for n in range(20)], "key": [f"k{n}" for n in range(20)]})
    pq.write_table(table, tmp_path / "p2.parquet", row_group_size=6)
    structs = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(bytes_of[:3])]
    pq.write_table(pa.table({"image": structs, "label": [0, 1, 2]}), tmp_path / "p10.parquet")
    expected = [(f"k{n}", f"c{n}") for n in range(20)] + [(f"{n}.png", "") for n in range(3)]
    assert listed(str(tmp_path), size=size) == expected
    source = open_source(str(tmp_path))
    found = [entry.data for group in packed(source.pieces(), size) for p in group for entry in source.entries(p)]
    assert found == bytes_of + bytes_of[:3]


def test_parquet_without_pictures_is_refused_with_the_columns_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"url": ["x"], "text": ["y"]}), path)
    with pytest.raises(JobError, match=r"no column of pictures.*there are: url, text"):
        listed(str(path))
    pq.write_table(pa.table({"image": ["not bytes"]}), path)
    with pytest.raises(JobError, match="column image is of type string"):
        listed(str(path))
    pq.write_table(pa.table({"image": [PNG]}), path)
    with pytest.raises(JobError, match=r"no column title \(there are: image\)"):
        listed(str(path), "title")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(JobError, match=r"p\.parquet: not a whole Parquet file"):
        listed(str(path))


def test_pieces_are_cut_and_joined_to_shards_of_one_size() -> None:
    pieces = [Piece("a", 0, 5), Piece("b", 0, 2), Piece("c", 100, 1), Piece("c", 900, 1)]
    assert [[(p.file, p.first, p.count) for p in group] for group in packed(pieces, 3)] == [
        [("a", 0, 3)],
        [("a", 3, 2), ("b", 0, 1)],
        [("b", 1, 1), ("c", 100, 2)],
    ]

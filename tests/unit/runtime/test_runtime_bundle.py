"""Bundles: sealing, opening, verifying, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from faceteer_runtime.bundle import Bundle, BundleError, seal, verify

MANIFEST = {
    "name": "toy",
    "description": "Two bytes a part.",
    "parts": {
        "encoder": {"kind": "open_clip", "embed_dim": 4},
        "sae": {"kind": "sae"},
        "generator": {"kind": "kandinsky-2-2"},
        "library": {"kind": "sqlite"},
    },
    "licences": {"encoder": "Apache-2.0"},
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for path, text in (
        ("encoder/config.json", "{}"),
        ("encoder/deep/weights.bin", "we"),
        ("sae/cfg.json", "[]"),
        ("generator/unet/weights.bin", "un"),
        ("library/library.sqlite", "db"),
        ("README.md", "not part of any part"),
    ):
        file = tmp_path / "toy" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    seal(tmp_path / "toy", MANIFEST)
    return tmp_path / "toy"


def rewrite(toy: Path, change) -> None:
    manifest = json.loads((toy / "bundle.json").read_text())
    change(manifest)
    (toy / "bundle.json").write_text(json.dumps(manifest))


def test_a_revision_by_hand(toy: Path) -> None:
    lines = sorted(
        f"{hashlib.sha256(text).hexdigest()}  {path}\n"
        for path, text in (("encoder/config.json", b"{}"), ("encoder/deep/weights.bin", b"we"))
    )
    assert Bundle.open(toy).part("encoder").revision == hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def test_a_sealed_bundle_opens_and_verifies(toy: Path) -> None:
    bundle = Bundle.open(toy)
    assert (bundle.name, bundle.directory) == ("toy", toy)
    encoder = bundle.part("encoder")
    assert encoder.path == toy / "encoder"
    assert encoder.facts["embed_dim"] == 4
    assert bundle.part("sae").facts["encoder_revision"] == encoder.revision
    assert bundle.part("generator").facts["encoder_revision"] == encoder.revision
    assert bundle.part("library").facts["sae_revision"] == bundle.part("sae").revision
    assert bundle.has_part("library")
    assert not bundle.has_part("prior")
    assert verify(toy) == bundle


def test_sealing_lists_every_file_of_the_parts_and_nothing_else(toy: Path) -> None:
    (toy / "library" / "library.sqlite-wal").write_text("transient")
    seal(toy)
    manifest = json.loads((toy / "bundle.json").read_text())
    assert manifest["format"] == 1
    assert [entry["path"] for entry in manifest["files"]] == [
        "encoder/config.json",
        "encoder/deep/weights.bin",
        "sae/cfg.json",
        "generator/unet/weights.bin",
        "library/library.sqlite",
    ]
    first = manifest["files"][0]
    assert first == {
        "path": "encoder/config.json",
        "sha256": hashlib.sha256(b"{}").hexdigest(),
        "size": 2,
        "part": "encoder",
        "source": None,
    }


def test_sealing_again_changes_nothing_and_keeps_sources(toy: Path) -> None:
    rewrite(toy, lambda manifest: manifest["files"][0].update(source="somewhere"))
    seal(toy)
    before = (toy / "bundle.json").read_text()
    seal(toy)
    assert (toy / "bundle.json").read_text() == before
    assert json.loads(before)["files"][0]["source"] == "somewhere"


def test_new_weights_are_a_new_revision(toy: Path) -> None:
    before = Bundle.open(toy)
    (toy / "sae" / "cfg.json").write_text("{ }")
    seal(toy)
    after = Bundle.open(toy)
    assert after.part("sae").revision != before.part("sae").revision
    assert after.part("encoder").revision == before.part("encoder").revision
    assert after.part("library").facts["sae_revision"] == after.part("sae").revision


def test_verify_finds_a_changed_byte_that_opening_does_not(toy: Path) -> None:
    (toy / "generator" / "unet" / "weights.bin").write_text("xx")
    Bundle.open(toy)
    with pytest.raises(BundleError, match=r"generator/unet/weights.bin.*SHA-256"):
        verify(toy)


def test_verify_finds_a_revision_that_is_not_its_files(toy: Path) -> None:
    rewrite(toy, lambda manifest: manifest["parts"]["library"].update(revision="0" * 16))
    with pytest.raises(BundleError, match=r"'library' does not have the revision"):
        verify(toy)


def test_a_library_may_grow_while_it_serves_but_weights_may_not(toy: Path) -> None:
    (toy / "library" / "library.sqlite").write_text("more labels")
    Bundle.open(toy)
    (toy / "encoder" / "config.json").write_text("longer than before")
    with pytest.raises(BundleError, match=r"encoder/config.json: 18 bytes"):
        Bundle.open(toy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m.pop("format"), "format None"),
        (lambda m: m.update(name=""), "name"),
        (lambda m: m.update(parts=[]), "parts"),
        (lambda m: m["parts"].update({"../x": {"revision": "a"}}), "'../x'"),
        (lambda m: m["parts"].update(prior={"revision": "a"}), "'prior'.*missing"),
        (lambda m: m["parts"]["sae"].pop("revision"), "'sae' has no revision"),
        (lambda m: m["parts"]["sae"].update(encoder_revision="beef"), "sae was made for encoder revision beef"),
        (lambda m: m["parts"]["generator"].pop("encoder_revision"), "generator was made for encoder revision None"),
        (lambda m: m["parts"]["library"].update(sae_revision="beef"), "library was made for sae revision beef"),
        (lambda m: m["files"].append({"path": "encoder/gone.bin", "sha256": "", "size": 1}), "gone.bin.*missing"),
        (lambda m: m["files"].append({"path": "/etc/passwd", "sha256": "", "size": 1}), "inside the bundle"),
        (lambda m: m["files"].append({"path": "encoder/../../x", "sha256": "", "size": 1}), "inside the bundle"),
        (lambda m: m["files"].append({"path": "encoder/config.json"}), "sha256"),
        (lambda m: m["files"].append("encoder/config.json"), "inside the bundle"),
        (lambda m: m.update(files={}), "files"),
    ],
)
def test_a_wrong_manifest_is_one_sentence(toy: Path, change, words: str) -> None:
    rewrite(toy, change)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(toy)
    assert "\n" not in str(caught.value)


def test_no_bundle_bad_json_and_no_object_are_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        Bundle.open(tmp_path / "nowhere")
    (tmp_path / "bundle.json").write_text('{"format": 1,')
    with pytest.raises(BundleError, match=r"not JSON \(line 1"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_text("[]")
    with pytest.raises(BundleError, match="object"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path)


def test_a_missing_part_names_those_present(toy: Path) -> None:
    with pytest.raises(BundleError, match=r"no part 'prior' \(it has: encoder, generator, library, sae\)"):
        Bundle.open(toy).part("prior")
    with pytest.raises(BundleError, match="no part 'sae'"):
        Bundle.none().part("sae")


def test_an_empty_part_cannot_be_sealed(toy: Path) -> None:
    with pytest.raises(BundleError, match=r"'prior'.*no files"):
        seal(toy, {**MANIFEST, "parts": {"prior": {}}})

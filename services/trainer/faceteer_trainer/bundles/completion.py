"""Completes a pulled bundle: the SAE in its serving layout, negative embeds, an unlabelled library, the seal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_encoder.model import load_encoder
from faceteer_library.writer import FeatureRow, LibraryWriter
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle
from faceteer_sae.weights import CONFIG, WEIGHTS, load_config, write_weights
from safetensors.torch import save_file

from faceteer_trainer.bundles.manifest import Recipe
from faceteer_trainer.bundles.sources import Published, link_or_copy
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import writing
from faceteer_trainer.formats import published as published_format

_PUBLISHED_SAE = Path("sources") / "sparse_autoencoder_128.pth"


def complete(out: Path, recipe: Recipe, published: dict[str, Published]) -> Path:
    """Makes everything that is served in another form than it was pulled; finished steps are skipped.

    Raises:
        BundleError: what was pulled does not make a bundle, in the words of the part that says so.
        JobError: it cannot be written.
    """
    with writing(out):
        if (out / _PUBLISHED_SAE).is_file():
            _import_sae(out / _PUBLISHED_SAE, out / "sae")
        if (out / "generator").is_dir() and not (out / "generator" / "negative_embeds.safetensors").is_file():
            _write_negative(out)
        if "library" in recipe.parts and not (out / "library" / "library.sqlite").is_file():
            _write_empty_library(out, _manifest(out, recipe, published, ("encoder", "sae")))
        bundle_format.seal(out, _manifest(out, recipe, published, tuple(recipe.parts)))
        Bundle.open(out)
    return out


def _manifest(out: Path, recipe: Recipe, published: dict[str, Published], parts: tuple[str, ...]) -> dict[str, Any]:
    present = {name: facts for name, facts in recipe.parts.items() if name in parts and (out / name).is_dir()}
    pulled = [
        {
            "path": wanted.path,
            "part": wanted.part,
            "source": {"repo": wanted.repo, "file": wanted.file, "revision": published[wanted.path].revision},
            "sha256": wanted.sha256 or published[wanted.path].sha256,
            "size": published[wanted.path].size,
        }
        for wanted in recipe.files
    ]
    files = [{**entry, "sha256": entry["sha256"] or "", "size": entry["size"] or 0} for entry in pulled]
    return {
        "name": recipe.name,
        "description": recipe.description,
        "parts": present,
        "licences": recipe.licences,
        "files": files,
        "pulled": pulled,
    }


def _import_sae(source: Path, directory: Path) -> None:
    """The published state dict, whose digest the pull has checked, in its serving form."""
    if not (directory / "cfg.json").is_file():
        sae = published_format.read(source, any_checksum=True)
        write_weights(directory, replace(sae, metadata={"source": published_format.SOURCE}))


def _write_negative(out: Path) -> None:
    """The embeds of a grey picture: of pixels that are zero after preprocessing (Kandinsky 2.2's own negative)."""
    encoder, preprocessor = load_encoder(out / "encoder", dtype="bfloat16" if _is_large(out) else "float32")
    with torch.inference_mode():
        visual = encoder.visual
        dtype = next(visual.parameters()).dtype
        embeds = visual(torch.zeros(1, 3, *preprocessor.size, dtype=dtype)).float()
    save_file({"negative_image_embeds": embeds}, out / "generator" / "negative_embeds.safetensors")


def _is_large(out: Path) -> bool:
    """Whether the encoder in float32 is more than most machines have to spare."""
    return sum(file.stat().st_size for file in (out / "encoder").rglob("*.safetensors")) > 2_000_000_000


def _write_empty_library(out: Path, manifest: dict[str, Any]) -> None:
    """A library in which no feature has a label yet, so that every call is served; build-library fills it."""
    bundle_format.seal(out, manifest)
    bundle = Bundle.open(out)
    config = load_config(bundle.part("sae").path)
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)
    path = out / "library" / "library.sqlite"
    path.parent.mkdir(exist_ok=True)
    with LibraryWriter(
        path,
        sae_revision=bundle.part("sae").revision,
        corpus="none yet",
        n_pictures=0,
        encoder_revision=bundle.part("encoder").revision,
        embed_dim=config.d_in,
    ) as writer:
        for index in range(config.d_sae):
            writer.feature(FeatureRow(index, "", 0.0, 0.0, 0.0, 0.0, 0.0, *nothing))


def with_sae(bundle_directory: Path, sae_directory: Path, out: Path) -> Path:
    """Another bundle with another SAE: the models are shared where the file system can, the library starts empty.

    Raises:
        BundleError: no bundle, or no SAE.
        JobError: an SAE of another encoder, or ``out`` is there already.
    """
    if out.exists():
        raise JobError(f"{out}: is there already; choose another --out")
    bundle, config = Bundle.open(bundle_directory), load_config(sae_directory)
    trained_on, encoder = config.metadata.get("encoder_revision"), bundle.part("encoder")
    if trained_on not in (None, encoder.revision) or config.d_in != encoder.facts.get("embed_dim", config.d_in):
        raise JobError(
            f"{sae_directory}: an SAE of encoder {trained_on or '?'} with {config.d_in} values, but {bundle_directory} "
            f"has encoder {encoder.revision} with {encoder.facts.get('embed_dim')}; train it on that one's embeddings"
        )
    manifest = json.loads((bundle_directory / bundle_format.MANIFEST).read_text(encoding="utf-8"))
    draft = out.with_name(f".{out.name}.part")
    with writing(out):
        shutil.rmtree(draft, ignore_errors=True)
        for part in manifest["parts"]:
            if part not in ("sae", "library"):
                shutil.copytree(bundle_directory / part, draft / part, copy_function=link_or_copy)
        (draft / "sae").mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, "feature_statistics.safetensors"):
            if (sae_directory / name).is_file():
                shutil.copyfile(sae_directory / name, draft / "sae" / name)
        parts = {**manifest["parts"], "sae": {"kind": "sae"}, "library": {"kind": "sqlite"}}
        own = {**manifest, "files": [], "parts": {name: facts for name, facts in parts.items() if name != "library"}}
        own.pop("pulled", None)
        _write_empty_library(draft, own)
        bundle_format.seal(draft, {**own, "parts": parts})
        Bundle.open(draft)
        draft.replace(out)
    return out


def describe(directory: Path) -> dict[str, Any]:
    """What a bundle is made of, for people and for JSON: parts with revision, size, parameters, licence.

    Raises:
        BundleError: no bundle.
    """
    bundle = Bundle.open(directory)
    manifest = json.loads((directory / bundle_format.MANIFEST).read_text(encoding="utf-8"))
    parts = {}
    for name, part in bundle.parts.items():
        files = [file for file in part.path.rglob("*") if file.is_file()]
        parts[name] = {
            "kind": part.facts.get("kind", ""),
            "revision": part.revision,
            "bytes": sum(file.stat().st_size for file in files),
            "parameters": sum(_parameters(file) for file in files if file.suffix == ".safetensors"),
            "licence": manifest.get("licences", {}).get(name, ""),
            "facts": {key: value for key, value in part.facts.items() if key not in ("kind", "revision")},
        }
    return {"name": bundle.name, "description": bundle.description, "directory": str(directory), "parts": parts}


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, by its header; a model's weights without reading them."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__" and entry["shape"]
    )

"""Gives a bundle's SAE what edits go by: firing shares, the unit SCALED, rivals, and what embeddings look like.

Prepared beside the bundle and put in place together with the library, which names the SAE's new revision. Knows the two
parts' files and nothing of how the numbers were found.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle
from safetensors.torch import save_file

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.library.build import BuildSettings, Measured
from faceteer_trainer.library.related import rivals

STATISTICS, CARD = "feature_statistics.safetensors", "cfg.json"
_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def stage_sae(
    bundle: Bundle, staging: Path, corpus: EmbeddingCorpus, measured: Measured, settings: BuildSettings
) -> str:
    """Writes the bundle's SAE with new statistics into ``staging``/sae; returns the revision that it will have."""
    shutil.rmtree(staging, ignore_errors=True)
    directory = staging / "sae"
    shutil.copytree(bundle.part("sae").path, directory, copy_function=_linked)
    _write_statistics(directory / STATISTICS, corpus, measured, settings)
    _write_card(directory / CARD, corpus, measured)
    bundle_format.seal(staging, {"name": bundle.name, "parts": {"sae": {}}})
    return Bundle.open(staging).part("sae").revision


def put_in_place(bundle: Bundle, staging: Path | None, library: Path) -> None:
    """Moves statistics, if there are new ones, and library into the bundle, and seals it."""
    for name in (STATISTICS, CARD) if staging is not None else ():
        (staging / "sae" / name).replace(bundle.part("sae").path / name)
    (bundle.directory / "library").mkdir(exist_ok=True)
    library.replace(bundle.directory / "library" / "library.sqlite")
    manifest = json.loads((bundle.directory / bundle_format.MANIFEST).read_text(encoding="utf-8"))
    manifest["parts"].setdefault("library", {"kind": "sqlite"})
    bundle_format.seal(bundle.directory, manifest)


def _linked(source: str, target: str) -> None:
    """The weights are not copied; what is written anew is, so that the bundle's own file stays as it is."""
    if Path(source).name in (STATISTICS, CARD):
        shutil.copyfile(source, target)
        return
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _write_statistics(path: Path, corpus: EmbeddingCorpus, measured: Measured, settings: BuildSettings) -> None:
    found = rivals(measured.strong, measured.strong_count, measured.pictures, settings.rule)
    counts = np.zeros(len(measured.p99), np.int64)
    for feature, others in found.items():
        counts[feature] = len(others)
    indices = [other for feature in sorted(found) for other in sorted(other for other, _ in found[feature])]
    save_file(
        {
            "firing_share": torch.from_numpy(measured.firing_share),
            "p99": torch.from_numpy(measured.p99),
            "rivals_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
            "rivals_indices": torch.tensor(indices, dtype=torch.int32),
            "embedding_mean": torch.from_numpy(_sample(corpus).mean(0)),
        },
        path,
    )


def _write_card(path: Path, corpus: EmbeddingCorpus, measured: Measured) -> None:
    card = json.loads(path.read_text(encoding="utf-8"))
    norms = np.linalg.norm(_sample(corpus), axis=1)
    card.setdefault("metadata", {})["embedding_statistics"] = {
        "norm": {name: float(np.quantile(norms, q)) for name, q in _QUANTILES.items()},
        "l0": {name: float(np.quantile(measured.l0, q)) for name, q in _QUANTILES.items()},
    }
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _sample(corpus: EmbeddingCorpus) -> npt.NDArray[np.float32]:
    return corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 20_000)).astype(np.int64)))

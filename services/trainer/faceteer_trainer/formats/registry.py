"""Every published format by its name: one reader and one writer each."""

from __future__ import annotations

from pathlib import Path

from faceteer_sae.weights import SaeWeights

from faceteer_trainer.formats import dictionary_learning, published, saelens, sparsify

WRITERS = {
    "published": published.write,
    "saelens": saelens.write,
    "dictionary-learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}
FORMATS = tuple(WRITERS)


def read(format: str, path: Path, *, any_checksum: bool = False, activation_scale: float | None = None) -> SaeWeights:
    """An SAE in one of :data:`FORMATS`. Raises JobError."""
    if format == "published":
        return published.read(path, any_checksum=any_checksum)
    if format == "saelens":
        return saelens.read(path, activation_scale=activation_scale)
    return dictionary_learning.read(path) if format == "dictionary-learning" else sparsify.read(path)

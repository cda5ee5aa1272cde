"""A bundle's SAE (docs/bundles.md), read and written for a job: what goes wrong is a JobError."""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.bundle import BundleError
from faceteer_sae.weights import SaeWeights, read_weights, write_weights

from faceteer_trainer.errors import JobError

# From this many features on an int8 copy of the encoder, for screening, makes a difference.
_SCREEN_FROM = 16_384


def read(directory: Path) -> SaeWeights:
    """The SAE in a bundle's sae/ or in a folder that train-sae wrote."""
    try:
        return read_weights(directory)
    except BundleError as error:
        raise JobError(str(error)) from None


def write(sae: SaeWeights, directory: Path, dtype: str = "float16") -> Path:
    """Writes it for serving; an int8 copy of the encoder comes along where it is large enough to matter."""
    try:
        write_weights(directory, sae, dtype, screen=sae.d_sae >= _SCREEN_FROM)
    except ValueError as error:
        raise JobError(f"{directory}: {error}") from None
    except OSError as error:
        raise JobError(f"{directory}: cannot be written ({error.strerror})") from None
    return directory

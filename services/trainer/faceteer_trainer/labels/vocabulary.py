"""The words a feature may be called by, and their directions in CLIP's text space.

Knows nothing of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_encoder.model import ClipEncoder

from faceteer_trainer.errors import JobError

Floats = npt.NDArray[np.float32]
DEFAULT = "general"
_BATCH = 64
# Each text is said in these ways, and the embeddings averaged: what is left is what they have in common.
PROMPTS = ("{}", "a picture of {}", "a picture with {}")


class TextSpace:
    """Texts as directions that pictures can be compared with: centred on what all terms have in common, of norm 1."""

    def __init__(self, encoder: ClipEncoder, terms: Sequence[str]) -> None:
        """terms: whose mean says "this is a text" and nothing else; it is taken off every text.

        Raises:
            JobError: the bundle's encoder has no text tower.
        """
        self._encoder = encoder
        self.terms = tuple(terms)
        raw = self._unit(self.terms)
        self._mean = raw.mean(0)
        self.directions = self._centred(raw)

    def of(self, texts: Sequence[str]) -> Floats:
        """Directions of any texts, float32 [t, d]."""
        return self._centred(self._unit(texts))

    def raw(self, texts: Sequence[str]) -> Floats:
        """Text embeddings as the encoder service gives them, float32 [t, d]."""
        return embed_texts(self._encoder, texts)

    def _unit(self, texts: Sequence[str]) -> Floats:
        said = embed_texts(self._encoder, [prompt.format(text) for text in texts for prompt in PROMPTS])
        said /= np.maximum(np.linalg.norm(said, axis=1, keepdims=True), 1e-12)
        return np.asarray(said.reshape(len(texts), len(PROMPTS), -1).mean(1))

    def _centred(self, unit: Floats) -> Floats:
        centred = unit - self._mean
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12), np.float32)


def read_terms(source: str) -> tuple[str, ...]:
    """The terms of a file, or of one of those that come along ("general", "postcards"): one a line, # begins a comment.

    Raises:
        JobError: no such file, or nothing in it.
    """
    shipped = files(__package__).joinpath("vocabularies", f"{source}.txt")
    path = shipped if shipped.is_file() else Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--vocabulary {source}: not a text file that can be read ({type(error).__name__})") from None
    terms = tuple(dict.fromkeys(term for line in lines if (term := line.partition("#")[0].strip())))
    if not terms:
        raise JobError(f"--vocabulary {source}: holds no terms; put one on each line")
    long = next((term for term in terms if len(term) > 120), None)
    if long is not None:
        raise JobError(f"--vocabulary {source}: {long[:40]!r}... is longer than the 120 characters a label may have")
    return terms


def embed_texts(encoder: ClipEncoder, texts: Sequence[str]) -> Floats:
    """Raw text embeddings, float32 [t, d].

    Raises:
        JobError: the bundle's encoder has no text tower.
    """
    if not encoder.has_text_tower:
        raise JobError("the bundle's encoder has no text tower, so words cannot be compared with pictures")
    found = [encoder.encode_texts(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    return np.array([row for part in found for row in part], np.float32)

"""The words a feature may be called by, and their directions in CLIP's text space."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_encoder.model import ClipEncoder

from faceteer_trainer.errors import JobError

Floats = npt.NDArray[np.float32]
DEFAULT, CAPTIONS = "general", "captions"
_COMMON = (
    "the and with for from that this these those there their its his her our your are was were been being has have had "
    "not but into onto over under near some any all each other very just also than then while where which who whom "
    "what when how out off about without after before during while upon picture photo photograph image drawing"
)
_NO_NAMES = frozenset(_COMMON.split())
_BATCH = 64
# Each text is embedded in these phrases and averaged: what remains is what they have in common.
PROMPTS = ("{}", "a picture of {}", "a picture with {}")


class TextSpace:
    """Texts as directions that pictures can be compared with: centred on what all terms have in common, of norm 1."""

    def __init__(self, encoder: ClipEncoder, terms: Sequence[str], mean: Floats | None = None) -> None:
        """A space of terms, or of none and the mean of others.

        Args:
            encoder: with a text tower.
            terms: whose mean says "this is a text" and nothing else; it is subtracted from every text.
            mean: subtracted instead, float32 [d]; then terms may be empty.

        Raises:
            JobError: the bundle's encoder has no text tower.
        """
        self._encoder = encoder
        self.terms = tuple(terms)
        raw = self._unit(self.terms)
        self.mean: Floats = raw.mean(0) if mean is None else mean
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
        return np.asarray(said.reshape(len(texts), len(PROMPTS), said.shape[-1]).mean(1))

    def _centred(self, unit: Floats) -> Floats:
        centred = unit - self.mean
        return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12), np.float32)


def read_terms(source: str) -> tuple[str, ...]:
    """The terms of a file: one a line, # begins a comment; or of one of those that come along.

    Args:
        source: a path, "general", "composed" or "postcards"; several with commas between them.

    Raises:
        JobError: no such file, or nothing in it.
    """
    return tuple(dict.fromkeys(term for part in source.split(",") for term in _read(part.strip())))


def _read(source: str) -> tuple[str, ...]:
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
    return np.array([row for part in found for row in part], np.float32).reshape(len(texts), encoder.embed_dim)


def caption_terms(captions: Sequence[str]) -> tuple[str, ...]:
    """The words that captions use, and pairs of neighbours that belong together: the corpus' own vocabulary.

    Those in at least three captions and a thousandth of them, the commonest first, 4,000 at most; no word too short or
    too common to name anything. A pair belongs together if it makes up a fifth of its rarer word.

    Raises:
        JobError: there are no captions, or no word is used often enough.
    """
    least, counts = max(3, len(captions) // 1000), Counter[str]()
    for caption in captions:
        words = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", caption.casefold())
        plain = [word for word in words if _names(word)]
        pairs = [f"{one} {two}" for one, two in pairwise(words) if _names(one) and _names(two)]
        counts.update({*plain, *pairs})
    terms = tuple(
        term
        for term, count in counts.most_common()
        if count >= least and len(term) <= 120 and count >= min(counts[word] for word in term.split()) / 5
    )[:4000]
    if not terms:
        raise JobError("--vocabulary captions: the corpus holds no captions that share words; name a file, or general")
    return terms


def _names(word: str) -> bool:
    return len(word) > 2 and word not in _NO_NAMES

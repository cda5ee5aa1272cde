"""Captions of postcards, which name any number of a scene's factors, and the vocabulary to tokenise them.

A caption comes with what it claims, so it is known for every picture whether the caption is true of it.
"""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from open_clip.tokenizer import bytes_to_unicode

from faceteer_postcards.world import FACTOR_NAMES, FACTORS, VALUES

CONTEXT_LENGTH: Final = 32
UNNAMED: Final = -1

_PHRASES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "time": {
        "dawn": ("at dawn", "at sunrise", "early in the morning"),
        "day": ("by day", "at noon", "in daylight"),
        "dusk": ("at dusk", "at sunset", "in the evening"),
        "night": ("at night", "in moonlight", "at midnight"),
    },
    "ground": {
        "grass": ("on grass", "in a meadow", "on a green lawn"),
        "sand": ("on sand", "on a beach", "in the desert"),
        "snow": ("on snow", "on snowy ground", "in a snowfield"),
        "water": ("on water", "at sea", "on a lake"),
    },
    "weather": {
        "clear": ("in clear weather", "under a clear sky", "in fair weather"),
        "rain": ("in the rain", "while it rains", "in a rain shower"),
        "snowfall": ("in a snowfall", "while flakes fall", "with snowflakes falling"),
        "fog": ("in fog", "in thick mist", "in foggy weather"),
    },
    "border": {
        "none": ("without a border", "unframed", "with no frame"),
        "white": ("with a white border", "in a white frame", "framed in white"),
        "black": ("with a black border", "in a black frame", "framed in black"),
    },
    "style": {
        "plain": ("plainly drawn", "in plain style", "in a simple style"),
        "outlined": ("outlined in ink", "with thick outlines", "in outlined style"),
        "pixelated": ("in pixel style", "pixelated", "as pixel art"),
        "striped": ("with stripes", "striped by dark lines", "in striped style"),
    },
}
_PLURALS: Final = {"boat": "boats", "cat": "cats", "car": "cars", "house": "houses", "tree": "trees",
                   "balloon": "balloons", "flower": "flowers", "ball": "balls"}  # fmt: skip
_OPENINGS: Final = ("", "a picture of ", "a postcard of ", "a drawing of ")


class Caption(NamedTuple):
    """A caption and what it claims."""

    text: str
    claims: npt.NDArray[np.int8]  # [8]: a value's index for each factor it names, UNNAMED for the others


def _noun(claims: npt.NDArray[np.int8], rng: np.random.Generator) -> str:
    """The words for count, colour and subject."""
    named = {name: FACTORS[name][claims[i]] for i, name in enumerate(FACTOR_NAMES) if claims[i] != UNNAMED}
    count, colour, subject = named.get("count"), named.get("colour"), named.get("subject")
    many = count in ("two", "three")
    if subject is None:
        if count is None and colour is None:
            return "something" if rng.random() < 0.5 else "a scene"
        thing = "things" if many else "thing"
    else:
        thing = _PLURALS[subject] if many or (count is None and rng.random() < 0.3) else subject
    words = [word for word in (colour, thing) if word]
    if many:
        words.insert(0, str(count))
    elif count == "one":
        words.insert(0, ("one", "a single", "just one")[rng.integers(3)])
    elif not thing.endswith("s"):
        words.insert(0, "some" if thing == "thing" else "an" if words[0] == "orange" else "a")
    return " ".join(words)


def caption(claims: npt.NDArray[np.int8], rng: np.random.Generator) -> Caption:
    """Words for `claims` [8], from one of several templates."""
    phrases = []
    for index, name in enumerate(FACTOR_NAMES):
        if name in _PHRASES and claims[index] != UNNAMED:
            options = _PHRASES[name][FACTORS[name][claims[index]]]
            phrases.append(options[rng.integers(len(options))])
    rng.shuffle(phrases)
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    nouns = claims[[FACTOR_NAMES.index(name) for name in ("subject", "colour", "count")]]
    if len(phrases) == 1 and (nouns == UNNAMED).all() and rng.random() < 0.4:
        return Caption(phrases[0], claims)
    return Caption(" ".join((opening + _noun(claims, rng), *phrases)), claims)


def claims_of(codes: npt.NDArray[np.uint8], named: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """What a caption of a scene claims that names only the factors in `named` [8]."""
    return np.where(named, codes.astype(np.int8), np.int8(UNNAMED)).astype(np.int8)


def describe(codes: npt.NDArray[np.uint8], rng: np.random.Generator, least: int = 8) -> Caption:
    """A caption of a scene's factors that names between `least` and all eight of them, chosen at random."""
    wanted = int(rng.integers(least, len(FACTOR_NAMES) + 1))
    named = np.zeros(len(FACTOR_NAMES), bool)
    named[rng.permutation(len(FACTOR_NAMES))[:wanted]] = True
    return caption(claims_of(codes, named), rng)


def value_claims() -> npt.NDArray[np.int8]:
    """The claims of captions that name one value each, in the order of `VALUES`: [38, 8]."""
    claims = np.full((len(VALUES), len(FACTOR_NAMES)), UNNAMED, np.int8)
    for row, (name, value) in enumerate(VALUES):
        claims[row, FACTOR_NAMES.index(name)] = FACTORS[name].index(value)
    return claims


def is_true(claims: npt.NDArray[np.int8], codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which captions [t, 8] are true of which scenes [n, 8]: bool [n, t]."""
    matches = (claims[None] == codes.astype(np.int8)[:, None]) | (claims[None] == UNNAMED)
    return np.asarray(matches.all(-1))


def word_counts(samples: int = 4000, seed: int = 0) -> Counter[str]:
    """How often each word turns up in captions."""
    rng = np.random.default_rng(seed)
    sizes = [len(values) for values in FACTORS.values()]
    words: Counter[str] = Counter()
    for _ in range(samples):
        codes = np.array([rng.integers(size) for size in sizes], np.uint8)
        words.update(describe(codes, rng, least=1).text.split())
    return words


def byte_pair_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every one of these words is a single token."""
    mapping = bytes_to_unicode()
    pieces = {}
    for word in sorted(words):
        letters = [mapping[byte] for byte in word.encode()]
        pieces[word] = [*letters[:-1], letters[-1] + "</w>"]
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            pieces[word] = joined


def write_vocabulary(path: Path) -> int:
    """Write the merges as open_clip.SimpleTokenizer reads them; returns the vocabulary's size.

    Its vocabulary is 256 bytes, 256 word-final bytes, the merges, and the start and end tokens last, so that the
    text tower's argmax over ids finds the end token. No newline ends the file: it would count as a merge.
    """
    merges = byte_pair_merges(word_counts())
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("\n".join(lines).encode())
    return 512 + len(merges) + 2

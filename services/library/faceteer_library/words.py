"""Words as they are compared: folded, split, and in the forms that mean the same (rainy, raining, rains: rain).

English inflection by rule, with the exceptions that pictures' words need. Other languages' words are left as they are.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


_VOWELS = frozenset("aeiouy")
_IRREGULAR = {
    "mice": "mouse", "geese": "goose", "children": "child", "men": "man", "women": "woman", "feet": "foot",
    "teeth": "tooth", "oxen": "ox", "cacti": "cactus", "fungi": "fungus",
    **{f"{stem}ves": f"{stem}{end}" for stem, end in (
        ("lea", "f"), ("wol", "f"), ("kni", "fe"), ("shel", "f"), ("cal", "f"), ("scar", "f"), ("hal", "f"),
        ("loa", "f"), ("li", "fe"), ("el", "f"), ("hoo", "f"))},
}  # fmt: skip
# Words that only look like a plural, or like another word with -y, -ing or -ed.
_NO_PLURAL = _listed("glass grass dress cross moss class brass bus gas lens canvas octopus cactus christmas")
_NO_FORM = _listed(
    """army body bunny busy candy city copy country county daily duty fairy ferry honey lady navy party penny pony
    puppy ruby story study tiny ugly very many any lorry berry cherry daisy lily poppy belly jelly jockey
    being ceiling during evening king morning nothing ring something spring string thing wedding wing
    bed hundred naked red sacred seed shed speed steed weed breed"""
)
_NEGATIONS = _listed("no not non without never nor neither except minus lacking isnt arent isn aren nothing")
# Words around a name that name nothing themselves.
_BEFORE = _listed("a an the some in at on by with of during it is its there this that these those my your")
_AFTER = _listed(
    """color colour colors colours colored coloured scene picture image photo photograph background style weather
    conditions time"""
)
_MOST_KEYS = 24


def fold(text: str) -> str:
    """A text as it is compared."""
    return unicodedata.normalize("NFC", text).strip().casefold()


def split(text: str) -> tuple[str, ...]:
    """The folded words of a text; accents do not count."""
    plain = "".join(c for c in unicodedata.normalize("NFD", fold(text)) if unicodedata.category(c) != "Mn")
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFC", plain).replace("'", "")))


def is_negated(words: Sequence[str]) -> bool:
    """Whether words say that something is not there: "not red", "no snow", "cloud free", "snowless"."""
    if len(words) > 1 and (_NEGATIONS & set(words) or words[-1] == "free"):
        return True
    return any(len(word) > 6 and word.endswith("less") for word in words)


def essential(words: Sequence[str]) -> tuple[str, ...]:
    """Words without those around a name: "the red color" is "red", "in a forest" is "forest"."""
    start, end = 0, len(words)
    while start < end - 1 and words[start] in _BEFORE:
        start += 1
    while end > start + 1 and words[end - 1] in _AFTER:
        end -= 1
    return tuple(words[start:end])


def keys(words: Sequence[str], *, inflected: bool = True) -> Iterator[tuple[str, ...]]:
    """Under which keys words are kept and looked up: every combination of their forms, themselves first.

    Args:
        words: folded.
        inflected: also what a word with -y, -ing, -ed or -ish comes from, instead of singulars alone.
    """
    return itertools.islice(itertools.product(*map(forms if inflected else _numbers, words)), _MOST_KEYS)


@lru_cache(maxsize=1 << 16)
def forms(word: str) -> tuple[str, ...]:
    """A word, and what it is a form of: stars -> star; snowy, snowing -> snow; striped -> stripe; reddish -> red."""
    singular = _singular(word)
    found = dict.fromkeys((word, singular))
    if singular not in _NO_FORM and singular.isascii():
        for suffix in ("y", "ing", "ed", "ish"):
            if singular.endswith(suffix):
                found |= dict.fromkeys(_bases(singular[: -len(suffix)], suffix))
    return tuple(found)


def _numbers(word: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((word, _singular(word))))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")) or word in _NO_PLURAL:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2]
    return word[:-1]


def _bases(stem: str, suffix: str) -> Iterator[str]:
    """What a stem with a suffix may come from. English doubles the last consonant of a short word (running), so a
    stem like "car" before -ing comes from "care"."""
    if len(stem) < (2 if suffix == "y" else 3) or not _VOWELS & set(stem):
        return
    last, before = stem[-1], stem[-2]
    if last == before and last not in _VOWELS:
        # Both: foggy comes from fog, grassy from grass.
        yield stem[:-1]
        yield stem
    elif last not in _VOWELS and last not in "wx" and before in _VOWELS and (len(stem) < 3 or stem[-3] not in _VOWELS):
        yield stem + "e"
        if len(stem) > 4:
            yield stem
    else:
        yield stem
        if last not in _VOWELS:
            yield stem + "e"

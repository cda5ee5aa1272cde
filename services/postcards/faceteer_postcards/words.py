"""What people call each factor value: the word they edit by, and others that mean the same."""

from __future__ import annotations

from typing import Final

from faceteer_postcards.world import VALUES

_OTHERS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("time", "dawn"): ("dawn", "sunrise"),
    ("time", "day"): ("day", "noon", "daylight"),
    ("time", "dusk"): ("dusk", "sunset", "evening"),
    ("time", "night"): ("night", "midnight", "moonlight"),
    ("ground", "grass"): ("grass", "meadow"),
    ("ground", "sand"): ("sand", "beach", "desert"),
    ("ground", "snow"): ("snow", "snowfield"),
    ("ground", "water"): ("water", "sea", "lake"),
    ("weather", "clear"): ("clear sky", "fair weather"),
    ("weather", "rain"): ("rain", "rain shower"),
    ("weather", "snowfall"): ("snowfall", "snowflakes"),
    ("weather", "fog"): ("fog", "mist"),
    ("border", "none"): ("unframed", "no border"),
    ("border", "white"): ("white border", "white frame"),
    ("border", "black"): ("black border", "black frame"),
    ("style", "plain"): ("plain", "simple"),
    ("style", "outlined"): ("outlined", "ink"),
    ("style", "pixelated"): ("pixelated", "pixel art"),
    ("style", "striped"): ("striped", "stripes"),
}
# The first of each is what one would type.
WORDS: Final[dict[tuple[str, str], tuple[str, ...]]] = {value: _OTHERS.get(value, (value[1],)) for value in VALUES}
# Every word that labels are chosen from (the vocabulary "postcards"), and the value it names.
MEANT: Final[dict[str, tuple[str, str]]] = {word: value for value, words in WORDS.items() for word in words}

"""What the commands' words mean: edits, features, output files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import faceteer

# What an option does to a feature that is named without a value; the SDK has the same defaults.
_DEFAULTS = {"set": 1.0, "switch": 1.0}
_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}


def feature_key(word: str) -> int | str:
    """A feature as it is typed: 412 and #412 are indices, everything else is a label."""
    return int(word.lstrip("#")) if re.fullmatch(r"#?\d+", word.strip()) else word


def edits_of(words: Mapping[str, Iterable[str]], unit: str) -> list[faceteer.FeatureEdit]:
    """FeatureEdits of ``--switch night --set fog=0.5`` and the like, by operation. Raises InvalidArgumentError."""
    edits = []
    for option, each in words.items():
        for word in each:
            name, value = (word, 0.0) if option == "ablate" else _assignment(option, word)
            edits.append(_edit(option, name, value, "scaled" if option in ("scale", "ablate") else unit))
    return edits


def output_format(path: Path) -> str:
    """Pillow's format for an output file; checked before any work is done. Raises InvalidArgumentError."""
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        ending = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise invalid(f"{path} has {ending}; end it with .png, .webp or .jpg", "output")
    check_writable(path)
    return format


def check_page(path: Path | None) -> None:
    """Raises InvalidArgumentError unless a page can be written to ``path``, which may be None."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise invalid(f"{path} does not name a page; end it with .html", "save-html")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raises InvalidArgumentError unless a file can be written to ``path``."""
    if path.is_dir():
        raise invalid(f"{path} is a directory; name a file in it", "output")
    if not path.parent.is_dir():
        raise invalid(f"{path.parent} is not a directory; create it first", "output")


def size_of(word: str | None) -> int | tuple[int, int] | None:
    """512 or 512x384 in pixels. Raises InvalidArgumentError."""
    if word is None:
        return None
    if match := re.fullmatch(r"(\d+)(?:[xX×](\d+))?", word.strip()):
        width, height = match.group(1), match.group(2)
        return (int(width), int(height)) if height else int(width)
    raise invalid(f"--size {word!r} is neither a number of pixels nor WIDTHxHEIGHT", "size")


def _assignment(option: str, word: str) -> tuple[str, float]:
    name, separator, value = word.rpartition("=")
    if not separator and word.strip() and option in _DEFAULTS:
        return word, _DEFAULTS[option]
    if not separator or not name.strip():
        raise invalid(f"--{option} {word!r} names no value; write --{option} '{word.strip('=')}=1.0'", option)
    try:
        return name, float(value)
    except ValueError:
        raise invalid(f"--{option} {word!r}: {value!r} is not a number", option) from None


def _edit(option: str, name: str, value: float, unit: str) -> faceteer.FeatureEdit:
    try:
        return faceteer.FeatureEdit(feature_key(name), option, value, unit)  # type: ignore[arg-type]  # checked there
    except faceteer.InvalidArgumentError as error:
        raise invalid(f"--{option} {name!r}: {error.description}", option) from error


def invalid(description: str, field: str) -> faceteer.InvalidArgumentError:
    return faceteer.InvalidArgumentError(description, field=field, description=description)

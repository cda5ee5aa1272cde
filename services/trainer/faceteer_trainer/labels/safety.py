"""Which features the operator gates: a list of words for each class, looked for in labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from faceteer_trainer.errors import JobError


def read_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """{class: words} of a JSON file: {"violence": ["weapon", "blood"]}.

    Raises:
        JobError: not such a file.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): tuple(_words(words)) for name, words in given.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise JobError(
            f'--safety-classes {path}: must be JSON like {{"violence": ["weapon", "blood"]}} ({error})'
        ) from None


def safety_class(label: str, terms: Sequence[str], classes: Mapping[str, Sequence[str]]) -> str:
    """The first class one of whose words stands whole in the label or in another word for it; empty for none."""
    text = " / ".join([label, *terms]).casefold()
    for name, words in classes.items():
        if any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text) for word in words):
            return name
    return ""


def _words(words: object) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise TypeError("each class is a list of words")
    return words

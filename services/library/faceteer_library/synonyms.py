"""What general English calls the same: the table synonyms.txt, which says how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from faceteer_library import words as wording

_SAME, _NARROWER, _LATER = 0.95, 0.9, 0.002
"""What one step costs: to a word that means the same, to what a narrower word means, and for each word named before."""
_HOPS = 3


class _Step(NamedTuple):
    phrase: tuple[str, ...]
    fidelity: float
    same: bool


class Synonyms:
    """Words and what they mean.

    Args:
        lines: as in synonyms.txt.

    Raises:
        ValueError: a line that is neither a group nor a direction.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._steps: dict[tuple[str, ...], list[_Step]] = {}
        for line in lines:
            line = line.partition("#")[0].strip()
            if not line:
                continue
            left, arrow, right = line.partition(">")
            sources, targets = _phrases(left), _phrases(right) if arrow else _phrases(left)
            if not targets or (not arrow and len(sources) < 2):
                raise ValueError(f"a line names nothing that its words mean: {line!r}")
            for source in sources:
                steps = [
                    _Step(target, (_NARROWER if arrow else _SAME) - _LATER * min(at, 20), not arrow)
                    for at, target in enumerate(targets)
                    if target != source
                ]
                for key in wording.keys(source, inflected=False):
                    self._steps.setdefault(key, []).extend(steps)

    def of(self, words: tuple[str, ...]) -> dict[tuple[str, ...], float]:
        """Phrases that mean these words, or of which these are a narrower kind, with a fidelity below 1 each.

        At most three steps, and never from a group into another: words on the edge of two groups would else join them.
        """
        found: dict[tuple[str, ...], float] = {}
        front = [(words, 1.0, False)]
        for _ in range(_HOPS):
            reached: list[tuple[tuple[str, ...], float, bool]] = []
            for phrase, fidelity, was_same in front:
                for key in wording.keys(phrase):
                    for step in self._steps.get(key, ()):
                        so_far = fidelity * step.fidelity
                        if (was_same and step.same) or step.phrase == words or found.get(step.phrase, 0.0) >= so_far:
                            continue
                        found[step.phrase] = so_far
                        reached.append((step.phrase, so_far, step.same))
            front = reached
        return found


@cache
def general() -> Synonyms:
    """The table that comes with this package."""
    text = files("faceteer_library").joinpath("synonyms.txt").read_text(encoding="utf-8")
    return Synonyms(iter(text.splitlines()))


def _phrases(listed: str) -> list[tuple[str, ...]]:
    return [phrase for phrase in map(wording.split, listed.split(",")) if phrase]

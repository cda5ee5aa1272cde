"""What a name means: the one resolver for searches, edits, recipes and rules.

Words meet a library's texts (labels and other words) in five ways, each weaker than the one before; see :class:`Kind`.
Each way has a band of strengths, so that a feature's strength says how it was found. Among features found equally well
:mod:`faceteer_library.standing` decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from faceteer_library import standing, synonyms
from faceteer_library import words as wording
from faceteer_library.catalogue import Catalogue
from faceteer_library.semantic import SemanticIndex

_EXACT, _INFLECTED, _TERM = 1.0, 0.98, 0.05
"""A label that is the words; one that is another form of them; what another word is behind a label."""
_SYNONYM = 0.85
"""A synonym's strength is its fidelity (0.7 to 0.95) times this: below every other word."""
_MEANING, _PART = 0.75, 0.6
"""Of a meaning, times its cosine; of a text that holds the words, times their share of its letters."""
_WEAK = 0.1
"""The share of its score that a weak feature loses: more than lies between a label and another word, less than between
these and a synonym."""
_MOST_PHRASES = 64


class Kind(IntEnum):
    """How words found a feature; the numbers are the contract's MatchKind."""

    NONE = 0
    LABEL = 1
    OTHER_WORD = 2
    SYNONYM = 3
    MEANING = 4
    PART = 5


class Match(NamedTuple):
    """How words led to a feature.

    Attributes:
        words: as they were given; empty where a feature was named by index.
        kind: in which way.
        text: the label or other word that they met.
        strength: 0 to 1.
        sharing: how many features the caller sees with the feature's label.
        note: a sentence where the choice is not plain; else empty.
    """

    words: str = ""
    kind: Kind = Kind.NONE
    text: str = ""
    strength: float = 0.0
    sharing: int = 0
    note: str = ""


class Meeting(NamedTuple):
    """How words meet a catalogue's texts.

    Attributes:
        labels: float64 [texts], the strength of a feature whose label the text is; 0 where they do not meet.
        terms: float64 [texts], the same where the text is one of its other words.
        kinds: int8 [texts], of :class:`Kind`, LABEL for the words themselves.
    """

    labels: np.ndarray
    terms: np.ndarray
    kinds: np.ndarray


def meet(
    catalogue: Catalogue, words: str, query: np.ndarray | None, semantic: SemanticIndex | None, *, whole: bool = False
) -> Meeting:
    """All texts that words name, mean or are part of.

    Words that deny ("not red", "without snow") meet only texts that say so themselves ("no border").

    Args:
        catalogue: whose texts.
        words: the last one may be incomplete.
        query: float32 [d], the words' embedding; None for words alone.
        semantic: None where the library has no embeddings of labels.
        whole: leave out texts that only hold the words.
    """
    n = catalogue.n_texts
    meeting = Meeting(np.zeros(n), np.zeros(n), np.zeros(n, np.int8))
    _put(meeting, catalogue.gather(lambda texts: texts.same(words)), _EXACT, Kind.LABEL)
    given = wording.split(words)
    core = wording.essential(given)
    phrases = dict.fromkeys(phrase for phrase in (given, core) if phrase)
    for phrase in phrases:
        _name(catalogue, meeting, phrase, _INFLECTED, Kind.LABEL)
    for phrase in phrases:
        for other, fidelity in _rephrased(phrase).items():
            _name(catalogue, meeting, other, _SYNONYM * fidelity, Kind.SYNONYM)
    if not wording.is_negated(given):
        if given and query is not None and semantic is not None:
            numbers, cosines = semantic.closest(query)
            _put(meeting, numbers, _MEANING * np.clip(cosines, 0.0, 1.0), Kind.MEANING)
        if core and not whole:
            holding = catalogue.gather(lambda texts: texts.matching(" ".join(core)))
            share = np.minimum(1.0, sum(map(len, core)) / catalogue.letters[holding])
            _put(meeting, holding, _PART * share, Kind.PART)
    meeting.labels[0] = meeting.terms[0] = 0.0
    return meeting


def scores(catalogue: Catalogue, meeting: Meeting) -> np.ndarray:
    """Float64 [n], each feature's by its label or its best other word; 0 where nothing meets."""
    found: np.ndarray = meeting.labels[catalogue.labels]
    if len(catalogue.terms.numbers) and meeting.terms.any():
        found = np.maximum(found, _by_terms(catalogue, meeting.terms))
    found *= 1.0 - _WEAK * catalogue.weak
    return found


def match(catalogue: Catalogue, meeting: Meeting, words: str, place: int, sharing: int) -> Match:
    """How one feature was found."""
    label = int(catalogue.labels[place])
    best, strength, is_term = label, float(meeting.labels[label]), False
    for number in catalogue.own_terms(place):
        if meeting.terms[number] > strength:
            best, strength, is_term = int(number), float(meeting.terms[number]), True
    kind = Kind(int(meeting.kinds[best]))
    if kind == Kind.LABEL and is_term:
        kind = Kind.OTHER_WORD
    text = catalogue.text(best)
    return Match(words, kind, text, strength, sharing, _note(catalogue, words, kind, text, place, sharing))


def _note(catalogue: Catalogue, words: str, kind: Kind, text: str, place: int, sharing: int) -> str:
    index, label = int(catalogue.indices[place]), catalogue.text(int(catalogue.labels[place]))
    share = float(catalogue.figures["firing_share"][place])
    fires = f"fires on {100 * share:.3g} % of pictures"
    said = []
    if kind == Kind.OTHER_WORD:
        said.append(f'"{words}" is another word for "{label}"')
    elif kind == Kind.SYNONYM:
        said.append(f'"{words}" is taken to mean "{text}"' + (f', another word for "{label}"' if text != label else ""))
    elif kind == Kind.MEANING:
        said.append(f'no label is "{words}"; "{label}" is nearest in meaning')
    if sharing > 1 and kind != Kind.PART:
        said.append(f'{sharing} features are called "{label}"; #{index} is meant, which {fires}')
    elif said:
        said[-1] += f" (#{index})"
    if catalogue.weak[place] and kind != Kind.PART:
        causal = float(catalogue.figures["causal_score"][place])
        if share < standing.RARE:
            why = f"{fires}, so little is known about it"
        elif causal < standing.NOTHING:
            why = "was seen to cause something else than its label says"
        else:
            why = "is neither known to cause what its label says nor well predicted by it"
        said.append(f"#{index} {why}; there is no better feature of that name")
    return ". ".join(one[0].upper() + one[1:] for one in said) + "." if said else ""


def _name(catalogue: Catalogue, meeting: Meeting, phrase: tuple[str, ...], strength: float, kind: Kind) -> None:
    numbers = catalogue.gather(lambda texts: texts.named(phrase))
    if len(numbers):
        _put(meeting, numbers, strength, kind)


def _put(meeting: Meeting, numbers: np.ndarray, strength: float | np.ndarray, kind: Kind) -> None:
    """Texts found in one way; one that was found in a stronger way already stays so."""
    if not len(numbers):
        return
    strengths = np.broadcast_to(np.asarray(strength, np.float64), numbers.shape)
    better = strengths > meeting.labels[numbers]
    numbers, strengths = numbers[better], strengths[better]
    meeting.labels[numbers], meeting.kinds[numbers] = strengths, kind
    if kind != Kind.MEANING:
        # What another word lies near in meaning says too little about a feature.
        meeting.terms[numbers] = strengths * (1.0 - _TERM)


def _rephrased(phrase: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """Phrases that mean the whole, or the same with words replaced: "snowy woods" is "snow forest"."""
    table = synonyms.general()
    found = table.of(phrase)
    if 2 <= len(phrase) <= 4:
        choices: Iterable[list[tuple[tuple[str, ...], float]]] = (
            [((word,), 1.0), *table.of((word,)).items()] for word in phrase
        )
        for parts in itertools.islice(itertools.product(*choices), 1, _MOST_PHRASES * 4):
            other = tuple(itertools.chain.from_iterable(part for part, _ in parts))
            fidelity = float(np.prod([each for _, each in parts]))
            if found.get(other, 0.0) < fidelity:
                found[other] = fidelity
    return found


def _by_terms(catalogue: Catalogue, of_term: np.ndarray) -> np.ndarray:
    """The best strength among each feature's other words, float64 [n]; none where a person named the feature."""
    best = np.zeros(len(catalogue))
    described = catalogue.described
    texts = np.flatnonzero(of_term[: len(described.offsets) - 1])
    starts, ends = described.offsets[texts], described.offsets[texts + 1]
    counts = ends - starts
    # The places that all these texts describe, one after the other.
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places = described.numbers[np.repeat(starts, counts) + within]
    np.maximum.at(best, places, np.repeat(of_term[texts], counts))
    best[catalogue.renamed] = 0.0
    return best

"""Who may see features of a safety class: the operator's gated classes and access keys."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from faceteer_runtime.errors import NotPermitted

EVERY = "*"


@dataclass(frozen=True)
class Visibility:
    """Which safety classes one call sees.

    Attributes:
        hidden: the classes that it does not see; :data:`EVERY` for every class but those in ``shown``.
        shown: classes it sees although ``hidden`` holds them or is everything; :data:`EVERY` for all.
    """

    hidden: frozenset[str] = frozenset()
    shown: frozenset[str] = frozenset()

    def sees(self, safety_class: str) -> bool:
        """Whether features of this class are there for the call; those of no class always are."""
        if not safety_class or EVERY in self.shown or safety_class in self.shown:
            return True
        return EVERY not in self.hidden and safety_class not in self.hidden


EVERYTHING = Visibility()


class AccessPolicy:
    """The operator's rule.

    Args:
        classes: the safety classes that are gated; :data:`EVERY` for all.
        keys: the secrets that open them; without any, gated features are hidden from everybody.
    """

    def __init__(self, classes: Iterable[str] = (EVERY,), keys: Iterable[str] = ()) -> None:
        self._classes = frozenset(name for name in classes if name)
        self._keys = tuple(key.encode() for key in keys if key)

    def permits(self, key: str) -> bool:
        """Whether ``key`` is one of the operator's. Compares with every key, so that the time taken reveals nothing."""
        given = key.encode()
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return any(matches)

    def named(self, key: str) -> Visibility:
        """For a call about features that it names: with a key it sees them all."""
        return Visibility(self._classes, frozenset({EVERY}) if self.permits(key) else frozenset())

    def listed(self, key: str, included: Iterable[str]) -> Visibility:
        """For a list or search, which shows gated classes only where it names them.

        Raises:
            NotPermitted: it names a gated class without one of the operator's keys, whether or not the class occurs.
        """
        named = [name for name in included if name]
        closed = Visibility(self._classes)
        for name in named:
            gated = bool(self._classes) if name == EVERY else not closed.sees(name)
            if gated and not self.permits(key):
                raise NotPermitted(
                    f"filter.include_safety_classes: {name!r} is gated here; send one of the operator's keys as "
                    "x-faceteer-access, or leave it out",
                    field="filter.include_safety_classes",
                )
        return Visibility(self._classes, frozenset(named))

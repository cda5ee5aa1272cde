"""The outcome of each item of a batch: a value and what it cost, or the error that took its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from faceteer_runtime.errors import FaceteerError

R = TypeVar("R")


class Computed(NamedTuple, Generic[R]):
    """One item's value.

    Attributes:
        value: what the model made of the item.
        queue_us: microseconds that it waited for the model.
        compute_us: microseconds in the model of the batch that it was in.
        cached: whether it was known already, and no model ran.
    """

    value: R
    queue_us: int = 0
    compute_us: int = 0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Takes the place of a value in a batch's results."""

    error: BaseException


def attempt(function: Callable[..., R], *arguments: object) -> R | Failed:
    """What ``function`` returns, or the error of ours that it raises."""
    try:
        return function(*arguments)
    except FaceteerError as error:
        return Failed(error)


def required(outcome: R | Failed) -> R:
    """The value of an item without which the call as a whole fails: its error is raised."""
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome

"""What a call cost, and the ``Execution`` that reports it in the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self, TypeVar

from faceteer.v1 import execution_pb2

from faceteer_runtime.outcome import Computed, Failed
from faceteer_runtime.request import request_context

R = TypeVar("R")


class Cost(NamedTuple):
    """What a call cost. Its items wait and run side by side, so the longest counts.

    Attributes:
        cached: whether no model ran.
        queue_us, compute_us: of the item that waited, or was in the model, longest.
        cache_us: microseconds spent reading the cache.
    """

    cached: bool = False
    queue_us: int = 0
    compute_us: int = 0
    cache_us: int = 0

    @classmethod
    def of(cls, outcomes: Iterable[Computed[R] | Failed], cache_us: int) -> Self:
        """Of a call's items; one that failed counts as not cached."""
        cached, queue_us, compute_us = True, 0, 0
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                cached = False
                continue
            cached &= outcome.cached
            queue_us, compute_us = max(queue_us, outcome.queue_us), max(compute_us, outcome.compute_us)
        return cls(cached, queue_us, compute_us, cache_us)


def execution(
    revision: str, cached: bool = False, queue_us: int = 0, compute_us: int = 0, cache_us: int = 0
) -> execution_pb2.Execution:
    """What ran for this answer; times in microseconds. Takes the request id from the current request."""
    return execution_pb2.Execution(
        model_revision=revision,
        cached=cached,
        queue_us=int(queue_us),
        compute_us=int(compute_us),
        cache_us=int(cache_us),
        request_id=request_context().request_id,
    )

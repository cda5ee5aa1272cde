"""A model's results by content: from the cache where known, else computed once for all who wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.outcome import Computed, Failed
from faceteer_runtime.record import Record
from faceteer_runtime.single_flight import SingleFlight

R = TypeVar("R")


class Memo(Generic[R]):
    """Results of one kind.

    Args:
        cache: where they are kept.
        to_record: a result as the cache holds it.
        from_record: the result again; None for a record that is not of this form (another version's, say).
    """

    def __init__(
        self, cache: Cache, to_record: Callable[[R], Record], from_record: Callable[[Record], R | None]
    ) -> None:
        self._cache = cache
        self._to_record, self._from_record = to_record, from_record
        self._flights = SingleFlight()

    async def find(self, key: str) -> R | None:
        """The result under ``key`` if it is cached. No model runs."""
        record = await self._cache.get(key)
        return None if record is None else self._from_record(record)

    async def compute(self, key: str, work: Callable[[], Awaitable[Computed[R]]]) -> Computed[R] | Failed:
        """The result of ``work``, or of the call for ``key`` that is already running.

        Raises:
            QueueFull, Draining: about the server rather than this item.
        """

        async def run() -> Computed[R]:
            computed = await work()
            self._cache.put(key, self._to_record(computed.value))
            return computed

        try:
            return await self._flights.run(key, run)
        except (QueueFull, Draining):
            raise
        except Exception as error:
            return Failed(error)

    async def of_many(
        self,
        keys: Sequence[str],
        work: Callable[[int], Awaitable[Computed[R]]],
        admitted: Callable[[int], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> tuple[list[Computed[R] | Failed], int]:
        """The results of a call's items, and the microseconds spent reading the cache (one MGET for all).

        Args:
            keys: one an item.
            work: computes item ``i`` of ``keys``; called for those that are not cached.
            admitted: holds places for so many computed items; may raise instead.

        Raises:
            QueueFull, Draining: about the call as a whole; what it had queued leaves the queue.
        """
        started = time.perf_counter()
        records = await self._cache.get_many(keys)
        cache_us = int((time.perf_counter() - started) * 1e6)
        known = [None if record is None else self._from_record(record) for record in records]
        missing = [at for at, value in enumerate(known) if value is None]
        tasks: dict[int, asyncio.Task[Computed[R] | Failed]] = {}
        with admitted(len(missing)):
            try:
                async with asyncio.TaskGroup() as group:
                    for at in missing:
                        tasks[at] = group.create_task(self._one(keys[at], work, at))
            except BaseExceptionGroup as refused:
                raise refused.exceptions[0] from None
        return [
            tasks[at].result() if value is None else Computed(value, cached=True) for at, value in enumerate(known)
        ], cache_us

    async def _one(self, key: str, work: Callable[[int], Awaitable[Computed[R]]], at: int) -> Computed[R] | Failed:
        return await self.compute(key, lambda: work(at))

"""Redis as a cache tier: bounded in time, never trusted blindly, never raising.

It moves bytes; :mod:`faceteer_runtime.record` says what they hold. Redis slow, full, wrong or gone is a miss, or a
write that does not happen.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from faceteer_runtime.breaker import Breaker
from faceteer_runtime.metrics import BREAKER_STATES, Metrics

_log = logging.getLogger(__name__)

_CONNECT_S = 0.1
_READ_S = 0.1
# A whole MGET, connecting included, however many chunks the reply arrives in.
_GET_TOTAL_S = 0.15
_WRITE_S = 1.0
_CONCURRENT_GETS = 8
_MAX_QUEUED = 4096
_MAX_QUEUED_BYTES = 32 << 20
_MAX_PIPELINE = 64
_MAX_PIPELINE_BYTES = 8 << 20
_CLOSE_S = 1.0
_LOOK_AGAIN_S = 0.1


class RedisTier:
    """Gets at once, puts later."""

    def __init__(self, url: str, ttl_s: int, metrics: Metrics) -> None:
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._reader = _client(url, _READ_S, _CONCURRENT_GETS + 2)
        self._writer = _client(url, _WRITE_S, 2)
        self.breaker = Breaker(on_change=self._on_breaker)
        self._gets = asyncio.Semaphore(_CONCURRENT_GETS)
        self._queue: deque[tuple[str, int, Callable[[], bytes]]] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._writing: asyncio.Task[None] | None = None
        self._commands: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One MGET. Values as they are, None for a miss or any trouble; takes at most about 0.15 s."""
        misses: list[bytes | None] = [None] * len(keys)
        if not keys or self._closed or not self.breaker.allow():
            return misses
        # Shielded: a command that is cancelled between its request and its reply would leave the reply on the
        # connection for the next caller (redis-py #2624).
        command = asyncio.ensure_future(self._mget(list(keys)))
        self._commands.add(command)
        command.add_done_callback(self._commands.discard)
        values = await asyncio.shield(command)
        return misses if values is None else values

    async def _mget(self, keys: list[str]) -> list[bytes | None] | None:
        try:
            async with asyncio.timeout(_GET_TOTAL_S), self._gets:
                values = await self._reader.mget(keys)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the client makes of nonsense from the other side
            await self._failed("MGET", error)
            return None
        if not isinstance(values, list) or len(values) != len(keys):
            await self._failed("MGET", RuntimeError("another command's reply"))
            return None
        self.breaker.success()
        return [value if isinstance(value, bytes) else None for value in values]

    def put(self, key: str, size: int, make: Callable[[], bytes]) -> None:
        """Queues a write, for when Redis answers; a full queue drops its oldest. Never blocks.

        Args:
            key: where.
            size: bytes of the value, about.
            make: makes the value, later: the caller's answer does not wait for it. May raise ValueError.
        """
        if self._closed or size > _MAX_QUEUED_BYTES:
            return
        while len(self._queue) >= _MAX_QUEUED or self._queued_bytes + size > _MAX_QUEUED_BYTES:
            self._queued_bytes -= self._queue.popleft()[1]
            self._dropped("queue_full")
        self._queue.append((key, size, make))
        self._queued_bytes += size
        self._written.clear()
        self._wake.set()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write())

    async def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Waits until nothing is queued any more, at most ``timeout_s``; whether that was so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._written.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Writes what is queued, for at most a second, and disconnects."""
        await self.flush()
        self._closed = True
        tasks = [task for task in (self._writing, *self._commands) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in (self._reader, self._writer):
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await client.aclose()
            except Exception as error:  # closing must not fail a shutdown
                _log.debug("closing Redis: %s", error)

    async def _write(self) -> None:
        while True:
            self._wake.clear()
            while self._queue:
                if self.breaker.allow():
                    await self._write_some()
                else:
                    await asyncio.sleep(_LOOK_AGAIN_S)
            self._written.set()
            await self._wake.wait()

    async def _write_some(self) -> None:
        batch: list[tuple[str, bytes]] = []
        total = 0
        while self._queue and len(batch) < _MAX_PIPELINE and total < _MAX_PIPELINE_BYTES:
            key, size, make = self._queue.popleft()
            total += size
            try:
                batch.append((key, make()))
            except ValueError as error:
                self._dropped("unencodable")
                _log.error("cannot write %s to Redis: %s", key, error)
        self._queued_bytes -= total
        if not batch:
            # The breaker may be waiting to hear of a probe, and nothing was tried.
            self.breaker.release()
            return
        try:
            async with asyncio.timeout(_WRITE_S):
                pipeline = self._writer.pipeline(transaction=False)
                for key, value in batch:
                    pipeline.set(key, value, ex=self._ttl_s)
                replies = await pipeline.execute(raise_on_error=False)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the client makes of nonsense from the other side
            self._dropped("failed", len(batch))
            await self._failed("SET", error)
            return
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if refused:
            # It answers, so reads continue; "out of memory" is the usual reason.
            self._dropped("refused", len(refused))
            _log.warning("Redis refused %d of %d writes: %s", len(refused), len(batch), refused[0])
        if any(not isinstance(error, ResponseError) for error in refused):
            await self._failed("SET", refused[0])
            return
        self._metrics.cache_writes.inc(len(batch) - len(refused))
        self.breaker.success()

    async def _failed(self, command: str, error: BaseException) -> None:
        self._metrics.redis_failures.inc()
        _log.debug("Redis %s failed: %s: %s", command, type(error).__name__, error)
        self.breaker.failure()
        if self.breaker.state == "open":
            # Whatever is half read on a connection must not be taken for the reply to a later command.
            for client in (self._reader, self._writer):
                try:
                    async with asyncio.timeout(_CONNECT_S):
                        await client.connection_pool.disconnect(inuse_connections=False)
                except Exception as closing:
                    _log.debug("disconnecting from Redis: %s", closing)

    def _dropped(self, reason: str, count: int = 1) -> None:
        self._metrics.cache_writes_dropped.labels(reason).inc(count)

    def _on_breaker(self, state: str) -> None:
        self._metrics.redis_breaker.set(BREAKER_STATES[state])
        if state == "open":
            _log.warning("Redis does not answer: serving without it, looking again shortly")
        elif state == "closed":
            _log.info("Redis answers again")


def _client(url: str, timeout_s: float, connections: int) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(
        url,
        socket_connect_timeout=_CONNECT_S,
        socket_timeout=timeout_s,
        max_connections=connections,
        # Trying again belongs to the breaker: a retry would double every timeout.
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        decode_responses=False,
        # Sending the client library's name would cost two round trips on every new connection.
        driver_info=None,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )

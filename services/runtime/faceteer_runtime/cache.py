"""The cache that services share: an in-process tier in front of Redis. It never raises and never blocks.

Values are :data:`Record`; keys come from :mod:`faceteer_runtime.cache_keys`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from faceteer_runtime.cache_keys import KINDS
from faceteer_runtime.lru import Lru
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.record import Record, RecordError, decode, encode, frozen, size_of
from faceteer_runtime.redis_tier import RedisTier
from faceteer_runtime.settings import ServiceSettings

_log = logging.getLogger(__name__)


class Cache:
    """Records by content-addressed key. A miss is always possible; a wrong value is not."""

    def __init__(self, memory_bytes: int, metrics: Metrics, *, redis_url: str | None = None, ttl_s: int = 3600) -> None:
        self._metrics = metrics
        self._lru = Lru(memory_bytes)
        self._redis_url = redis_url
        self._ttl_s = ttl_s
        # Opened at its first use, because it belongs to the running event loop.
        self._redis: RedisTier | None = None
        self._hits = {
            (tier, kind): metrics.cache_hits.labels(tier, kind)
            for tier in ("memory", "redis")
            for kind in (*KINDS, "other")
        }
        self._misses = {kind: metrics.cache_misses.labels(kind) for kind in (*KINDS, "other")}

    async def get(self, key: str) -> Record | None:
        """The record under ``key``, or None."""
        record = self._lru.get(key)
        if record is not None:
            self._hits["memory", _kind(key)].inc()
            return record
        return (await self.get_many((key,)))[0]

    async def get_many(self, keys: Sequence[str]) -> list[Record | None]:
        """Records aligned with ``keys``, None where there is none. Costs at most one MGET."""
        records = [self._lru.get(key) for key in keys]
        for key, record in zip(keys, records, strict=True):
            if record is not None:
                self._hits["memory", _kind(key)].inc()
        missing = [key for key, record in zip(keys, records, strict=True) if record is None]
        if not missing:
            return records
        found = await self._from_redis(list(dict.fromkeys(missing)))
        for index, key in enumerate(keys):
            if records[index] is not None:
                continue
            record = found.get(key)
            if record is None:
                self._misses[_kind(key)].inc()
            else:
                self._hits["redis", _kind(key)].inc()
                records[index] = record.copy()
        return records

    def put(self, key: str, record: Record) -> None:
        """Keeps the record: in this process at once, in Redis soon. Never blocks; the arrays are copied."""
        kept = frozen(record)
        self._lru.put(key, kept)
        self._metrics.cache_bytes.set(self._lru.bytes)
        tier = self._tier()
        if tier is None:
            return
        tier.put(key, size_of(kept), partial(encode, key, kept))

    async def flush(self, timeout_s: float = 1.0) -> bool:
        """Waits until queued writes are done, at most ``timeout_s``; whether they were."""
        return self._redis is None or await self._redis.flush(timeout_s)

    async def close(self) -> None:
        """Writes what is queued (for at most a second), disconnects and forgets everything."""
        if self._redis is not None:
            await self._redis.close()
            self._redis = None
            self._redis_url = None
        self._lru.clear()

    async def _from_redis(self, keys: list[str]) -> dict[str, Record]:
        tier = self._tier()
        if tier is None:
            return {}
        found: dict[str, Record] = {}
        for key, value in zip(keys, await tier.get_many(keys), strict=True):
            if value is None:
                continue
            try:
                record = decode(key, value)
            except RecordError as error:
                self._metrics.cache_corrupt.inc()
                _log.warning("ignoring a value in Redis: %s", error)
                continue
            found[key] = record
            self._lru.put(key, record)
        self._metrics.cache_bytes.set(self._lru.bytes)
        return found

    def _tier(self) -> RedisTier | None:
        if self._redis is None and self._redis_url is not None:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return None
            self._redis = RedisTier(self._redis_url, self._ttl_s, self._metrics)
        return self._redis


def open_cache(settings: ServiceSettings, metrics: Metrics | None = None) -> Cache:
    """The cache that the settings ask for. Redis is not contacted before the first use, so it may be down."""
    return Cache(
        settings.cache_memory_bytes,
        metrics or Metrics(),
        redis_url=settings.redis_url,
        ttl_s=settings.cache_ttl_s,
    )


def _kind(key: str) -> str:
    kind = key.split(":", 3)[2] if key.count(":") >= 3 else ""
    return kind if kind in KINDS else "other"

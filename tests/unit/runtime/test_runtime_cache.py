"""The cache against a real Redis: right values or misses, in bounded time, whatever Redis does."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import numpy as np
import pytest
from faceteer_runtime.cache import Cache, open_cache
from faceteer_runtime.cache_keys import cache_key
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.record import encode
from faceteer_runtime.settings import ServiceSettings
from redis_server import RedisServer, free_port

REVISION = "9f86d081884c7d65"
# Connecting, reading and the loop's own delays on a busy machine: far above what the settings allow, far below a hang.
SOON_S = 1.5


@pytest.fixture(scope="module")
def redis_process() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(redis_process: RedisServer) -> RedisServer:
    redis_process.flush()
    return redis_process


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """One that the test may kill."""
    with RedisServer() as server:
        yield server


class Caches:
    """Opens caches and closes them at the end. ``memory=0`` makes every get go to Redis."""

    def __init__(self) -> None:
        self.stack = contextlib.AsyncExitStack()

    def open(self, url: str | None, *, memory: int = 0, ttl_s: int = 60) -> tuple[Cache, Metrics]:
        metrics = Metrics()
        cache = Cache(memory, metrics, redis_url=url, ttl_s=ttl_s)
        self.stack.push_async_callback(cache.close)
        return cache, metrics


@pytest.fixture
async def caches() -> AsyncIterator[Caches]:
    caches = Caches()
    async with caches.stack:
        yield caches


def key(n: int, kind: str = "embeds") -> str:
    return cache_key(kind, REVISION, str(n).encode())


def record(n: int) -> dict[str, np.ndarray | bytes]:
    return {"embeds": np.full(16, n, np.float32)}


def right(got, n: int) -> bool:
    return got is not None and np.array_equal(got["embeds"], record(n)["embeds"])


async def timed(awaitable):
    began = time.perf_counter()
    result = await awaitable
    assert time.perf_counter() - began < SOON_S
    return result


async def until_right(cache: Cache, n: int, timeout_s: float = 12.0) -> None:
    """Redis is found again within the breaker's longest pause."""
    async with asyncio.timeout(timeout_s):
        while not right(await cache.get(key(n)), n):
            cache.put(key(n), record(n))
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def impostor(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that is not Redis, as a Redis URL; each connection gets ``answer``."""
    handlers: set[asyncio.Task] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        handlers.add(task)
        task.add_done_callback(handlers.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await answer(reader, writer)
            finally:
                writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await asyncio.sleep(0.01)


# -- when all is well ----------------------------------------------------------------------------


async def test_one_process_reads_what_another_wrote(redis: RedisServer, caches: Caches) -> None:
    (writer, _), (reader, metrics) = caches.open(redis.url), caches.open(redis.url)
    writer.put(key(1), {**record(1), "name": b"one", "indices": np.arange(3, dtype=np.uint32)})
    assert await writer.flush()
    got = await reader.get(key(1))
    assert right(got, 1)
    assert got["name"] == b"one"
    assert got["indices"].dtype == np.uint32
    assert await reader.get(key(2)) is None
    assert metrics.value("faceteer_cache_hits_total", tier="redis", kind="embeds") == 1
    assert metrics.value("faceteer_cache_misses_total", kind="embeds") == 1


async def test_the_memory_tier_has_a_value_at_once_and_redis_is_not_asked(redis: RedisServer, caches: Caches) -> None:
    cache, metrics = caches.open(redis.url, memory=1 << 20)
    cache.put(key(1), record(1))
    assert right(await cache.get(key(1)), 1)
    assert metrics.value("faceteer_cache_hits_total", tier="memory", kind="embeds") == 1
    assert metrics.value("faceteer_cache_bytes") > 0


async def test_a_value_from_redis_stays_in_memory(redis: RedisServer, caches: Caches) -> None:
    (writer, _), (reader, metrics) = caches.open(redis.url), caches.open(redis.url, memory=1 << 20)
    writer.put(key(1), record(1))
    await writer.flush()
    for _ in range(3):
        assert right(await reader.get(key(1)), 1)
    assert metrics.value("faceteer_cache_hits_total", tier="redis", kind="embeds") == 1
    assert metrics.value("faceteer_cache_hits_total", tier="memory", kind="embeds") == 2


async def test_a_batch_costs_one_mget_for_what_memory_does_not_have(redis: RedisServer, caches: Caches) -> None:
    (writer, _), (reader, metrics) = caches.open(redis.url), caches.open(redis.url, memory=1 << 20)
    for n in range(6):
        writer.put(key(n), record(n))
    await writer.flush()
    await reader.get(key(0))
    with redis.client() as client:
        client.config_resetstat()
        got = await reader.get_many([key(n) for n in (5, 0, 1, 99, 1)])
        calls = client.info("commandstats")
    assert [right(value, n) for value, n in zip(got, (5, 0, 1, 99, 1), strict=True)] == [True, True, True, False, True]
    assert calls["cmdstat_mget"]["calls"] == 1
    assert "cmdstat_get" not in calls
    counted = [metrics.value("faceteer_cache_hits_total", tier=tier, kind="embeds") for tier in ("memory", "redis")]
    assert (counted, metrics.value("faceteer_cache_misses_total", kind="embeds")) == ([1, 4], 1)


async def test_a_key_asked_for_twice_is_fetched_once_and_each_caller_has_a_record_of_its_own(
    redis: RedisServer, caches: Caches
) -> None:
    (writer, _), (reader, _) = caches.open(redis.url), caches.open(redis.url, memory=1 << 20)
    writer.put(key(1), record(1))
    assert await writer.flush()
    first, second = await reader.get_many([key(1), key(1)])
    first.clear()
    assert right(second, 1)
    # Nor can a caller change what stays in memory.
    second.clear()
    assert right(await reader.get(key(1)), 1)


async def test_every_value_in_redis_has_a_time_to_live(redis: RedisServer, caches: Caches) -> None:
    # Mistake 4: a Redis cache without TTL.
    cache, _ = caches.open(redis.url, ttl_s=1234)
    for n in range(3):
        cache.put(key(n), record(n))
    await cache.flush()
    with redis.client() as client:
        assert [1200 < client.ttl(key(n)) <= 1234 for n in range(3)] == [True] * 3


async def test_no_timeout_of_the_redis_client_is_infinite(redis: RedisServer, caches: Caches) -> None:
    # Mistake 4, the other half: infinite default timeouts.
    cache, _ = caches.open(redis.url)
    await cache.get(key(1))
    for client in (cache._redis._reader, cache._redis._writer):
        options = client.connection_pool.connection_kwargs
        assert 0 < options["socket_timeout"] <= 1
        assert 0 < options["socket_connect_timeout"] <= 1


async def test_without_redis_the_memory_tier_serves(caches: Caches) -> None:
    cache, _ = caches.open(None, memory=1 << 20)
    cache.put(key(1), record(1))
    assert right(await cache.get(key(1)), 1)
    assert await cache.get(key(2)) is None
    assert await cache.flush()


async def test_a_caller_cannot_change_what_is_cached(caches: Caches) -> None:
    cache, _ = caches.open(None, memory=1 << 20)
    array = np.full(16, 1, np.float32)
    cache.put(key(1), {"embeds": array})
    array[:] = 7
    got = await cache.get(key(1))
    assert right(got, 1)
    with pytest.raises(ValueError, match="read-only"):
        got["embeds"][0] = 7


async def test_a_put_outside_a_loop_reaches_memory(caches: Caches) -> None:
    cache, _ = caches.open("redis://127.0.0.1:1/0", memory=1 << 20)
    await asyncio.to_thread(cache.put, key(1), record(1))
    assert right(await cache.get(key(1)), 1)


def test_the_settings_make_the_cache() -> None:
    metrics = Metrics()
    cache = open_cache(ServiceSettings(redis_url="redis://127.0.0.1:1/0", cache_memory_bytes=5, cache_ttl_s=7), metrics)
    assert (cache._redis_url, cache._lru.capacity, cache._ttl_s) == ("redis://127.0.0.1:1/0", 5, 7)
    assert cache._metrics is metrics


# -- wrong values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"0.1,0.2",
        b'{"embeds": [0.1, 0.2]}',
        pickle.dumps({"embeds": [1.0]}),
        encode(key(1), record(1))[:-3],
        encode(key(1), record(1)) + b"x",
        bytes(encode(key(1), record(1))[:-1]) + b"\xff",
        encode(key(2), record(2)),
    ],
    ids=["empty", "text", "json", "pickle", "cut off", "too long", "damaged", "another key's"],
)
async def test_a_foreign_or_damaged_value_is_a_miss(redis: RedisServer, caches: Caches, value: bytes) -> None:
    cache, metrics = caches.open(redis.url)
    with redis.client() as client:
        client.set(key(1), value)
    cache.put(key(3), record(3))
    await cache.flush()
    missing, found = await cache.get_many([key(1), key(3)])
    assert missing is None
    assert right(found, 3)
    assert metrics.value("faceteer_cache_corrupt_total") == 1
    cache.put(key(1), record(1))
    await cache.flush()
    assert right(await cache.get(key(1)), 1)


async def test_a_value_of_another_redis_type_is_a_miss(redis: RedisServer, caches: Caches) -> None:
    cache, _ = caches.open(redis.url)
    with redis.client() as client:
        client.lpush(key(1), "a", "list")
    assert await cache.get(key(1)) is None


async def test_cancelled_gets_never_give_anybody_anothers_value(redis: RedisServer, caches: Caches) -> None:
    # redis-py #2624: a cancelled command may leave its reply on the connection for the next caller.
    (writer, _), (cache, metrics) = caches.open(redis.url), caches.open(redis.url)
    for n in range(20):
        writer.put(key(n), record(n))
    await writer.flush()
    rng = np.random.default_rng(0)

    async def read(n: int) -> None:
        got = await cache.get(key(n))
        assert got is None or right(got, n)

    for _ in range(40):
        tasks = [asyncio.ensure_future(read(int(n))) for n in rng.integers(0, 20, 12)]
        await asyncio.sleep(float(rng.uniform(0, 0.0006)))
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
    for n in range(20):
        assert right(await cache.get(key(n)), n)
    assert metrics.value("faceteer_cache_corrupt_total") == 0


async def test_a_connection_that_lags_a_reply_behind_is_not_believed(caches: Caches) -> None:
    """A Redis whose every reply is the one before: what #2624 would look like if it happened all the same."""
    values = [encode(key(n), record(n)) for n in range(10)]

    async def lag(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for value in [encode(key(99), record(99)), *values]:
            await reader.read(65536)
            writer.write(b"*1\r\n$%d\r\n%s\r\n" % (len(value), value))
            await writer.drain()

    async with impostor(lag) as url:
        cache, metrics = caches.open(url)
        for n in range(10):
            assert await timed(cache.get(key(n))) is None
        assert metrics.value("faceteer_cache_corrupt_total") >= 5
        await cache.close()


# -- Redis in trouble ----------------------------------------------------------------------------


async def test_redis_down_at_the_start_is_misses_until_it_comes(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer()
    cache, metrics = caches.open(server.url)
    for n in range(6):
        cache.put(key(n), record(n))
        assert await timed(cache.get(key(n))) is None
    assert metrics.value("faceteer_redis_breaker") == 2
    assert metrics.value("faceteer_redis_failures_total") >= 3
    shown: list[float] = []
    show = metrics.redis_breaker.set
    monkeypatch.setattr(metrics.redis_breaker, "set", lambda state: (shown.append(state), show(state)))
    with server:
        await until_right(cache, 1)
        assert metrics.value("faceteer_redis_breaker") == 0
    assert shown[-2:] == [1, 0], "one probe, half open, before it closes"


async def test_what_was_put_while_redis_was_away_is_written_when_it_comes(caches: Caches) -> None:
    server = RedisServer()
    cache, metrics = caches.open(server.url)
    for n in range(4):
        assert await cache.get(key(n)) is None
    assert metrics.value("faceteer_redis_breaker") == 2
    for n in range(10, 20):
        cache.put(key(n), record(n))
    with server:
        assert await cache.flush(12)
        got = await cache.get_many([key(n) for n in range(10, 20)])
        assert sum(right(value, n) for n, value in enumerate(got, start=10)) >= 9
        await cache.close()


async def test_redis_killed_in_the_middle_and_started_again(own_redis: RedisServer, caches: Caches) -> None:
    cache, _ = caches.open(own_redis.url)
    memory, _ = caches.open(own_redis.url, memory=1 << 20)
    for n in range(4):
        cache.put(key(n), record(n))
        memory.put(key(n), record(n))
    assert await cache.flush()
    assert right(await cache.get(key(0)), 0)
    own_redis.kill()
    for n in range(8):
        assert await timed(cache.get(key(n))) is None
        cache.put(key(n), record(n))
    assert right(await timed(memory.get(key(1))), 1)
    own_redis.start()
    await until_right(cache, 2)


async def test_a_paused_redis_costs_little_and_only_at_first(own_redis: RedisServer, caches: Caches) -> None:
    cache, metrics = caches.open(own_redis.url)
    cache.put(key(1), record(1))
    await cache.flush()
    assert right(await cache.get(key(1)), 1)
    own_redis.pause()
    began = time.perf_counter()
    assert await asyncio.gather(*(cache.get(key(n)) for n in range(50))) == [None] * 50
    assert time.perf_counter() - began < SOON_S
    for _ in range(3):
        assert await timed(cache.get(key(1))) is None
    assert metrics.value("faceteer_redis_breaker") == 2
    # While it is open nobody waits: a thousand gets take less than ten timeouts would.
    assert await timed(asyncio.gather(*(cache.get(key(n)) for n in range(1000)))) == [None] * 1000
    own_redis.resume()
    await until_right(cache, 1)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\xff" * 500,
        b"+OK\r\n" * 3,
        b":42\r\n",
        b"$-1\r\n",
        b"*0\r\n",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
        b"*1\r\n:7\r\n",
        b"$1000000000\r\nabc",
        b"-ERR nonsense\r\n",
        b"",
    ],
)
async def test_a_server_that_answers_nonsense_is_misses(nonsense: bytes, caches: Caches) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536) and nonsense:
            writer.write(nonsense)
            await writer.drain()

    async with impostor(answer) as url:
        cache, _ = caches.open(url)
        for n in range(5):
            assert await timed(cache.get(key(n))) is None
            cache.put(key(n), record(n))
        await cache.flush(0.5)
        await asyncio.wait_for(cache.close(), 5)


async def test_a_server_that_drips_its_reply_is_cut_off(caches: Caches) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(b"*1\r\n$1000\r\n")
        for _ in range(1000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with impostor(drip) as url:
        cache, _ = caches.open(url)
        assert await timed(cache.get(key(1))) is None
        await cache.close()


async def test_a_host_that_swallows_connections_is_a_miss_soon(caches: Caches) -> None:
    # A listener whose backlog is full: connecting hangs, as behind a firewall that drops packets.
    with socket.socket() as listener, contextlib.ExitStack() as others:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            filler = others.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        cache, _ = caches.open(f"redis://127.0.0.1:{port}/0")
        assert await timed(cache.get(key(1))) is None
        cache.put(key(1), record(1))
        await asyncio.wait_for(cache.close(), 5)


async def test_redis_out_of_memory_drops_writes_and_goes_on_reading(own_redis: RedisServer, caches: Caches) -> None:
    cache, metrics = caches.open(own_redis.url)
    cache.put(key(1), record(1))
    await cache.flush()
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
    big = {"embeds": np.zeros(300_000, np.float32)}
    for n in range(10, 14):
        cache.put(key(n), big)
    assert await cache.flush()
    assert metrics.value("faceteer_cache_writes_dropped_total", reason="refused") == 4
    assert metrics.value("faceteer_redis_breaker") == 0
    assert right(await cache.get(key(1)), 1)
    assert await cache.get(key(12)) is None


async def test_a_wrong_password_is_misses(caches: Caches) -> None:
    with RedisServer("--requirepass", "secret") as server:
        cache, _ = caches.open(f"redis://:wrong@127.0.0.1:{server.port}/0")
        for n in range(5):
            assert await timed(cache.get(key(n))) is None
        good, _ = caches.open(f"redis://:secret@127.0.0.1:{server.port}/0")
        good.put(key(1), record(1))
        await good.flush()
        assert right(await good.get(key(1)), 1)


async def test_the_write_queue_is_bounded(own_redis: RedisServer, caches: Caches) -> None:
    cache, metrics = caches.open(own_redis.url)
    cache.put(key(0), record(0))
    await cache.flush()
    own_redis.pause()
    chunk = {"embeds": np.zeros(1 << 20, np.uint8)}
    for n in range(100):
        cache.put(key(n), chunk)
    assert metrics.value("faceteer_cache_writes_dropped_total", reason="queue_full") >= 30
    assert cache._redis._queued_bytes <= 32 << 20
    own_redis.resume()
    assert await cache.flush(10)
    assert cache._redis._queued_bytes == 0


async def test_a_record_that_cannot_be_written_does_not_hold_up_the_others(redis: RedisServer, caches: Caches) -> None:
    cache, metrics = caches.open(redis.url)
    cache.put(key(1), {"embeds": np.array(["text"])})
    cache.put(key(2), record(2))
    assert await cache.flush()
    assert right(await cache.get(key(2)), 2)
    assert metrics.value("faceteer_cache_writes_dropped_total", reason="unencodable") == 1


async def test_closing_writes_what_is_queued_and_a_closed_cache_only_misses(redis: RedisServer, caches: Caches) -> None:
    (writer, _), (reader, _) = caches.open(redis.url), caches.open(redis.url)
    for n in range(100):
        writer.put(key(n), record(n))
    await writer.close()
    assert await writer.get(key(1)) is None
    got = await reader.get_many([key(n) for n in range(100)])
    assert all(right(value, n) for n, value in enumerate(got))


async def test_closing_does_not_wait_for_a_redis_that_is_gone(caches: Caches) -> None:
    cache, _ = caches.open(f"redis://127.0.0.1:{free_port()}/0")
    cache.put(key(1), record(1))
    await asyncio.wait_for(cache.close(), 3)

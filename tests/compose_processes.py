"""Runs docker-compose.yml's own services as local processes, wired as the file says.

Container names become loopback addresses, published paths become local ones; commands, environment, health checks and
dependencies are read from the file.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[1]
OURS = ("encoder", "sae", "generator", "library", "studio", "gateway")


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_compose(path: Path = ROOT / "docker-compose.yml") -> dict[str, Any]:
    """The file's services by name."""
    services: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return services


@dataclass
class ComposeProcesses:
    """The stack as processes of this machine; a context manager.

    Args:
        bundle: takes the place of the volume at /bundle.
        directory: logs, and whatever other volumes hold.
    """

    bundle: Path
    directory: Path
    compose: dict[str, Any] = field(default_factory=read_compose)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.redis = RedisServer()
        self._ports = {(name, port): free_port() for name in OURS for port in (50051, 9100, 8080)}

    @property
    def address(self) -> str:
        """The front door, host:port."""
        return f"127.0.0.1:{self._ports['studio', 50051]}"

    @property
    def http(self) -> str:
        """The gateway, http://host:port."""
        return f"http://{self.address_of('gateway', 8080)}"

    def address_of(self, service: str, port: int = 50051) -> str:
        return f"127.0.0.1:{self._ports[service, port]}"

    def log(self, service: str) -> str:
        return (self.directory / f"{service}.log").read_text(errors="replace")

    def environment(self, service: str) -> dict[str, str]:
        """The file's environment of one service with names and paths of this machine."""
        given = self.compose[service].get("environment", {})
        # A name without a value passes on what `docker compose` itself was given.
        own = {key: os.environ[key] for key, value in given.items() if value is None and key in os.environ}
        own |= {key: str(value) for key, value in given.items() if value is not None}
        return {key: self._here(service, value) for key, value in own.items()}

    def _here(self, service: str, value: str) -> str:
        if match := re.fullmatch(r"0\.0\.0\.0:(\d+)", value):
            return f"127.0.0.1:{self._ports[service, int(match[1])]}"
        if match := re.fullmatch(r"(\w+):(\d+)", value):
            return f"127.0.0.1:{self._ports[match[1], int(match[2])]}"
        if value.startswith("redis://redis:6379"):
            return value.replace("redis:6379", f"127.0.0.1:{self.redis.port}")
        if value == "/bundle":
            return str(self.bundle)
        if value.startswith("/labels/"):
            return str(self.directory / value.removeprefix("/labels/"))
        return value

    def start_service(self, service: str) -> None:
        """Starts one service with the file's command and environment."""
        command = list(self.compose[service]["command"])
        assert command[0] == "python", command
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FACETEER_")}
        with (self.directory / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=self.directory,
                env={**inherited, "OMP_NUM_THREADS": "1", **self.environment(service)},
                stdout=log,
                stderr=log,
            )

    def healthy(self, service: str) -> bool:
        """Runs the file's own health check of one service."""
        test = self.compose[service]["healthcheck"]["test"]
        assert test[:2] == ["CMD", "python"], test
        here = [re.sub(r"^127\.0\.0\.1:50051$", self.address_of(service), word) for word in test[2:]]
        return subprocess.run([sys.executable, *here], capture_output=True, timeout=30).returncode == 0

    def wait_healthy(self, *services: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        for service in services or OURS:
            while not self.healthy(service):
                if self.processes[service].poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{service} is not healthy:\n{self.log(service)[-3000:]}")
                time.sleep(0.1)

    def stop_service(self, service: str, sign: int = signal.SIGTERM, seconds: float = 40) -> int:
        """Signals one service and returns its exit status."""
        process = self.processes.pop(service)
        process.send_signal(sign)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> ComposeProcesses:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.redis.start()
        for service in OURS:
            self.start_service(service)
        try:
            self.wait_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        self.redis.stop()

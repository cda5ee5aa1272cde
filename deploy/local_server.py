"""Starts and stops an all-in-one server on this machine: `make up`, `make down`, and the demo's own server.

It keeps a process's id in build/up, and asks gRPC health whether the server is ready.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "up"


def free_address() -> str:
    """A loopback address whose port is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def is_serving(address: str, timeout: float = 1.0) -> bool:
    """Whether gRPC health at ``address`` answers SERVING."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def command(address: str, bundle: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "faceteer_studio", "--all-in-one"),
        *("--listen", address, "--bundle", str(bundle), "--reflection"),
    ]


def wait_until_serving(process: subprocess.Popen[bytes], address: str, log: Path, seconds: float = 120) -> None:
    """Returns when the server serves.

    Raises:
        SystemExit: it ended, or did not serve in time; with the log's last lines.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended at its start:\n{_tail(log)}")
        if is_serving(address):
            return
        time.sleep(0.2)
    stop(process.pid)
    raise SystemExit(f"the server at {address} was not ready within {seconds:.0f} s:\n{_tail(log)}")


def stop(pid: int, seconds: float = 20) -> None:
    """Ends one process by its id: SIGTERM, so that it drains, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + seconds
        try:
            os.kill(pid, sign)
            while time.monotonic() < deadline:
                time.sleep(0.05)
                if _ended(pid):
                    return
        except ProcessLookupError:
            return


def _ended(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:  # our own child: take its exit status
            return True
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def temporary_server(bundle: Path) -> Iterator[str]:
    """An all-in-one server on a free loopback port for the duration of a ``with`` block."""
    address = free_address()
    STATE.mkdir(parents=True, exist_ok=True)
    log = STATE / f"{address.rpartition(':')[2]}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command(address, bundle), cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_until_serving(process, address, log)
        yield address
    finally:
        stop(process.pid)
        process.wait()


def up(address: str, bundle: Path) -> None:
    STATE.mkdir(parents=True, exist_ok=True)
    port = address.rpartition(":")[2]
    if is_serving(address):
        print(f"Already serving at {address}.")
        return
    log = STATE / f"{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(address, bundle),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    wait_until_serving(process, address, log)
    (STATE / f"{port}.pid").write_text(str(process.pid))
    print(f"Serving {bundle} at {address} (process {process.pid}, log {log.relative_to(ROOT)}).")
    example = next(iter(sorted((bundle / "examples").glob("*.png"))), "PICTURE")
    print(f"Try:  .venv/bin/faceteer --address {address} open {example}")
    print("Stop: make down")


def down(address: str) -> None:
    record = STATE / f"{address.rpartition(':')[2]}.pid"
    if not record.exists():
        raise SystemExit(f"no server that `make up` started at {address}")
    stop(int(record.read_text()))
    record.unlink()
    print(f"Stopped the server at {address}.")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--address", default="127.0.0.1:50050")
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    arguments = parser.parse_args()
    if arguments.action == "up":
        up(arguments.address, arguments.bundle)
    else:
        down(arguments.address)


if __name__ == "__main__":
    main()

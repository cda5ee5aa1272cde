"""Starts and stops an all-in-one server on this machine: `make up`, `make down`, and the demo's own server.

What it started is recorded in build/up; what a server serves, the server says itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
from faceteer.v1 import studio_pb2, studio_pb2_grpc
from faceteer_runtime.bundle import Bundle, BundleError
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "up"
DEFAULT_ADDRESS = "127.0.0.1:50050"
SHIPPED = Path("deploy/bundles/postcards")


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


def opened_bundle(path: Path) -> Bundle:
    """The bundle, looked at before a server starts on it.

    Raises:
        SystemExit: it cannot be served; says why, and what can.
    """
    try:
        return Bundle.open(path)
    except BundleError as error:
        raise SystemExit(
            f"{error}\nThe bundle that ships with the repository is served by:  make up BUNDLE={SHIPPED}\n"
            "One of your own is made in docs/your-own-library.md."
        ) from None


def served(address: str) -> tuple[str, dict[str, str]] | None:
    """The name and the parts' revisions of the bundle that Faceteer serves at ``address``; None if it does not say."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = studio_pb2_grpc.StudioServiceStub(channel).GetStudio(studio_pb2.GetStudioRequest(), timeout=5)
        except grpc.RpcError:
            return None
    return answer.bundle, {
        part.name: getattr(answer.revisions, part.name) for part in answer.revisions.DESCRIPTOR.fields
    }


def command(address: str, bundle: Path) -> list[str]:
    # HTTP at its own default beside the default address, else at a free port, so that two servers can run.
    own_port = address == DEFAULT_ADDRESS or "FACETEER_GATEWAY_LISTEN" in os.environ
    return [
        *(sys.executable, "-m", "faceteer_studio", "--all-in-one"),
        *("--listen", address, "--bundle", str(bundle), "--reflection"),
        *(() if own_port else ("--gateway-listen", "127.0.0.1:0")),
    ]


def http_address(log: Path) -> str | None:
    """Where a server serves HTTP, by its log; None if it does not say."""
    try:
        found = re.findall(r"serving HTTP at (http://[^\s\"]+)", log.read_text(errors="replace"))
    except OSError:
        return None
    return str(found[-1]) if found else None


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
    log = _state(address, "log")
    with log.open("wb") as output:
        process = subprocess.Popen(command(address, bundle), cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_until_serving(process, address, log)
        yield address
    finally:
        stop(process.pid)
        process.wait()


def up(address: str, bundle: Path) -> None:
    """Leaves a server of ``bundle`` running at ``address``; one that `make up` started on another bundle makes way.

    Raises:
        SystemExit: the bundle cannot be served, something else has the address, or the server did not start.
    """
    asked = opened_bundle(bundle)
    there = _started_at(address)
    if is_serving(address):
        name, revisions = served(address) or ("", {})
        if revisions and all(revisions.get(part.name, "") == part.revision for part in asked.parts.values()):
            print(f"{bundle} is already served at {address}.")
            _say_what_next(address, bundle, there is not None)
            return
        if there is None:
            what = f"the bundle {name!r}" if name else "something that does not say which bundle it serves"
            port = free_address().rpartition(":")[2]
            raise SystemExit(
                f"{address} is taken: it serves {what}, not {bundle}, and was not started here by `make up`.\n"
                f"Stop it where it was started, or take another port:  make up ADDRESS=127.0.0.1:{port} BUNDLE={bundle}"
            )
    if there is not None:
        print(f"Stopping the server of {there.bundle} at {address} ...")
        stop(there.pid)
    STATE.mkdir(parents=True, exist_ok=True)
    log = _state(address, "log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(address, bundle.resolve()),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    _state(address, "json").write_text(json.dumps(Started(process.pid, address, str(bundle))._asdict()))
    wait_until_serving(process, address, log)
    print(f"Serving {bundle} at {address} (process {process.pid}, log {log.relative_to(ROOT)}).")
    _say_what_next(address, bundle, True)


def down(address: str) -> None:
    """Stops what `make up` started at ``address``.

    Raises:
        SystemExit: nothing of the kind runs; says where something does.
    """
    there = _started_at(address)
    if there is None:
        others = [other for path in sorted(STATE.glob("*.json")) if (other := _running(path)) is not None]
        hint = "".join(f"\nOne runs at {o.address}; to stop it:  make down ADDRESS={o.address}" for o in others)
        raise SystemExit(f"no server that `make up` started runs at {address}{hint}")
    stop(there.pid)
    _state(address, "json").unlink(missing_ok=True)
    print(f"Stopped the server of {there.bundle} at {address}.")


class Started(NamedTuple):
    """A server that `make up` started and that still runs."""

    pid: int
    address: str
    bundle: str


def _started_at(address: str) -> Started | None:
    return _running(_state(address, "json"))


def _running(record: Path) -> Started | None:
    try:
        started = Started(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    # After a restart of the machine the id may be another program's.
    shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(started.pid)], capture_output=True, text=True)
    return started if "faceteer_studio" in shown.stdout and started.address in shown.stdout else None


def _state(address: str, kind: str) -> Path:
    return STATE / f"{address.rpartition(':')[2]}.{kind}"


def _say_what_next(address: str, bundle: Path, ours: bool) -> None:
    example = next(iter(sorted((bundle / "examples").glob("*.png"))), "PICTURE")
    elsewhere = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    print(f"Try:   .venv/bin/faceteer{elsewhere} open {example}")
    http = http_address(_state(address, "log"))
    if ours and http is not None:
        print(f"HTTP:  {http}  (the same calls for browsers and curl: docs/gateway.md)")
    if ours:
        print("Stop:  make down" + ("" if address == DEFAULT_ADDRESS else f" ADDRESS={address}"))


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--address", default=DEFAULT_ADDRESS)
    parser.add_argument("--bundle", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    if arguments.action == "up":
        up(arguments.address, arguments.bundle)
    else:
        down(arguments.address)


if __name__ == "__main__":
    main()

"""``run`` as a process: signals, exit status, and one clear sentence when it cannot start."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc

PROGRAM = """
import asyncio, sys, time
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc
from faceteer_runtime.server import run
from faceteer_runtime.service import Service
from faceteer_runtime.settings import ServiceSettings

class Settings(ServiceSettings):
    needs_bundle = "bundle" in sys.argv[1]

class Toy(encoder_pb2_grpc.EncoderServiceServicer):
    async def GetEncoder(self, request, context):
        print("inside", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)
        loop = type(asyncio.get_running_loop()).__module__
        return encoder_pb2.GetEncoderResponse(revision=loop)

async def warm_up():
    if "slow-warm-up" in sys.argv[1]:
        print("warming", file=sys.stderr, flush=True)
        await asyncio.sleep(60)
    if "bad-warm-up" in sys.argv[1]:
        raise ValueError("the model answers nonsense")

def build(resources):
    if "slow-build" in sys.argv[1]:
        print("building", file=sys.stderr, flush=True)
        time.sleep(60)
    if "bad-build" in sys.argv[1]:
        raise RuntimeError("no weights")
    register = lambda server: encoder_pb2_grpc.add_EncoderServiceServicer_to_server(Toy(), server)
    return Service("faceteer.v1.EncoderService", register, warm_up)

run(Settings.parse(sys.argv[2:]), build)
print("left in order", file=sys.stderr)
"""


class Process:
    """The program above, its stderr read line by line."""

    def __init__(self, file: Path, mode: str, *flags: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(file), mode, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        for line in self.child.stderr:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"never said {pattern!r}: {self.lines}")

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.child.send_signal(number)
        _, rest = self.child.communicate(timeout=30)
        self.lines += rest.splitlines(keepends=True)
        return self.child.returncode

    @property
    def text(self) -> str:
        return "".join(self.lines)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    file = tmp_path / "toy_service.py"
    file.write_text(PROGRAM)
    children: list[Process] = []

    def launch(mode: str, *flags: str) -> Process:
        children.append(Process(file, mode, "--listen", "127.0.0.1:0", *flags))
        return children[-1]

    yield launch
    for process in children:
        if process.child.poll() is None:
            process.child.kill()
            process.child.communicate()
        for stream in (process.child.stderr, process.child.stdout):
            stream.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_in_order(launch, number: int) -> None:
    process = launch("plain")
    port = process.wait_for(r"serving faceteer\.v1\.EncoderService on 127\.0\.0\.1:(\d+)")[1]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = encoder_pb2_grpc.EncoderServiceStub(channel).GetEncoder.future(
            encoder_pb2.GetEncoderRequest(), timeout=20
        )
        process.wait_for("inside")
        process.child.send_signal(number)
        assert answer.result(20).revision == "uvloop"
    assert process.end() == 0, process.text
    assert "left in order" in process.text
    assert "Traceback" not in process.text


def test_log_lines_are_one_line_each_and_machine_readable(launch) -> None:
    process = launch("plain")
    process.wait_for("serving")
    process.end(signal.SIGTERM)
    logged = [line for line in process.lines if "level=" in line]
    assert len(logged) >= 3
    for line in logged:
        assert re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=\w+ logger=[\w.]+ msg=".*"\n', line), line


@pytest.mark.parametrize(("mode", "said"), [("slow-build", "building"), ("slow-warm-up", "warming")])
def test_a_signal_during_the_start_ends_it_soon(launch, mode: str, said: str) -> None:
    process = launch(mode)
    process.wait_for(said)
    began = time.monotonic()
    assert process.end(signal.SIGTERM) in (0, 128 + signal.SIGTERM), process.text
    assert time.monotonic() - began < 10
    assert "Traceback" not in process.text


def test_a_missing_bundle_is_one_sentence(launch, tmp_path: Path) -> None:
    process = launch("bundle", "--bundle", str(tmp_path / "nowhere"))
    assert process.end() == 1
    assert process.text == f"error: {tmp_path / 'nowhere'}: no bundle here (bundle.json is missing)\n"


def test_a_port_in_use_is_one_sentence(launch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = launch("plain", "--listen", address)
        assert process.end() == 1
    ours = [line for line in process.lines if line.startswith("error:")]
    assert ours == [f"error: cannot listen on {address}: in use, or not an address of this machine\n"]
    assert "Traceback" not in process.text


def test_a_wrong_flag_is_one_sentence(launch) -> None:
    process = launch("plain", "--max-queue", "none")
    assert process.end() == 2
    assert process.text.count("\n") == 1
    assert "--max-queue" in process.text


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("bad-build", "error: RuntimeError: no weights\n"),
        ("bad-warm-up", "error: ValueError: the model answers nonsense\n"),
    ],
)
def test_an_unexpected_failure_is_a_sentence_after_a_logged_traceback(launch, mode: str, sentence: str) -> None:
    process = launch(mode)
    assert process.end() == 1
    assert process.lines[-1] == sentence
    assert any("trace=" in line for line in process.lines)

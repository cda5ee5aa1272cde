"""Starts the all-in-one process, as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from compose_processes import free_port
from faceteer_runtime.healthcheck import check


def start_all_in_one(
    bundle: Path, directory: Path, *flags: str, **environment: str
) -> tuple[subprocess.Popen[bytes], str]:
    """Starts ``python -m faceteer_studio --all-in-one`` and returns the process and its address once it serves."""
    directory.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "faceteer_studio", "--all-in-one", "--listen", address, "--bundle", str(bundle)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FACETEER_")}
    with (directory / "all-in-one.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--reflection", "--gateway-listen", "127.0.0.1:0", *flags],
            stdout=log,
            stderr=log,
            cwd=directory,
            env={**inherited, "OMP_NUM_THREADS": "1", "FACETEER_LIBRARY_LABELS_PATH": str(directory / "labels.sqlite")}
            | environment,
        )
    deadline = time.monotonic() + 90
    while check(address) != "SERVING":
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError((directory / "all-in-one.log").read_text()[-3000:])
        time.sleep(0.1)
    return process, address


def http_address(directory: Path) -> str:
    """Where that process serves HTTP: http://127.0.0.1:PORT."""
    (address,) = re.findall(r"serving HTTP at (http://[\w.:]+)", (directory / "all-in-one.log").read_text())
    return str(address)

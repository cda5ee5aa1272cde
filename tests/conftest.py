"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two intra-op threads on a busy two-core machine cost milliseconds a small operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Loading models from a hub is never part of a test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle in the documented layout, made once a session; read-only by agreement."""
    from tiny_bundle import make_tiny_bundle

    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")

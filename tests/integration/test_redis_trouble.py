"""Redis killed, paused, filled or talking nonsense under load: slower answers at most, never wrong ones, no errors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from compose_processes import ComposeProcesses
from faceteer.v1 import edits_pb2, studio_pb2, studio_pb2_grpc
from tiny_bundle import picture_bytes

PICTURES = 12


@pytest.fixture(scope="module")
def stack(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeProcesses]:
    with ComposeProcesses(tiny_bundle, tmp_path_factory.mktemp("redis-trouble")) as processes:
        yield processes


def edited(stub: studio_pb2_grpc.StudioServiceStub, seed: int) -> np.ndarray:
    """The embedding of picture ``seed`` with feature 3 set to 4: opened and edited in two calls."""
    picture = studio_pb2.ImageInput(image=picture_bytes(seed))
    opened = stub.OpenImage(studio_pb2.OpenImageRequest(input=picture), timeout=20)
    edit = edits_pb2.Edit(
        feature=edits_pb2.FeatureRef(index=3),
        operation=edits_pb2.EDIT_OPERATION_SET,
        value=4.0,
        unit=edits_pb2.EDIT_UNIT_RAW,
    )
    by_id = studio_pb2.ImageInput(embedding_id=opened.embedding.embedding_id)
    request = studio_pb2.EditImageRequest(input=by_id, edits=[edit], report_only=True)
    (event,) = stub.EditImage(request, timeout=20)
    return np.frombuffer(event.edited.embedding.embeds.data, "<f4")


class Load:
    """Four callers that edit pictures until told to stop; every answer is compared with the right one."""

    def __init__(self, address: str, right: list[np.ndarray]) -> None:
        self.answers, self.faults = 0, []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(address, right, n)) for n in range(4)]

    def _run(self, address: str, right: list[np.ndarray], n: int) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = studio_pb2_grpc.StudioServiceStub(channel)
            while not self._stop.is_set():
                seed, n = n % PICTURES, n + 1
                try:
                    if not np.allclose(edited(stub, seed), right[seed], rtol=1e-4, atol=1e-2):
                        self.faults.append(f"picture {seed}: a wrong answer")
                    self.answers += 1
                except grpc.RpcError as error:
                    self.faults.append(f"picture {seed}: {error.code().name} {error.details()}")
                time.sleep(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


@pytest.mark.slow
def test_no_request_fails_and_no_answer_is_wrong(stack: ComposeProcesses) -> None:
    with grpc.insecure_channel(stack.address) as channel:
        stub = studio_pb2_grpc.StudioServiceStub(channel)
        right = [edited(stub, seed) for seed in range(PICTURES)]
        with Load(stack.address, right) as load:
            time.sleep(1)
            counts = [load.answers]
            stack.redis.pause()
            time.sleep(10)
            counts.append(load.answers)
            stack.redis.resume()
            time.sleep(1)
            stack.redis.flush()
            client = stack.redis.client()
            client.config_set("maxmemory", "1mb")
            client.config_set("maxmemory-policy", "noeviction")
            time.sleep(2)
            counts.append(load.answers)
            for key in client.scan_iter("faceteer:*"):
                client.set(key, b"nonsense")
            client.close()
            time.sleep(1)
            stack.redis.kill()
            time.sleep(3)
            counts.append(load.answers)
            stack.redis.start()
            time.sleep(2)
            counts.append(load.answers)
        assert not load.faults, load.faults[:5]
        # Answers went on coming in every phase.
        assert all(later > earlier for earlier, later in itertools.pairwise(counts)), counts

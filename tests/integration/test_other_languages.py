"""A client that shares no code with us: `buf curl`, which learns the contract from the server's own reflection."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from all_in_one import start_all_in_one
from PIL import Image
from tiny_bundle import picture_bytes


def buf_curl(address: str, method: str, request: dict[str, object]) -> list[dict[str, object]]:
    """Calls a method and returns its answers as JSON objects."""
    command = [str(Path(sys.executable).parent / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    command += ["--data", "@-", f"http://{address}/faceteer.v1.{method}"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    decoder, answers, text = json.JSONDecoder(), [], done.stdout.strip()
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].strip()
    return answers


@pytest.mark.slow
def test_another_languages_client_opens_a_picture_and_edits_it(tiny_bundle: Path, tmp_path: Path) -> None:
    process, address = start_all_in_one(tiny_bundle, tmp_path)
    try:
        image = base64.b64encode(picture_bytes(1)).decode()
        (opened,) = buf_curl(address, "StudioService/OpenImage", {"input": {"image": image}})
        assert opened["features"]
        events = buf_curl(
            address,
            "StudioService/EditImage",
            {
                "input": {"embeddingId": opened["embedding"]["embeddingId"]},
                "edits": [{"feature": {"label": "night"}, "operation": "EDIT_OPERATION_SET", "value": 1.0}],
                "settings": {"steps": 3, "seeds": ["7"]},
            },
        )
        assert "edited" in events[0]
        (picture,) = (event["image"] for event in events if "image" in event)
        with Image.open(io.BytesIO(base64.b64decode(picture["data"]))) as drawn:
            assert drawn.size == (64, 64)
    finally:
        process.terminate()
        process.wait(30)

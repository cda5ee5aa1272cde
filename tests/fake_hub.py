"""A small Hugging Face Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeHub:
    """As much of the Hugging Face Hub as its own client asks for; may cut a download short, once."""

    def __init__(self, root: Path) -> None:
        self.cut: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(head=True)

            def do_GET(self) -> None:
                self._answer(head=False)

            def _answer(self, head: bool) -> None:
                api = re.match(r"/api/models/([^/]+/[^/]+)/revision/\w+", self.path)
                file = re.match(r"/([^/]+/[^/]+)/resolve/\w+/([^?]+)", self.path)
                if api:
                    self._send(json.dumps(outer.about(root / api[1])).encode(), {"Content-Type": "application/json"})
                elif file and (root / file[1] / file[2]).is_file():
                    self._file(root / file[1] / file[2], head)
                else:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def _file(self, path: Path, head: bool) -> None:
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes"}
                start = 0
                if (asked := self.headers.get("Range")) and (found := re.match(r"bytes=(\d+)-", asked)):
                    start = int(found[1])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(data[start:], headers, head, 206 if start else 200, path.name)

            def _send(
                self, data: bytes, headers: dict[str, str], head: bool = False, code: int = 200, name: str = ""
            ) -> None:
                self.send_response(code)
                for key, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if head:
                    return
                if outer.cut == name:
                    outer.cut = None
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def about(repository: Path) -> dict[str, Any]:
        files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
        siblings = []
        for path in files:
            data = path.read_bytes()
            entry = {"rfilename": path.relative_to(repository).as_posix(), "size": len(data), "blobId": "b"}
            if path.suffix in (".safetensors", ".pth"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            siblings.append(entry)
        return {"id": "x", "modelId": "x", "sha": "c" * 40, "siblings": siblings, "tags": [], "private": False,
                "downloads": 0, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z"}  # fmt: skip

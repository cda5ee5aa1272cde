"""Asks a vision-language model what a feature's pictures have in common. Off unless an operator names an endpoint.

Speaks the chat-completions dialect that most servers offer (`POST <endpoint>/chat/completions`, pictures as data URLs).
Answers are kept in a file, so that a stopped run does not ask, or pay, twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faceteer_trainer.errors import JobError
from faceteer_trainer.labels.naming import Named

_PROMPT = (
    "The first {shown} pictures have something in common that the last {others} lack. Name it in one to four plain "
    'words. Answer with JSON only: {{"label": "...", "terms": ["...", "..."]}}, terms being up to four other words. '
    'If nothing is common, answer {{"label": "", "terms": []}}.'
)
_WAIT = (1.0, 2.0, 4.0, 8.0)


@dataclass
class VisionModel:
    """An endpoint.

    Attributes:
        endpoint: up to the version: "https://host/v1".
        model: its name there.
        api_key: sent as a bearer token; empty for none.
        timeout: of one call, in seconds.
        answers: the file in which answers are kept.
    """

    endpoint: str
    model: str
    answers: Path
    api_key: str = ""
    timeout: float = 60.0
    wait: Sequence[float] = _WAIT
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if not re.match(r"https?://", self.endpoint):
            raise JobError(f"--endpoint {self.endpoint}: must begin with http:// or https://")
        if self.answers.exists():
            for line in self.answers.read_text(encoding="utf-8").splitlines():
                # A line truncated by a kill is asked again.
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                self._known[entry["key"]] = entry

    def name(self, shown: Sequence[bytes], others: Sequence[bytes]) -> Named | None:
        """What the WebP files ``shown`` have in common and ``others`` lack; None where the model sees nothing.

        Raises:
            JobError: the endpoint refuses us or cannot be reached, after some tries. An answer that makes no sense is
                recorded and counts as None.
        """
        body = self._request(shown, others)
        key = hashlib.sha256(body).hexdigest()
        entry = self._known.get(key)
        if entry is None:
            entry = {"key": key, "answer": self._ask(body)}
            with self._lock, self.answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self._known[key] = entry
        return _named(entry["answer"])

    def _request(self, shown: Sequence[bytes], others: Sequence[bytes]) -> bytes:
        text = _PROMPT.format(shown=len(shown), others=len(others))
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for picture in (*shown, *others):
            url = "data:image/webp;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        message = {"role": "user", "content": content}
        return json.dumps(
            {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 200}, sort_keys=True
        ).encode()

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = self.endpoint.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, body, headers)
        for wait in (*self.wait, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                with error:
                    reason = error.read(300).decode(errors="replace").strip()
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise JobError(f"{address}: refuses the call ({error.code}: {reason})") from None
                problem = f"{error.code}: {reason}"
            except (ValueError, KeyError, IndexError, TypeError):
                return ""
            except OSError as error:
                problem = str(error)
            if wait is None:
                raise JobError(f"{address}: no answer after {len(self.wait) + 1} tries ({problem}); run again to go on")
            time.sleep(wait)
        raise AssertionError("unreachable")


def _named(answer: str) -> Named | None:
    """The label in a model's answer, which may stand in a code fence or between sentences."""
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        given = json.loads(found.group()) if found else {}
        label, terms = given["label"], given.get("terms", [])
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    if not isinstance(label, str) or not isinstance(terms, list):
        return None
    label = " ".join(label.split())[:120]
    if not label or not label.isprintable():
        return None
    return Named(label, tuple(" ".join(t.split())[:120] for t in terms if isinstance(t, str) and t.strip())[:4])

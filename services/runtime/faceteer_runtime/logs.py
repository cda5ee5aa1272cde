"""One line a log record on stderr: time, level, logger, request id, message.

A traceback becomes part of its line, so that lines stay records.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from faceteer_runtime.request import request_context


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z level=info logger=… request_id=… msg="…" trace="…"``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        seconds = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        parts = [f"{seconds}.{int(record.msecs):03d}Z", f"level={record.levelname.lower()}", f"logger={record.name}"]
        request_id = getattr(record, "request_id", None) or request_context().request_id
        if request_id:
            parts.append(f"request_id={request_id}")
        parts.append("msg=" + json.dumps(record.getMessage(), ensure_ascii=False))
        if record.exc_info:
            parts.append("trace=" + json.dumps(self.formatException(record.exc_info), ensure_ascii=False))
        return " ".join(parts)

    converter = staticmethod(time.gmtime)


def configure_logging(level: str) -> None:
    """Sends everything at ``level`` or above to stderr, replacing what was configured before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)

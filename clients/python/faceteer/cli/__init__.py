"""The command line ``faceteer``: the SDK's main jobs, with tables for people and ``--json`` for scripts.

Results go to stdout; progress, and one sentence on failure, to stderr.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from faceteer.cli.exit_statuses import FAILED


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs a command and exits with its status, never with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A label that the terminal's encoding lacks is shown as "?" rather than a failure.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors="replace")
    try:
        # The extra `cli` is optional.
        from faceteer.cli.run import run
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("faceteer: the command line needs two more packages: pip install 'faceteer[cli]'", file=sys.stderr)
        sys.exit(FAILED)
    status = run(sys.argv[1:] if arguments is None else list(arguments))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output (head, say) has closed it; flushing the rest must not fail at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)

"""What stops a job."""

from __future__ import annotations


class JobError(Exception):
    """What is wrong with a job's input, in one sentence that names the fix: printed without traceback, exit code 1."""

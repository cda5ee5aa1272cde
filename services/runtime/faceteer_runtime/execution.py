"""Fills in the ``Execution`` of an answer.

Knows nothing of how the times were measured.
"""

from __future__ import annotations

from faceteer.v1 import execution_pb2

from faceteer_runtime.request import request_context


def execution(
    revision: str, cached: bool = False, queue_us: int = 0, compute_us: int = 0, cache_us: int = 0
) -> execution_pb2.Execution:
    """What ran for this answer; times in microseconds. Takes the request id from the current request."""
    return execution_pb2.Execution(
        model_revision=revision,
        cached=cached,
        queue_us=int(queue_us),
        compute_us=int(compute_us),
        cache_us=int(cache_us),
        request_id=request_context().request_id,
    )

"""Prometheus metrics with bounded labels, on a registry of their own.

Labels are names from our own code (services, methods, codes, kinds, tiers), never
anything that a request carries.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from faceteer_runtime.settings import split_address

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}


class Metrics:
    """Everything that is measured. Several instances do not see each other."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        registry: Any = {"registry": self.registry}
        method = ("service", "method")
        self.calls = Counter("faceteer_calls", "Finished calls.", (*method, "code"), **registry)
        self.call_seconds = Histogram(
            "faceteer_call_seconds",
            "From admission to the last byte of the answer.",
            method,
            buckets=_SECONDS,
            **registry,
        )
        self.calls_in_flight = Gauge("faceteer_calls_in_flight", "Calls being answered.", **registry)
        self.http_calls = Counter(
            "faceteer_http_calls",
            "Finished calls over HTTP, which the gateway took.",
            (*method, "protocol", "code"),
            **registry,
        )
        self.http_call_seconds = Histogram(
            "faceteer_http_call_seconds",
            "From a call's headers over HTTP to the last byte of the answer.",
            method,
            buckets=_SECONDS,
            **registry,
        )
        self.batch_size = Histogram(
            "faceteer_batch_size", "Items in a batch.", ("batcher",), buckets=_SIZES, **registry
        )
        self.queue_depth = Gauge("faceteer_queue_depth", "Items waiting for a model.", ("batcher",), **registry)
        self.queue_refused = Counter(
            "faceteer_queue_refused", "Items refused by a full queue.", ("batcher",), **registry
        )
        self.queue_seconds = Histogram(
            "faceteer_queue_seconds",
            "From admission until the model took the item.",
            ("batcher",),
            buckets=_SECONDS,
            **registry,
        )
        self.model_seconds = Histogram(
            "faceteer_model_seconds", "Time in the model, by batch.", ("batcher",), buckets=_SECONDS, **registry
        )
        self.cache_hits = Counter("faceteer_cache_hits", "Values found.", ("tier", "kind"), **registry)
        self.cache_misses = Counter("faceteer_cache_misses", "Values not found in any tier.", ("kind",), **registry)
        self.cache_bytes = Gauge("faceteer_cache_bytes", "Bytes in the in-process cache.", **registry)
        self.cache_writes = Counter("faceteer_cache_writes", "Values written to Redis.", **registry)
        self.cache_writes_dropped = Counter(
            "faceteer_cache_writes_dropped", "Values not written to Redis.", ("reason",), **registry
        )
        self.cache_corrupt = Counter(
            "faceteer_cache_corrupt", "Values in Redis that were not what they should be.", **registry
        )
        self.redis_failures = Counter("faceteer_redis_failures", "Commands that Redis did not answer well.", **registry)
        self.redis_breaker = Gauge("faceteer_redis_breaker", "0 closed, 1 half open, 2 open.", **registry)

    def value(self, name: str, **labels: str) -> float:
        """The present value of a sample, 0.0 if there is none yet. For tests and status pages."""
        return self.registry.get_sample_value(name, labels) or 0.0


class MetricsServer:
    """The HTTP endpoint that Prometheus reads; ``port`` is the one bound."""

    def __init__(self, metrics: Metrics, address: str) -> None:
        host, port = split_address(address)
        self._server, self._thread = start_http_server(port, host.strip("[]"), metrics.registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

"""Asks for a server's gRPC health and reports it as the exit status: the container health check.

Usage: ``python -m faceteer_runtime.healthcheck HOST:PORT``.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check(address: str, *, timeout: float = 2.0) -> str:
    """The health of the whole server at ``address``: "SERVING", "NOT_SERVING" …, or the reason why nobody answered."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            return f"no answer: {error.code().name}"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> None:
    """Exits with 0 if the server serves, else with 1 and the reason."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m faceteer_runtime.healthcheck HOST:PORT")
    health = check(sys.argv[1])
    print(health)
    raise SystemExit(0 if health == "SERVING" else 1)


if __name__ == "__main__":
    main()

"""Every service in one process on one port: the same servicers and wiring, with calls between them in memory; and the
gateway, which serves them over HTTP on a second one.

The plain front door never imports this, so its container needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import faceteer_gateway.service
import grpc
from faceteer_encoder.settings import EncoderSettings
from faceteer_gateway.settings import GatewaySettings
from faceteer_generator.settings import GeneratorSettings
from faceteer_library.settings import LibrarySettings
from faceteer_runtime.server import run
from faceteer_runtime.service import Resources, Service
from faceteer_runtime.settings import ServiceSettings, parse_together
from faceteer_sae.settings import SaeSettings

from faceteer_studio.ports import Local, Ports
from faceteer_studio.service import build_over
from faceteer_studio.settings import AllInOneSettings

_SETTINGS: tuple[type[ServiceSettings], ...] = (EncoderSettings, SaeSettings, GeneratorSettings, LibrarySettings)


def _builders() -> dict[str, Callable[[Resources], Service]]:
    """Each service's own, in the order of their settings."""
    # Importing these takes seconds, because of torch; wrong settings or a missing bundle are reported before that.
    import faceteer_encoder.service
    import faceteer_generator.service
    import faceteer_library.service
    import faceteer_sae.service

    return {
        "encoder": faceteer_encoder.service.build,
        "sae": faceteer_sae.service.build,
        "generator": faceteer_generator.service.build,
        "library": faceteer_library.service.build,
    }


def build_with(settings: Sequence[ServiceSettings], resources: Resources) -> list[Service]:
    """All five services; ``settings`` are those of encoder, SAE, generator and library, in this order."""
    services = {
        name: build(Resources(own, resources.bundle, resources.cache, resources.metrics, resources.address))
        for (name, build), own in zip(_builders().items(), settings, strict=True)
    }
    local = {name: Local(name, service.register) for name, service in services.items()}
    studio, before_library = build_over(Ports(**local), resources)
    # Callers get the library with these two methods replaced; the studio itself calls the original ones.
    handlers = local["library"].handlers | before_library
    generic = grpc.method_handlers_generic_handler(services["library"].name, handlers)
    services["library"] = replace(
        services["library"], register=lambda server: server.add_generic_rpc_handlers((generic,))
    )
    # The studio last: it serves when the others have warmed up.
    return [*services.values(), studio]


def build(resources: Resources) -> list[Service]:
    """All five services, each with its settings from the environment and what it shares with the process'."""
    return build_with([settings.from_other(resources.settings) for settings in _SETTINGS], resources)


def gateway_of(settings: GatewaySettings, resources: Resources) -> Service:
    """The gateway, which calls this process at its own address, within the same event loop."""
    # When it is closed, this process has let all calls finish already.
    changes = {"gateway_studio_address": resources.address, "drain_seconds": min(settings.drain_seconds, 1.0)}
    own = settings.model_copy(update=changes)
    return faceteer_gateway.service.build(Resources(own, resources.bundle, resources.cache, resources.metrics))


def main(argv: Sequence[str]) -> None:
    """Serves until told to stop. Every service's flags are understood."""
    classes: list[type[ServiceSettings]] = [AllInOneSettings, GatewaySettings, *_SETTINGS]
    own, gateway, *others = parse_together(classes, argv)
    # The process decides what they share: one address, one bundle, one cache.
    shared = {name: getattr(own, name) for name in ServiceSettings.model_fields}

    def build_all(resources: Resources) -> list[Service]:
        services = build_with([each.model_copy(update=shared) for each in others], resources)
        over_http = gateway.model_copy(update=shared)
        assert isinstance(over_http, GatewaySettings)
        return [*services, gateway_of(over_http, resources)]

    run(own, build_all)

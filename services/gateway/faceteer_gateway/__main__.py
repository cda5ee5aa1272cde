"""Serves HTTP alone, in front of a studio elsewhere: ``python -m faceteer_gateway``."""

from faceteer_runtime.server import run

from faceteer_gateway.service import build
from faceteer_gateway.settings import GatewaySettings

if __name__ == "__main__":
    run(GatewaySettings.parse(), build)

"""Serves SaeService alone: ``python -m faceteer_sae --bundle DIRECTORY``."""

from faceteer_runtime.server import run

from faceteer_sae.service import build
from faceteer_sae.settings import SaeSettings

if __name__ == "__main__":
    run(SaeSettings.parse(), build)

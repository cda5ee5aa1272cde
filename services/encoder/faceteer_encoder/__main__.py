"""Serves EncoderService alone: ``python -m faceteer_encoder --bundle DIRECTORY``."""

from faceteer_runtime.server import run

from faceteer_encoder.service import build
from faceteer_encoder.settings import EncoderSettings

if __name__ == "__main__":
    run(EncoderSettings.parse(), build)

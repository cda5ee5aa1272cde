"""Serves GeneratorService alone: ``python -m faceteer_generator --bundle DIRECTORY``."""

from faceteer_runtime.server import run

from faceteer_generator.service import build
from faceteer_generator.settings import GeneratorSettings

if __name__ == "__main__":
    run(GeneratorSettings.parse(), build)

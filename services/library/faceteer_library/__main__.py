"""Serves LibraryService alone: ``python -m faceteer_library --bundle DIRECTORY``."""

from faceteer_runtime.server import run

from faceteer_library.service import build
from faceteer_library.settings import LibrarySettings

if __name__ == "__main__":
    run(LibrarySettings.parse(), build)

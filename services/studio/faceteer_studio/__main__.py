"""The front door: ``python -m faceteer_studio``; with ``--all-in-one``, every service in this one process."""

import sys

from faceteer_runtime.server import run

from faceteer_studio.service import build
from faceteer_studio.settings import StudioSettings


def main() -> None:
    arguments = sys.argv[1:]
    if "--all-in-one" in arguments:
        from faceteer_studio import all_in_one  # holds every model; the plain front door does without

        arguments.remove("--all-in-one")
        all_in_one.main(arguments)
    else:
        run(StudioSettings.parse(arguments), build)


if __name__ == "__main__":
    main()

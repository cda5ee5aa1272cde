"""``python -m faceteer.cli``, for when the script is not on the PATH."""

from faceteer.cli import main

if __name__ == "__main__":
    main()

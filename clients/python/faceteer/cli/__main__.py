"""``python -m faceteer.cli``, for when the script is not on the PATH.

Knows nothing but the entry point.
"""

from faceteer.cli import main

if __name__ == "__main__":
    main()

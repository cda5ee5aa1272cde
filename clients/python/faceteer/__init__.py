"""Edit images by their features: the Python SDK and command line of Faceteer."""

"""What every Faceteer service shares: settings, errors, serving, batching, cache, metrics."""

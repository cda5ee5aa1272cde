"""The asyncio client, written by hand. :mod:`faceteer._sync` is generated from it by ``clients/python/unasync.py``."""

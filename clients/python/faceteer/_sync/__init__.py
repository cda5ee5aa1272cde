# Generated from faceteer/_async/__init__.py by clients/python/unasync.py: edit that file, then run `make client`.
"""The blocking client, made by ``clients/python/unasync.py``."""

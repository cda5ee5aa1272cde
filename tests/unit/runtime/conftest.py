"""Settings of these tests' tools."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is not a failing test.
settings.register_profile("faceteer", deadline=None)
settings.load_profile("faceteer")

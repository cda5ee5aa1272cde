"""Fixtures of the SAE's tests."""

from __future__ import annotations

import pytest
from hypothesis import settings
from unit.sae.random_sae import ARCHITECTURES, Pair, random_sae

# A busy machine is not a failing test.
settings.register_profile("faceteer", deadline=None)
settings.load_profile("faceteer")


@pytest.fixture(params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """One SAE of each architecture."""
    return random_sae(request.param, seed=3)

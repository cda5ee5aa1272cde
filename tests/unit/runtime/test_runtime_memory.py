"""Room is asked for before anything is loaded."""

from __future__ import annotations

import pytest
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.memory import available_memory, require_memory


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_both_figures() -> None:
    assert 0 < available_memory() <= 1 << 62
    require_memory("weights", 1 << 30, "use less", available=1 << 30)
    words = r"weights: needs 3\.5 GiB of memory, but this machine has 1\.0 GiB to spare; use less, or free memory"
    with pytest.raises(BundleError, match=words):
        require_memory("weights", 7 << 29, "use less", available=1 << 30)

"""The order of features that share a name, by the figures alone."""

from __future__ import annotations

import numpy as np
import pytest
from faceteer_library.standing import order

UNKNOWN = float("nan")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((0.15, 0.99, 0.8), (0.3, 0.99, 0.6), id="causes more, fires less"),
        pytest.param((0.32, 0.9, 1.0), (0.16, 0.99, 1.0), id="fires twice as often, predicts worse"),
        pytest.param((0.148, 0.989, 1.0), (0.152, 0.962, 0.95), id="fires about as often, predicts better"),
        pytest.param((0.152, 0.989, 1.0), (0.148, 0.989, 1.0), id="all alike but for a little firing"),
        pytest.param((0.148, 0.9, UNKNOWN), (0.152, UNKNOWN, UNKNOWN), id="predicts, where the other was not measured"),
    ],
)
def test_the_feature_that_a_shared_name_means_comes_first(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    for rows, place in (([first, second], 0), ([second, first], 1)):
        columns = np.array(rows).T
        figures = dict(zip(("firing_share", "detection_score", "causal_score"), columns, strict=True))
        assert order(np.arange(2), figures, np.zeros(2, bool))[0] == place

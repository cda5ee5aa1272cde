"""The ruler of sharpness against pictures done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from faceteer_postcards.evaluation.sharpness import decibels, subject_box


def test_the_box_is_the_masks_grown_by_a_pixel_and_cut_at_the_edge() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[0:3, 4:6] = 1
    mask[7, 7] = 0.4  # hardly a subject
    assert subject_box(mask) == (slice(0, 4), slice(3, 7))
    assert subject_box(np.zeros((8, 8), np.float32)) == (slice(None), slice(None))


def test_a_difference_of_a_tenth_everywhere_is_20_db_and_equal_pictures_are_90() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert decibels(grey, grey + np.uint8(26)) == pytest.approx(19.83, abs=0.01)
    assert decibels(grey, grey) == pytest.approx(90)

"""Does what a feature causes look like its label? Measured on its icon: the template, and the feature turned up.

For each strength s the picture's embedding has moved from the template's by m_s = x_s - x_0. The score is the share of
all other labels towards which it has moved less than towards the feature's own, averaged over the strengths, of which
each counts by how far the picture has moved beyond what cannot be seen::

    share_s = mean over other labels o of [ m_s . t  >  m_s . t_o ]      (ties count half)
    w_s = max(0, |m_s| - 0.1 |x_0|)
    score = sum of w_s share_s / sum of w_s;  0.5 where every w_s is 0

0.5 is chance, or a feature that changes nothing; 1 means that nothing else in the library describes the change better.
Texts are centred and of norm 1. Knows nothing of how icons are drawn.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from faceteer_encoder.model import ClipEncoder
from faceteer_encoder.preprocess import Preprocessor
from PIL import Image

Floats = npt.NDArray[np.float32]
# Of the template's norm. One picture stored twice as WebP moves by up to 0.04; a changed picture by 0.15 and more.
_UNSEEN = 0.1
# The score of a feature that changes nothing to be seen.
NOTHING = 0.5


def causal_score(embeds: Floats, label: int, texts: Floats) -> float:
    """The score of one icon.

    Args:
        embeds: of the template, then of each strength, float32 [1 + s, d]; raw.
        label: the feature's own, by its place among the texts.
        texts: of all distinct labels, float32 [t, d], centred and of norm 1; at least two.
    """
    change = embeds[1:] - embeds[:1]
    weights = np.maximum(np.linalg.norm(change, axis=1) - _UNSEEN * np.linalg.norm(embeds[0]), 0)
    if not weights.any():
        return NOTHING
    moved = change @ texts.T
    own = moved[:, label : label + 1]
    others = np.delete(moved, label, axis=1)
    shares = ((own > others) + 0.5 * (own == others)).mean(1)
    return float(weights @ shares / weights.sum())


def embed_pictures(encoder: ClipEncoder, preprocessor: Preprocessor, pictures: Sequence[Image.Image]) -> Floats:
    """Embeddings of pictures, float32 [n, d], by the service's own way."""
    pixels = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        pixels.append(preprocessor.pixels(buffer.getvalue()))
    return np.stack(encoder.encode_images(pixels))

"""Does what a feature causes look like its label? Measured on its icon: the template, and the feature turned up.

For each strength s the picture's embedding has moved from the template's by x_s - x_0. The score is the share of all
other labels towards which it has moved less than towards the feature's own, averaged over the strengths::

    score = mean over s, over other labels o, of [ (x_s - x_0) . t  >  (x_s - x_0) . t_o ]      (ties count half)

0.5 is chance, 1 means that nothing else in the library describes the change better. Texts are centred and of norm 1.
Knows nothing of how icons are drawn.
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


def causal_score(embeds: Floats, label: int, texts: Floats) -> float:
    """The score of one icon.

    Args:
        embeds: of the template, then of each strength, float32 [1 + s, d]; raw.
        label: the feature's own, by its place among the texts.
        texts: of all distinct labels, float32 [t, d], centred and of norm 1; at least two.
    """
    moved = (embeds[1:] - embeds[:1]) @ texts.T
    own = moved[:, label : label + 1]
    others = np.delete(moved, label, axis=1)
    return float(((own > others) + 0.5 * (own == others)).mean())


def embed_pictures(encoder: ClipEncoder, preprocessor: Preprocessor, pictures: Sequence[Image.Image]) -> Floats:
    """Embeddings of pictures, float32 [n, d], by the service's own way."""
    pixels = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        pixels.append(preprocessor.pixels(buffer.getvalue()))
    return np.stack(encoder.encode_images(pixels))

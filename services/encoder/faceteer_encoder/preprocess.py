"""Picture bytes to the pixels that the model sees.

Nothing is decoded before the header has said how many pixels there are; resizing and
cropping are open_clip's own, so that embeddings are those of the reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from faceteer_runtime.image_files import read_image
from open_clip.transform import CenterCropOrPad, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

_GEOMETRY = (Resize, CenterCrop, ResizeKeepRatio, CenterCropOrPad)
# A strip longer than this many times its width is cut around its middle before resizing, which would otherwise blow a
# 1 x 50,000,000 picture up to the model's width. The model sees only the middle square of it anyway.
_LONGEST_STRIP = 32
# JPEGs above this are decoded at 1/2, 1/4 or 1/8 of their size, but never below this many times the model's: a quarter
# to a 64th of the memory and most of the time saved, for differences far below those of the JPEG itself.
_DRAFT_PIXELS, _DRAFT_OVERSAMPLING = 16_000_000, 4
_PILLOW = {
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
}
# What a field in an error is called before the servicer, which knows it, puts its own in.
_FIELD = "image"


class Preprocessor:
    """Makes pixels of picture files, as ``preprocess_cfg`` of open_clip_config.json says."""

    def __init__(self, preprocess_cfg: Mapping[str, Any], *, max_bytes: int, max_pixels: int) -> None:
        known = {field.name for field in fields(PreprocessCfg)}
        cfg = PreprocessCfg(**{name: value for name, value in preprocess_cfg.items() if name in known})
        size = cfg.size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._squash = cfg.resize_mode == "squash"
        transforms = image_transform_v2(cfg, is_train=False).transforms
        self._geometry: list[Any] = [transform for transform in transforms if isinstance(transform, _GEOMETRY)]
        if preprocess_cfg.get("crop_rounding") == "down":
            self._geometry = [
                _CropDown(self.size) if isinstance(transform, CenterCrop) else transform for transform in self._geometry
            ]
        self._mean = torch.tensor(cfg.mean).view(3, 1, 1)
        self._std = torch.tensor(cfg.std).view(3, 1, 1)
        self._max_bytes, self._max_pixels = max_bytes, max_pixels

    def pixels(self, data: bytes) -> np.ndarray:
        """Decodes, resizes and crops one picture.

        Args:
            data: a whole file, as :func:`faceteer_runtime.image_files.read_image` takes it.

        Returns:
            uint8 [height, width, 3], sRGB as stored; EXIF orientation applied, transparency laid on white, 16 bits a
            channel cut to the upper 8, CMYK converted.

        Raises:
            ImageTooLarge: more bytes or pixels than allowed; nothing was decoded.
            UnreadableImage: not a whole picture of these formats.
        """
        return read_image(
            data,
            self._fit,
            field=_FIELD,
            max_bytes=self._max_bytes,
            max_pixels=self._max_pixels,
            draft=self._drafted,
        )

    def normalised(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """Pictures, uint8 [height, width, 3] each, as the model's input, float32 [n, 3, height, width]."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return batch.float().div_(255).sub_(self._mean).div_(self._std)

    def _drafted(self, image: Image.Image) -> Image.Image:
        """A very large JPEG, decoded at a fraction of its size and resized as the whole would be; others as is."""
        resize = self._geometry[0]
        ordinary = isinstance(resize, Resize) and isinstance(resize.size, int)
        if image.format != "JPEG" or image.width * image.height <= _DRAFT_PIXELS or not ordinary:
            return image
        size, short = image.size, min(image.size)
        least = resize.size * _DRAFT_OVERSAMPLING
        drafted = image.draft(None, (least, least))
        if drafted is None:
            return image
        # By the box, because the draft's own size is rounded up and would shift the picture by up to a pixel.
        target = (int(resize.size * size[0] / short), int(resize.size * size[1] / short))
        return image.resize(target, _PILLOW[resize.interpolation], box=drafted[1])

    def _fit(self, image: Image.Image) -> Image.Image:
        if not self._squash:
            image = _without_far_ends(image)
        for transform in self._geometry:
            image = transform(image)
        return image


class _CropDown:
    """The middle of a picture as transformers cuts it: an odd pixel goes at the far side (torchvision rounds)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._height, self._width = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (image.width - self._width) // 2, (image.height - self._height) // 2
        return image.crop((left, top, left + self._width, top + self._height))


def _without_far_ends(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))

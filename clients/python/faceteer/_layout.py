"""Keeping a photo's layout while it is edited.

Knows nothing of calls. The server needs the photo's own bytes for it, so only a photo opened from a picture can.
"""

from __future__ import annotations

import hashlib
from typing import Any

from faceteer._errors import InvalidArgumentError
from faceteer._opening import OpenedPhoto
from faceteer._values import Settings, check_strength
from faceteer.v1 import studio_pb2

_METHODS = {
    "image_to_image": studio_pb2.LAYOUT_METHOD_IMAGE_TO_IMAGE,
    "inversion": studio_pb2.LAYOUT_METHOD_INVERSION,
}


def kept_layout(settings: Settings, photo: OpenedPhoto, recipe_photo: str) -> studio_pb2.KeepLayout | None:
    """What EditImage is asked to keep; None for a drawing from pure noise.

    Args:
        recipe_photo: SHA-256 of the picture that a recipe was made from; empty without one.

    Raises:
        InvalidArgumentError: the photo has no bytes, or strength goes with no method that takes one.
    """
    check_strength(settings)
    method = _METHODS.get(settings.keep_layout or "")
    if method is None:
        return None
    if photo.data is None:
        made_of = f" (the recipe's had SHA-256 {recipe_photo})" if recipe_photo else ""
        raise _invalid(
            "keep_layout",
            f"{photo.name} was opened without a picture, and only a picture has a layout; open the picture itself with "
            f"client.open(path){made_of}, or draw without keep_layout (keep_layout='none')",
        )
    return studio_pb2.KeepLayout(method=method, image=photo.data, strength=settings.strength)


def photo_digest(photo: OpenedPhoto) -> str:
    """SHA-256 of the photo's file, hexadecimal; empty when it was opened without one."""
    return hashlib.sha256(photo.data).hexdigest() if photo.data is not None else ""


def _invalid(field: str, description: str) -> Any:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)

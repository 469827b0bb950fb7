"""Bytes as text that stands in a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def picture_of(image: Image.Image, quality: int = 90) -> str:
    """A picture as the address of itself, in WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def base64_of(array: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(array.tobytes()).decode()

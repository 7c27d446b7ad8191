"""One picture file to one uint8 array, for every kind of file that people have.

Only the formats named here are tried, so no file can start an outside program (EPS would), and a
picture larger than Pillow's decompression-bomb limit is refused before its pixels are read. Below
it, decoding takes up to 12 bytes per pixel, and the largest pictures wait for each other.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm".split()
)
# A packed picture larger than this is taken for a bomb.
MAX_PACKED = 64 * 2**20
_GREY_MODES = ("1", "L", "LA", "La", "F")  # besides the modes I and I;16 of 16-bit greys
_ALPHA_MODES = ("LA", "La", "RGBA", "RGBa", "PA")
_LARGE = 1 << 25  # pixels; threads decode larger pictures one at a time
_large_one = threading.Lock()
_STRIP = 1 << 20  # pixels of a 16-bit picture converted at a time


class BadImage(Exception):
    """A file that cannot be used; the message is the reason, for the quarantine list."""


@dataclass(frozen=True)
class Header:
    """What can be told without decoding the pixels.

    Attributes:
        grey, alpha: decide the number of channels of a set.
        size: width and height as stored, EXIF rotation not undone.
    """

    grey: bool
    alpha: bool
    size: tuple[int, int]


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong inside becomes a BadImage with a one-line reason."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadImage(f"{image.width}x{image.height} is more than {limit} pixels")
            yield image
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not a readable image") from None
    except Exception as error:  # decoders of damaged files raise almost anything
        reason = " ".join(str(error).split())
        raise BadImage(f"{type(error).__name__}: {reason[:200]}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings (bombs, broken metadata): the quarantine list has the reasons.

    Wrap whole loops in it, not single calls: warning filters are shared by all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def read_header(file: BinaryIO, crop: int = 0) -> Header:
    """Read what kind of picture a file holds.

    Raises:
        BadImage: if it is no picture, too large a one, or smaller than the square to cut out.
    """
    with _opened(file) as image:
        _check_crop(image, crop)
        grey = image.mode in _GREY_MODES or image.mode.startswith("I")
        return Header(grey, _has_alpha(image), image.size)


def decode(file: BinaryIO, channels: int, resolution: int, crop: int = 0) -> np.ndarray:
    """Decode a picture: upright (EXIF), in 1, 3 or 4 channels, scaled and centre-cropped.

    16-bit and float greys are rounded to 8 bits; transparency is kept with 4 channels and laid
    on white otherwise; of an animation the first frame is taken.

    Args:
        crop: side of the square cut out of the middle before scaling; 0 is the largest there is.

    Returns:
        (channels, resolution, resolution) uint8.

    Raises:
        BadImage: if the file is damaged, or smaller than the square to cut out.
    """
    with _opened(file) as image:
        _check_crop(image, crop)
        with _large_one if image.width * image.height > _LARGE else nullcontext():
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return fit(convert(image, channels), resolution, crop)


def _check_crop(image: Image.Image, crop: int) -> None:
    if min(image.size) < crop:
        raise BadImage(f"{image.width}x{image.height} is smaller than --crop {crop}")


def decode_pixels(file: BinaryIO) -> np.ndarray:
    """A whole picture as it is: (H, W, 3) uint8.

    Raises:
        BadImage: if the file is damaged.
    """
    with _opened(file) as image:
        return np.asarray(convert(image, 3))


def convert(image: Image.Image, channels: int) -> Image.Image:
    """A picture of any mode in 1 (L), 3 (RGB) or 4 (RGBA) channels of 8 bits; it may be closed."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if channels == 4:
        return _in_mode(image, "RGBA")
    if _has_alpha(image):
        given, image = image, _in_mode(image, "RGBA")
        if given is not image:
            given.close()  # it would be the fourth of its size
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _in_mode(image, "L" if channels == 1 else "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Pillow would copy what has the mode already.
    return image if image.mode == mode and "transparency" not in image.info else (
        image.convert(mode))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greys (modes I;16 and I) and floats in [0, 1] (mode F) to mode L."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all():
        raise BadImage("NaN or infinity among the pixels")
    if values.min() < 0 or values.max() > top:
        raise BadImage(
            f"values from {values.min():g} to {values.max():g}, where 0 to {top:g} is expected"
        )
    result = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP // values.shape[1])
    for k in range(0, len(values), rows):
        result[k : k + rows] = np.round(values[k : k + rows].astype(np.float64) * (255 / top))
    return Image.fromarray(result)


def fit(image: Image.Image, resolution: int, crop: int = 0) -> np.ndarray:
    """Scale the short side to ``resolution`` and crop the centre: (C, resolution, resolution).

    Area averaging when shrinking, bicubic when enlarging; unchanged where the size is right. With
    ``crop`` the middle ``crop`` x ``crop`` pixels are all there is of the picture.
    """
    if crop:
        left, top = ((side - crop) // 2 for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    size = (resolution, resolution)
    if image.size != size:
        small = min(image.size) < resolution
        method = Image.Resampling.BICUBIC if small else Image.Resampling.BOX
        image = ImageOps.fit(image, size, method)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

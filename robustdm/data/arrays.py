"""Images in .npy and .npz files: never unpickled, every doubt an error that names the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdm.data.decode import convert, fit
from robustdm.errors import UsageError
from robustdm.untrusted import open_npz

_CHANNELS = (1, 3, 4)
# Noise reaches beyond black and white, but not so far: the range must be another's.
_FARTHEST = 100
_KEYS = ("images", "samples", "x_train", "x", "data", "arr_0")


def load_array(path: Path, value_range: tuple[float, float] | None = None) -> Tensor:
    """Read the images of a file.

    Accepted are (N, H, W), (N, H, W, C) and (N, C, H, W) with C = 1, 3 or 4, of uint8, or of
    floats either in [0, 1] (no negative value, the largest above 0.5) or in [-1, 1] (the smallest
    value at most -0.5); other floats are ambiguous. With ``value_range`` any numbers are accepted.

    Args:
        value_range: the values that become -1 and 1; others keep their place beside them.

    Returns:
        (N, C, H, W) uint8, or float32 in [-1, 1] unless ``value_range`` says otherwise.

    Raises:
        UsageError: naming what is wrong with the file and the remedy.
    """
    try:
        array = _read(path)
    except UsageError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        objects = any(word in str(error) for word in ("Object arrays", "Python objects"))
        why = "images of mixed shapes, or other objects: save one uint8 array" if objects else (
            f"cannot be read as an array: {_line(error)}")
        raise UsageError(f"{path}: {why}") from None
    return _checked(array, path, value_range)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        # Mapped, so that a header that promises too much fails at once.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if not magic.startswith(b"PK"):  # numpy would take it for a pickle
        raise ValueError("it is neither an .npy nor an .npz")
    with open_npz(path) as archive:
        keys = [key for key in _KEYS if key in archive] or archive.files
        if len(keys) > 1 and keys == archive.files:
            raise UsageError(
                f"{path}: holds the arrays {', '.join(keys[:8])}; name the one to use 'images'"
            )
        if not keys:
            raise ValueError("the archive is empty")
        return archive[keys[0]]


def _checked(
    array: np.ndarray, path: Path, value_range: tuple[float, float] | None
) -> Tensor:
    shape = array.shape
    if array.ndim not in (3, 4) or 0 in shape:
        raise UsageError(f"{path}: shape is {shape}: expected (N, H, W, C), none of them 0")
    if array.ndim == 3:
        array = array[:, None]
    else:
        last, first = shape[3] in _CHANNELS, shape[1] in _CHANNELS
        if last == first:
            why = "channels first or last cannot be told" if last else "no axis of 1, 3 or 4"
            raise UsageError(f"{path}: shape is {shape}: {why}; save (N, H, W, C)")
        if last:
            array = array.transpose(0, 3, 1, 2)
    if array.dtype == np.uint8 and value_range is None:
        return torch.from_numpy(np.array(array, order="C"))
    remedy = "say with --value-range LOW HIGH which values are black and white"
    numbers = array.dtype.kind in "fiu" if value_range else array.dtype.kind == "f"
    if not numbers:
        raise UsageError(f"{path}: dtype is {array.dtype}: save the images as uint8, 0 to 255"
                         + (f", or {remedy}" if array.dtype.kind in "iu" else ""))
    low, high = float(np.min(array)), float(np.max(array))  # NaN if there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UsageError(f"{path}: holds NaN or infinity: remove those images")
    values = np.array(array, dtype=np.float32, order="C")
    if value_range is not None:
        black, white = value_range
        values = (values - black) * (2 / (white - black)) - 1
        if np.abs(values).max() > _FARTHEST:
            raise UsageError(f"value_range is {black:g} {white:g}: {path} holds {low:g} to "
                             f"{high:g}, more than {_FARTHEST} times as far; give the values of "
                             "black and white")
    elif low >= 0 and 0.5 < high <= 1:
        values = values * 2 - 1
    elif not -1 <= low <= -0.5 or high > 1:
        raise UsageError(
            f"{path}: float values from {low:g} to {high:g} are neither [0, 1] nor [-1, 1] "
            f"beyond doubt: {remedy}"
        )
    return torch.from_numpy(values)


def fit_array(
    images: Tensor, resolution: int | None, path: Path, channels: int | None = None, crop: int = 0
) -> Tensor:
    """Images (N, C, H, W) in the wanted form, cut, scaled and converted like picture files.

    Args:
        resolution: side in pixels; None leaves the size as it is.
        channels: 1, 3 or 4; None leaves them as they are.
        crop: side of the square to cut out first, 0 for the largest.

    Raises:
        UsageError: for float images, which would have to be rounded, and too small ones.
    """
    now, height, width = images.shape[1:]
    resolution = min(crop or height, height, width) if resolution is None else resolution
    if min(height, width) < crop:
        raise UsageError(f"crop is {crop}: the images of {path} are {height}x{width}; leave it out")
    if height == width == resolution and channels in (None, now) and crop in (0, height):
        return images
    channels = channels or now
    if images.dtype != torch.uint8:
        raise UsageError(
            f"{path}: float images of {height}x{width}, channels {now}, are not brought to "
            f"{resolution}x{resolution}, channels {channels}: set --resolution and --channels to "
            "what they have, or save them as uint8"
        )
    result = torch.empty(len(images), channels, resolution, resolution, dtype=torch.uint8)
    for k, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        pixels = fit(convert(picture, channels), resolution, crop)
        result[k] = torch.from_numpy(pixels.copy())
    return result

"""Reading a set of images as it is, for evaluation: nothing is resized, cropped or left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdm.data.arrays import load_array
from robustdm.data.base import to_float
from robustdm.data.cifar import load_cifar
from robustdm.data.databases import is_hub
from robustdm.data.files import decode_all, open_pictures, scan
from robustdm.errors import RunError, UsageError
from robustdm.untrusted import open_npz


def read_images(
    path: Path, name: str, value_range: tuple[float, float] | None = None
) -> Tensor:
    """All samples of a file or folder, in their own size.

    Args:
        path: what ``python -m robustdm.sample`` wrote (unclipped samples, or points), an .npy or
            .npz of images, a folder, zip, lmdb or Hugging Face set of pictures of one size, or a
            copy of CIFAR (its training images).
        name: the flag, for errors.
        value_range: of an array, see `load_array`.

    Returns:
        (N, C, H, W) float32, in [-1, 1] unless they were unclipped samples; points are (N, D).

    Raises:
        UsageError: if there is nothing to read, or the pictures differ in size.
    """
    path = Path(path)
    if not path.exists() and not is_hub(path):
        raise UsageError(f"{name} is {str(path)!r}, which does not exist: name a folder, zip, .npy "
                         "or .npz of images")
    samples = written_samples(path)
    if samples is not None:
        return samples
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        return to_float(load_array(path, value_range))
    images = load_cifar(path)
    if images is not None:
        return to_float(images)
    try:
        pictures = scan(open_pictures(path), max_bad=0.0)
    except UsageError as error:
        raise UsageError(str(error).replace("data_dir is", f"{name} is")) from None
    except RunError as error:
        raise UsageError(f"{name} is {str(path)!r}: {error}".partition(". Remove")[0]
                         + ": remove or repair them") from None
    sizes = {}
    for picture in pictures.names:
        with pictures.source.open(picture) as file, Image.open(file) as image:
            sizes.setdefault(image.size, picture)
    if len(sizes) > 1:
        (first, one), (second, two) = list(sizes.items())[:2]
        raise UsageError(f"{name} is {str(path)!r}: its pictures differ in size ({one} is "
                         f"{first[0]}x{first[1]}, {two} {second[0]}x{second[1]}): bring them to "
                         "one size first")
    (width, height), = sizes
    if width != height:
        raise UsageError(f"{name} is {str(path)!r}: its pictures are {width}x{height}: only square "
                         "ones can be read")
    return to_float(decode_all(pictures, width, max_bad=0.0))


def written_samples(path: Path) -> Tensor | None:
    """Samples, images or points, as ``python -m robustdm.sample`` writes them: its folder or its
    .npz; None for anything else."""
    path = Path(path)
    if path.is_dir():
        path = path / "samples.npz"
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    try:
        with open_npz(path) as file:
            if file.files != ["samples"]:
                return None
            array = file["samples"]
    except Exception:  # load_array says what is wrong
        return None
    if array.dtype != np.float32 or array.ndim not in (2, 4) or not len(array):
        return None
    return torch.from_numpy(array)

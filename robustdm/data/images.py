"""Image sets: any folder, zip, database or array, and CIFAR; held on the device, or decoded while
training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustdm.data.arrays import fit_array, load_array
from robustdm.data.base import Data, ImageTensor, measure_images, sha256_of, to_float
from robustdm.data.cifar import EDITIONS, default_dir, load_cifar
from robustdm.data.corruption import (
    Corruption,
    ItemCorruption,
    Jpeg,
    MissingPixels,
    Outliers,
    SaltAndPepper,
)
from robustdm.data.databases import is_hub
from robustdm.data.decode import quiet
from robustdm.data.files import Pictures, check_quarantine, decode_all, open_pictures, scan
from robustdm.data.streamed import Beginning, StreamedImages
from robustdm.data.workers import (
    Collate,
    Decoded,
    Decoder,
    decode_in_workers,
    finish,
    host_part,
)
from robustdm.device import to_device
from robustdm.errors import RunError, UsageError
from robustdm.ops.stream import shuffled

if TYPE_CHECKING:
    from robustdm.runs.config import TrainConfig

_ARRAY_SUFFIXES = (".npy", ".npz")
# Side of the images that are looked at, at most, unless another is asked for.
_LARGEST = 256
# Outliers to choose from: more of them say nothing new, and they are held in memory.
_MAX_OUTLIERS = 16_384


class ImageFiles(Data):
    """Images too many for memory: decoded when asked for, by worker processes in training."""

    is_image = True

    def __init__(
        self, name: str, pictures: Pictures, resolution: int, max_bad: float,
        corruption: ItemCorruption | None, holdout: float, seed: int,
    ):
        shape = (pictures.channels, resolution, resolution)
        super().__init__(name, shape, len(pictures.names), corruption, holdout, seed)
        self.pictures, self.max_bad, self.files = pictures, max_bad, pictures.names
        self.quarantine = pictures.quarantine
        self.note = pictures.note

    def _decoder(self) -> Decoder:
        return Decoder(self.pictures, self.members, self.shape[1])

    def _fetch(self, indices: Tensor, collate: Collate) -> Decoded:
        decoder = self._decoder()
        with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return collate(list(pool.map(decoder.__getitem__, indices.tolist())))

    def _checked(self, decoded: Decoded) -> Decoded:
        """Note broken files, and end the run if there are too many."""
        self.quarantine.extend(
            entry for entry in dict.fromkeys(decoded.broken) if entry not in self.quarantine
        )
        check_quarantine(self.quarantine, self.pictures.found, self.max_bad)
        if decoded.pixels is None:
            raise RunError(f"{self.pictures.source.path}: no image can be read any more; check "
                           "the disk, then go on with --resume")
        return decoded

    def clean(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        decoded = self._checked(self._fetch(indices, Collate()))
        return to_float(to_device(decoded.pixels, torch.device(device)))

    def _noisy(self, decoded: Decoded, device: torch.device) -> Tensor:
        self._checked(decoded)
        return finish(decoded.pixels, self.members[decoded.positions], self.corruption, device)

    def _collate(self) -> Collate:
        return Collate(host_part(self.corruption), self.members)

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        return self._noisy(self._fetch(indices, self._collate()), torch.device(device))

    def stream(
        self, order: Iterator[Tensor], device: torch.device | str, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = decode_in_workers(
            self._decoder(), (indices.tolist() for indices in order), workers, self._collate(),
            self.pictures.source.path,
        )
        for decoded in loaded:
            yield self._noisy(decoded, torch.device(device)), decoded.positions

    def _measure(self, samples: Tensor) -> dict[str, float]:
        return measure_images(samples)

    @cached_property
    def _names_digest(self) -> str:
        return self.pictures.fingerprint()

    def _fingerprint(self) -> str:
        return self._names_digest


def _data_path(config: TrainConfig) -> Path:
    """The local copy to read, which exists, or the name of a Hugging Face data set."""
    path = config.data_dir
    edition = EDITIONS.get(config.data)
    if edition and path is None:
        path = default_dir(config.data)
        if not path.exists():
            raise UsageError(
                f"data_dir is not set and {path} does not exist: download {edition.url} into "
                f"{path}/, or name the archive's place with --data-dir"
            )
    if path is None:
        raise UsageError("data_dir is not set: name the folder, zip, .npy or .npz to train on")
    if not is_hub(path) and not path.exists():
        remedy = f"download {edition.url} and name it here" if edition else (
            "name a folder, zip, .npy or .npz of images")
        raise UsageError(f"data_dir is {str(path)!r}, which does not exist: {remedy}")
    return path


def open_images(config: TrainConfig) -> tuple[Path, Tensor | Pictures | Beginning]:
    """What a configuration's path holds: images as stored in an array or in CIFAR's files, the list
    of picture files, or the beginning of a stream.

    Raises:
        UsageError: if the files are missing or not what they should be.
        RunError: if too many of them are broken.
    """
    path = _data_path(config)
    if config.stream:
        return path, Beginning.read(config)
    images = None
    is_array = path.is_file() and path.suffix.lower() in _ARRAY_SUFFIXES
    if config.value_range is not None and not is_array:
        raise UsageError("value_range is {:g} {:g}: {} is no .npy or .npz, and picture files are "
                         "read as 8 bits; save their values as an array".format(
                             *config.value_range, path))
    if is_array:
        images = load_array(path, config.value_range)
    elif config.data != "images" or path.is_file():
        images = load_cifar(path, config.data if config.data in EDITIONS else None)
        if images is None and config.data in EDITIONS and (path / "train").is_dir():
            path = path / "train"  # folders of CIFAR keep the test images beside
    if images is None:
        images = scan(open_pictures(path), config.max_bad, config.channels, config.crop)
    return path, images


def _decoded(
    config: TrainConfig, path: Path, images: Tensor | Pictures, native: bool = False
) -> Tensor:
    """The images of a configuration in one tensor; ``native``: square ones in their own size."""
    if isinstance(images, Pictures):
        return decode_all(images, config.resolution, config.max_bad)
    square = images.shape[2] == images.shape[3]
    resolution = None if native and square else config.resolution
    return fit_array(images, resolution, path, config.channels, config.crop)


def image_data(config: TrainConfig, opened: tuple | None = None) -> Data:
    """The image set of a configuration.

    Args:
        opened: what `open_images` gave, if it was called already.

    Raises:
        UsageError: if the files are missing or not what they should be.
        RunError: if too many of them are broken.
    """
    path, images = open_images(config) if opened is None else opened
    name = config.data if config.data != "images" else path.name
    limit = config.resident_gib * 2**30
    if config.stream:
        return StreamedImages(name, images, config, corruption_of(config, images.pictures.channels))
    common = dict(holdout=config.holdout, seed=config.seed)
    if isinstance(images, Tensor):
        images = _decoded(config, path, images)
        corruption = corruption_of(config, images.shape[1])
        return ImageTensor(name, images, corruption, resident=images.nbytes <= limit, **common)
    corruption = corruption_of(config, images.channels)
    if len(images.names) * images.channels * config.resolution**2 > limit:
        return ImageFiles(name, images, config.resolution, config.max_bad, corruption, **common)
    data = ImageTensor(name, _decoded(config, path, images), corruption, **common)
    data.quarantine, data.note, data.files = images.quarantine, images.note, images.names
    return data


def image_set(fields: dict) -> tuple[TrainConfig, Data, Counter]:
    """A set of images to look at: all of it, whatever is broken, in the size that most of it has.

    Args:
        fields: of a configuration, data_dir among them; resolution None takes the smaller side of
            most images, at most 256.

    Returns:
        The configuration it is read with, the set, and how many images there are of each (width,
        height) as stored.

    Raises:
        UsageError: if there are no images, or a field is wrong.
        RunError: if reading fails.
    """
    from robustdm.runs.config import TrainConfig
    from robustdm.runs.presets import preset_values

    resolution = fields.get("resolution")
    config = TrainConfig(**preset_values("folder") | fields | dict(
        block_channels=(32,), holdout=0.0, max_bad=1.0,
        resolution=32 if resolution is None else resolution))
    path, images = open_images(config)
    if hasattr(images, "shape"):
        count, _, height, width = images.shape
        sizes = Counter({(width, height): count})
    else:
        sizes = getattr(images, "pictures", images).sizes
    if resolution is None:
        sides = Counter()
        for size, count in sizes.items():
            sides[config.crop or min(size)] += count
        config = replace(config, resolution=min(_LARGEST, sides.most_common(1)[0][0]))
    return config, image_data(config, (path, images)), sizes


def images_for_subspace(config: TrainConfig) -> tuple[Tensor, list[tuple[str, str]]]:
    """Images (N, C, H, W) to fit a subspace to, uint8 or float32 in [-1, 1], and the broken files.

    Arrays of square images keep their size in PCA coordinates, where the network never sees it;
    everything else has ``config.resolution``.
    """
    path, images = open_images(config)
    decoded = _decoded(config, path, images, native=config.subspace_space == "pca")
    return decoded, images.quarantine if isinstance(images, Pictures) else []


def corruption_of(config: TrainConfig, channels: int) -> ItemCorruption:
    """The corruption of a configuration's images, which have so many channels.

    Raises:
        UsageError: if the images that outliers are taken from are missing or of no use.
        RunError: if too many of their files are broken.
    """
    fraction, seed = config.corrupt_fraction, config.seed
    match config.corrupt_kind:
        case "salt_pepper":
            return SaltAndPepper(fraction, config.corrupt_pixels, seed)
        case "missing":
            return MissingPixels(fraction, config.corrupt_pixels, seed)
        case "jpeg":
            return Jpeg(fraction, config.corrupt_quality, seed)
        case "outliers":
            images = _outlier_images(config, channels)
            return Outliers(fraction, images, seed, config.corrupt_with.name, sha256_of(images))
    return Corruption(fraction, config.corrupt_sigma, seed)


def _outlier_images(config: TrainConfig, channels: int) -> Tensor:
    """(M, channels, R, R) uint8."""
    other = replace(config, data="images", data_dir=config.corrupt_with, channels=channels, crop=0,
                    corrupt_kind="gaussian", corrupt_with=None)
    try:
        path, images = open_images(other)
        if isinstance(images, Pictures):
            images.names = [images.names[k] for k in _some(len(images.names))]
        else:
            images = images[_some(len(images))]
        images = _decoded(other, path, images)
    except UsageError as error:
        raise UsageError(str(error).replace("data_dir is", "corrupt_with is")) from None
    if images.dtype != torch.uint8:
        raise UsageError(f"corrupt_with is {str(config.corrupt_with)!r}: it holds floats, save "
                         "the images as uint8")
    return images


def _some(count: int) -> Tensor:
    """At most `_MAX_OUTLIERS` of so many indices, drawn at random, in rising order."""
    return shuffled(0, 0, count)[:_MAX_OUTLIERS].sort().values

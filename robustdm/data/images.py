"""Image sets: any folder, zip or array, and CIFAR-10; held on the device, or streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustdm.data.arrays import load_array, resize_array
from robustdm.data.base import Data, TensorData, to_float
from robustdm.data.cifar import DEFAULT_DIR, URL, load_cifar
from robustdm.data.corruption import Corruption
from robustdm.data.decode import quiet
from robustdm.data.files import (
    Decoded,
    Decoder,
    Pictures,
    check_quarantine,
    decode_all,
    open_pictures,
    scan,
    start_worker,
)
from robustdm.device import to_device
from robustdm.errors import RunError, UsageError
from robustdm.metrics import spread

if TYPE_CHECKING:
    from robustdm.training.config import TrainConfig

_ARRAY_SUFFIXES = (".npy", ".npz")


def _measure_images(samples: Tensor) -> dict[str, float]:
    """What can be said without knowing the clean law: ``pixel_std``, the mean per-pixel std."""
    return {"pixel_std": spread(samples)}


class ImageTensor(TensorData):
    """Images in one tensor (N, C, H, W), uint8 or float32 in [-1, 1]."""

    is_image = True

    def _measure(self, samples: Tensor) -> dict[str, float]:
        return _measure_images(samples)


class ImageFiles(Data):
    """Images too many for memory: decoded when asked for, by worker processes in training."""

    is_image = True

    def __init__(
        self, name: str, pictures: Pictures, resolution: int, max_bad: float,
        corruption: Corruption | None, holdout: float, seed: int,
    ):
        shape = (pictures.channels, resolution, resolution)
        super().__init__(name, shape, len(pictures.names), corruption, holdout, seed)
        self.pictures, self.max_bad = pictures, max_bad
        self.quarantine = pictures.quarantine
        self.note = pictures.note

    def _decoder(self) -> Decoder:
        return Decoder(self.pictures, self.members, self.shape[1])

    def _fetch(self, indices: Tensor) -> Decoded:
        decoder = self._decoder()
        with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return Decoded.collate(list(pool.map(decoder.__getitem__, indices.tolist())))

    def _finish(self, decoded: Decoded, device: torch.device, noisy: bool) -> Tensor:
        """Note broken files; (B, C, R, R) float32 on the device."""
        self.quarantine.extend(
            entry for entry in dict.fromkeys(decoded.broken) if entry not in self.quarantine
        )
        check_quarantine(self.quarantine, self.pictures.found, self.max_bad)
        if decoded.pixels is None:
            raise RunError(f"{self.pictures.source.path}: no image can be read any more; check "
                           "the disk, then go on with --resume")
        x = to_float(to_device(decoded.pixels, device))
        if noisy and self.corruption:
            return self.corruption(x, to_device(self.members[decoded.positions], device))
        return x

    def clean(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        return self._finish(self._fetch(indices), torch.device(device), noisy=False)

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        return self._finish(self._fetch(indices), torch.device(device), noisy=True)

    def stream(
        self, order: Iterator[Tensor], device: torch.device | str, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = torch.device(device)
        loader = torch.utils.data.DataLoader(
            self._decoder(), batch_sampler=(indices.tolist() for indices in order),
            num_workers=workers, collate_fn=Decoded.collate, worker_init_fn=start_worker,
            generator=torch.Generator(),  # else it would take a number from the global one
        )
        batches = iter(loader)
        while True:
            try:
                decoded = next(batches)
            except (RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise RunError(
                    f"reading images of {self.pictures.source.path} failed: {reason}; --workers 0 "
                    "reads them in this process"
                ) from error
            yield self._finish(decoded, device, noisy=True), decoded.positions

    def _measure(self, samples: Tensor) -> dict[str, float]:
        return _measure_images(samples)

    @cached_property
    def _names_digest(self) -> str:
        return self.pictures.fingerprint()

    def _fingerprint(self) -> str:
        return self._names_digest


def _data_path(config: TrainConfig) -> Path:
    """The local copy to read, which exists."""
    path = config.data_dir
    if config.data == "cifar10" and path is None:
        path = DEFAULT_DIR
        if not path.exists():
            raise UsageError(
                f"data_dir is not set and {path} does not exist: download {URL} into {path}/, or "
                "name the archive's place with --data-dir"
            )
    if path is None:
        raise UsageError("data_dir is not set: name the folder, zip, .npy or .npz to train on")
    if not path.exists():
        remedy = f"download {URL} and name it here" if config.data == "cifar10" else (
            "name a folder, zip, .npy or .npz of images")
        raise UsageError(f"data_dir is {str(path)!r}, which does not exist: {remedy}")
    return path


def _load(config: TrainConfig, native: bool = False) -> tuple[Path, Tensor | Pictures]:
    """Images as stored in an array or in CIFAR-10's files, or the list of picture files."""
    path = _data_path(config)
    images = None
    if path.is_file() and path.suffix.lower() in _ARRAY_SUFFIXES:
        images = load_array(path)
    elif config.data in ("cifar10", "subspace"):
        images = load_cifar(path)
        if images is None and config.data == "cifar10" and (path / "train").is_dir():
            path = path / "train"  # folders of CIFAR-10 keep the test images beside
    if images is None:
        return path, scan(open_pictures(path), config.max_bad)
    square = images.shape[2] == images.shape[3]
    return path, images if native and square else resize_array(images, config.resolution, path)


def image_data(config: TrainConfig, corruption: Corruption | None) -> Data:
    """The image set of a configuration.

    Raises:
        UsageError: if the files are missing or not what they should be.
        RunError: if too many of them are broken.
    """
    path, loaded = _load(config)
    name = config.data if config.data != "images" else path.name
    limit = config.resident_gib * 2**30
    common = dict(corruption=corruption, holdout=config.holdout, seed=config.seed)
    if isinstance(loaded, Tensor):
        return ImageTensor(name, loaded, resident=loaded.nbytes <= limit, **common)
    size = len(loaded.names) * loaded.channels * config.resolution**2
    if size > limit:
        return ImageFiles(name, loaded, config.resolution, config.max_bad, **common)
    data = ImageTensor(name, decode_all(loaded, config.resolution, config.max_bad), **common)
    data.quarantine, data.note = loaded.quarantine, loaded.note
    return data


def images_for_subspace(config: TrainConfig) -> tuple[Tensor, list[tuple[str, str]]]:
    """Images (N, C, H, W) to fit a subspace to, uint8 or float32 in [-1, 1], and the broken files.

    Arrays of square images keep their size in PCA coordinates, where the network never sees it;
    everything else has ``config.resolution``.
    """
    _, loaded = _load(config, native=config.subspace_space == "pca")
    if isinstance(loaded, Tensor):
        return loaded, []
    return decode_all(loaded, config.resolution, config.max_bad), loaded.quarantine

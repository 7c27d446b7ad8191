"""Training data behind one small interface: ``load_data(config)`` and ``batches(...)``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustdm.data.base import Data, TensorData
from robustdm.data.corruption import Corruption, ItemCorruption
from robustdm.data.digits import DigitsData, load_digits
from robustdm.data.points import GaussiansData, PlaneData, PointData
from robustdm.data.subspace import SubspaceData, principal_components
from robustdm.distributed import ALONE, Ranks
from robustdm.errors import UsageError
from robustdm.ops.stream import Stream, philox, shuffled, uniform

if TYPE_CHECKING:
    from robustdm.runs.config import TrainConfig

__all__ = [
    "Corruption", "Data", "DigitsData", "GaussiansData", "ItemCorruption", "PlaneData", "PointData",
    "SubspaceData", "TensorData", "batches", "load_data",
]

# Images that a subspace is fitted to: more cost minutes and change no component that matters.
_MAX_PCA = 2048


def load_data(config: TrainConfig) -> Data:
    """Build the training set that a configuration names.

    The corruption (``corrupt_...``) applies to images, its Gaussian kind to subspace data too; the
    3-D sets have ``point_noise`` instead.

    Raises:
        UsageError: if the data are missing, empty, or not what the configuration says.
        RunError: if more than ``max_bad`` of the files are broken.
    """
    if config.data in ("digits", "plane", "gaussians") and config.data_dir is not None:
        raise UsageError(
            f"data_dir is {str(config.data_dir)!r}: {config.data} needs none; use --data images "
            "for pictures of your own"
        )
    if config.stream and not (config.data == "images" and str(config.data_dir).startswith("hf:")):
        raise UsageError("stream is True: only --data images --data-dir hf:NAME is a stream; what "
                         "is larger than --resident-gib is read from disk while training anyway")
    common = dict(holdout=config.holdout, seed=config.seed)
    if config.data in ("plane", "gaussians", "subspace") and config.corrupt_kind != "gaussian":
        raise UsageError(f"corrupt_kind is {config.corrupt_kind!r}: {config.data} has no images to "
                         "spoil in that way, use gaussian")
    if config.data == "digits":
        if config.resolution != 8:
            raise UsageError(f"resolution is {config.resolution}: the digits are 8x8, set it to 8")
        from robustdm.data.images import corruption_of

        data = DigitsData(corruption_of(config, channels=1), **common)
    elif config.data in ("plane", "gaussians"):
        kind = PlaneData if config.data == "plane" else GaussiansData
        data = kind(config.data, config.point_noise, config.point_noise_level,
                    config.num_points, **common)
    elif config.data == "subspace":
        corruption = Corruption(config.corrupt_fraction, config.corrupt_sigma, config.seed)
        data = _subspace(config, corruption)
    else:
        from robustdm.data.images import image_data

        data = image_data(config)
    if config.flip and not data.is_image:
        raise UsageError(f"flip is True: {config.data} has no images to flip, leave it out")
    return data


def _subspace(config: TrainConfig, corruption: Corruption) -> SubspaceData:
    from robustdm.data.base import sha256_of, to_float

    if config.data_dir is None:
        images, quarantine = load_digits(), []
    else:
        from robustdm.data.images import images_for_subspace

        images, quarantine = images_for_subspace(config)
    if len(images) > _MAX_PCA:
        images = images[shuffled(0, 0, len(images))[:_MAX_PCA]]
    mean, sds, basis = principal_components(to_float(images), config.subspace_rank)
    source = sha256_of(images)
    common = dict(count=config.num_points, corruption=corruption, holdout=config.holdout,
                  seed=config.seed, source=source)
    if config.subspace_space == "pca":
        data = SubspaceData.from_sds(sds, config.subspace_noise_dims, **common)
    elif images.shape[-1] != config.resolution:
        raise UsageError(
            f"resolution is {config.resolution}: the images of the subspace are "
            f"{images.shape[-1]}x{images.shape[-1]}, set it to {images.shape[-1]}"
        )
    else:
        data = SubspaceData(sds, mean, basis, tuple(images.shape[1:]), **common)
    data.quarantine = quarantine
    return data


def batches(
    data: Data, config: TrainConfig, start_step: int, device: torch.device | str,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The endless training stream from a step on; a pure function of the step.

    Args:
        ranks: the processes that share each batch; this one's part is yielded.

    Yields:
        x (B, *shape) float32 on the device, B being batch_size over the number of ranks; and its
        indices (B,) int64 on the host. A streamed image that
        cannot be read is replaced by the next one, in both.
    """
    part = ranks.share(config.batch_size)
    order = (indices[part.start : part.stop]
             for indices in data.order(config.batch_size, config.seed, start_step))
    for step, (x, indices) in enumerate(data.stream(order, device, config.workers), start_step):
        if config.flip:
            sample = torch.arange(part.start, part.stop, device=x.device)
            word, _, _, _ = philox(config.seed, step, sample, Stream.FLIP)
            x = torch.where((uniform(word) < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
        yield x, indices

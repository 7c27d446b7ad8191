"""The one random stream of the project: Philox4x32-10 in plain torch, the reference for kernels.

Every random number of training and sampling is a pure function of (seed, step, stream, index), so
noise can be regenerated instead of stored, a batch may be split or spread over ranks without
changing a number, and a resumed run continues the very same sequence.

Key and counter of the generator::

    key     = (seed, step)                                  two 32-bit words
    counter = (index low, index high, stream, layout)       four 32-bit words

On the same key and counter the words equal ``tl.philox(seed + (step << 32), *counter)`` bit for
bit. ``index`` is a global element index, ``(first_index + sample) * numel + element``, for the
streams that draw per element, and a global sample index for those that draw per sample. A training
step's own noise (`Stream.ELEMENT`) and the dropout masks cost less than a call per element: see
`element_noise` and `dropout_mask`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from robustdm.errors import UsageError

# Part of every checkpoint: a run may only be resumed under the layout it was started with.
# 2: ELEMENT draws for four elements at a time, in channels-last order; DROPOUT_MASK and DELTA are
#    new.
LAYOUT_VERSION = 2

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a counter is used for. Numbers are part of the layout: never reuse or renumber."""

    ELEMENT = 0  # per four elements of a training step: words 0, 1 and 2, 3 -> two of eps each
    SAMPLE = 1  # per sample of a training step: word 0 -> t; word 1 -> beta
    BATCH = 2  # per training step, index 0: word 1 -> the beta shared by the batch
    DROPOUT = 3  # per (micro-)batch, index = first sample: words 0, 1 -> seed of the generator
    ORDER = 4  # key (seed, epoch), per data item: words 0, 1 -> sort key of the shuffle
    FLIP = 5  # per sample of a training step: word 0 -> horizontal flip
    # key (seed, 0), per data item: word 0 -> corrupted or not; word 1 -> by which outlier
    CORRUPT_CHOICE = 6
    CORRUPT_NOISE = 7  # key (seed, 0), per element of the data set: words 0, 1 -> z
    SYNTHETIC = 8  # key (seed, 0), per element of a synthetic data set
    SAMPLER_INIT = 9  # key (seed, 0), per element of the generated samples: x_T
    SAMPLER_STEP = 10  # key (seed, timestep), per element of the generated samples: z
    DROPOUT_MASK = 11  # + 256 * layer; per 8 channels of an activation: 16 bits -> kept or dropped
    DELTA = 12  # per four elements of a training step: each word -> one of delta_ran
    # + 256 * n, key (seed, timestep), per element of the generated samples: n = 0 is the attack's
    # start (words 0, 1) and random sign (word 2), n > 0 the n-th noise of an expectation.
    ATTACK = 13
    CORRUPT_PIXEL = 14  # key (seed, 0), per pixel of the data set: word 0 -> hit; word 1 -> colour


def check_word(name: str, value: int) -> int:
    """Return ``value`` if it fits an unsigned 32-bit word, else raise a UsageError naming it."""
    if not 0 <= int(value) <= WORD:
        raise UsageError(f"{name} is {value}: it must be an integer from 0 to {WORD}")
    return int(value)


def philox(
    seed: int | Tensor, step: int | Tensor, index: Tensor, stream: int, layout: int = LAYOUT_VERSION
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four independent 32-bit words for every index.

    Args:
        seed: first key word, 0 to 2**32 - 1; of an int64 scalar tensor the lower word counts.
        step: second key word, likewise.
        index: (...) int64, the low and high counter words.
        stream: third counter word.
        layout: fourth counter word.

    Returns:
        Four int64 tensors shaped like ``index``, with values 0 to 2**32 - 1.
    """
    k0 = seed & WORD if isinstance(seed, Tensor) else check_word("seed", seed)
    k1 = step & WORD if isinstance(step, Tensor) else check_word("step", step)
    c0, c1 = index & WORD, (index >> 32) & WORD
    c2, c3 = torch.full_like(index, int(stream)), torch.full_like(index, int(layout))
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so their bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(WORD), p0.bitwise_and_(WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def philox_int(
    seed: int, step: int, index: int, stream: int, layout: int = LAYOUT_VERSION
) -> tuple[int, int, int, int]:
    """`philox` of one index in Python integers: for a single number, without a hundred launches."""
    k0, k1 = check_word("seed", seed), check_word("step", step)
    c0, c1, c2, c3 = index & WORD, (index >> 32) & WORD, int(stream), int(layout)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def uniform(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1) from the top 24 bits: exact in float32, hence equal on every device."""
    return (word >> 8).to(dtype) * 2.0**-24


def signed_uniform(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in (-1, 1), symmetric and never zero, from the top 23 bits; exact in float32."""
    return (((word >> 9) << 1) + (1 - 2**23)).to(dtype) * 2.0**-23


def _box_muller(word0: Tensor, word1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Length and angle of a normal pair, in float32 at least."""
    work = torch.promote_types(dtype, torch.float32)
    u = (word0.to(work) * 2.0**-32).clamp_(min=2.0**-33)
    return u.log_().mul_(-2).sqrt_(), (word1.to(work) * 2.0**-32).mul_(2 * math.pi)


def normal(word0: Tensor, word1: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal by Box-Muller from two words: |z| < 6.8, a few ulp apart across devices.

    Computed in float32 at least and rounded to ``dtype`` once: half precision holds no 2**-33.
    """
    length, angle = _box_muller(word0, word1, dtype)
    return length.mul_(angle.cos_()).to(dtype)


def normal_pair(
    word0: Tensor, word1: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two words: both halves of Box-Muller.

    Computed in float32 at least and rounded to ``dtype`` once: half precision holds no 2**-33.
    """
    length, angle = _box_muller(word0, word1, dtype)
    return (length * angle.cos()).to(dtype), length.mul_(angle.sin_()).to(dtype)


def element_noise(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The noise of one training step: a normal and a signed uniform number for every element.

    Elements are counted in channels-last order, ``spatial * C + channel``, whatever the memory
    format, and call k of a sample serves its elements 4 k to 4 k + 3: of `Stream.ELEMENT` words 0
    and 1 the first two normals (cosine and sine half), words 2 and 3 the other two; of
    `Stream.DELTA` word j the j-th uniform. So a kernel needs a quarter of a call per number.

    Args:
        key: (3,) int64 on the device to draw on: seed, step, global index of the first sample.
        shape: (B, C, *spatial), (B, D) or (B,).
        dtype: floating-point type of the numbers, float32 or wider.

    Returns:
        eps and the uniform in (-1, 1), both of ``shape``; for images with channels-last strides.
    """
    numel = math.prod(shape[1:])
    calls = (numel + 3) // 4
    index = torch.arange(shape[0] * calls, device=key.device) + key[2] * calls
    w0, w1, w2, w3 = philox(key[0], key[1], index, Stream.ELEMENT)
    normals = *normal_pair(w0, w1, dtype), *normal_pair(w2, w3, dtype)
    words = philox(key[0], key[1], index, Stream.DELTA)
    channels_last = (shape[0], *shape[2:], *shape[1:2])

    def place(*values: Tensor) -> Tensor:
        flat = torch.stack(values, 1).view(shape[0], 4 * calls)[:, :numel]
        return flat.reshape(channels_last).movedim(-1, min(1, len(shape) - 1))

    return place(*normals), place(*(signed_uniform(word, dtype) for word in words))


def dropout_mask(key: Tensor, shape: tuple[int, ...], layer: int, rate: float) -> Tensor:
    """Which elements of an activation survive dropout: True with probability 1 - rate.

    One call serves eight channels: element (n, c, s) takes 16 bits of word (c % 8) // 2, the lower
    half for even c, of call ``((first_index + n) * S + s) * ceil(C / 8) + c // 8``, and survives if
    they are at least round(65536 * rate).

    Args:
        key: (3,) int64: seed, step, global index of the first sample.
        shape: (B, C, *spatial) of the activation.
        layer: number of the layer, so that each has masks of its own.
        rate: probability of being dropped, from 0 to below 1.

    Returns:
        (B, C, *spatial) bool, with channels-last strides.
    """
    batch, channels, *spatial = shape
    calls = (channels + 7) // 8
    sites = batch * math.prod(spatial) * calls
    index = torch.arange(sites, device=key.device) + key[2] * math.prod(spatial) * calls
    words = philox(key[0], key[1], index, Stream.DROPOUT_MASK + 256 * layer)
    bits = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], 1)
    kept = bits >= round(65536 * rate)
    kept = kept.view(batch, *spatial, 8 * calls)[..., :channels]
    return kept.movedim(-1, 1)


def element_index(first_index: int, shape: tuple[int, ...], device=None) -> Tensor:
    """Global element indices of a batch: ``(first_index + sample) * numel + element``.

    Args:
        first_index: global index of the batch's first sample.
        shape: (B, ...) shape of the batch.

    Returns:
        Tensor of ``shape``, int64.
    """
    numel = math.prod(shape[1:])
    start = first_index * numel
    return torch.arange(start, start + shape[0] * numel, device=device).view(shape)


def shuffled(seed: int, epoch: int, size: int, device=None) -> Tensor:
    """A permutation of ``range(size)`` that depends on (seed, epoch) alone: (size,) int64."""
    high, low, _, _ = philox(seed, epoch, torch.arange(size, device=device), Stream.ORDER)
    # 63 bits and a stable sort: ties are all but impossible and still resolved the same way.
    return torch.argsort((high >> 1 << 32) | low, stable=True)

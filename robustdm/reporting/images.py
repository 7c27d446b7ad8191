"""Writing pictures: samples in [-1, 1] to uint8, PNG files and grids. NumPy and Pillow only."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from robustdm.errors import UsageError

# Grids of small pictures are enlarged until a picture is about this many pixels high.
VISIBLE_PIXELS = 64


def to_uint8(samples) -> np.ndarray:
    """Pixels of samples: -1 becomes 0 and 1 becomes 255, rounded; what lies outside is clipped.

    Args:
        samples: (N, C, H, W) torch tensor or array, any floating dtype, C in {1, 3, 4}.

    Returns:
        (N, H, W, C) uint8. Pixels that are not finite numbers come out black.

    Raises:
        UsageError: for another shape.
    """
    if hasattr(samples, "detach"):
        samples = samples.detach().float().cpu().numpy()
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim != 4 or samples.shape[1] not in (1, 3, 4):
        raise UsageError(
            f"samples have shape {samples.shape}: pictures are (N, C, H, W) with 1, 3 or 4 channels"
        )
    pixels = np.nan_to_num((samples + 1) * 127.5, nan=0, posinf=0, neginf=0)
    return pixels.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 to a picture: grey, RGB or RGBA by the number of channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(samples, columns: int | None = None, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """Samples side by side, row by row.

    Args:
        samples: (N, C, H, W), as for ``to_uint8``; N at least 1.
        columns: pictures in a row; by default as square as possible.
        scale: whole factor of enlargement (nearest neighbour); by default small pictures are
            enlarged to about VISIBLE_PIXELS.
        gap: white pixels between pictures.

    Returns:
        (H', W', C) uint8.

    Raises:
        UsageError: for no samples, another shape, or columns or scale below 1.
    """
    pixels = to_uint8(samples)
    count, height, width, channels = pixels.shape
    if count == 0:
        raise UsageError("samples are empty: a grid needs at least one picture")
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if scale is None:
        scale = max(1, round(VISIBLE_PIXELS / height))
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255,
                    dtype=np.uint8)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top:top + height, left:left + width] = picture
    return sheet


def grid_png(samples, columns: int | None = None) -> bytes:
    """``grid(samples, columns)`` as a PNG."""
    buffer = io.BytesIO()
    to_pil(grid(samples, columns)).save(buffer, format="png")
    return buffer.getvalue()


def save_grid(path, samples, columns: int | None = None, scale: int | None = None) -> None:
    """Write ``grid(samples, columns, scale)`` to ``path``; its suffix decides the format."""
    to_pil(grid(samples, columns, scale)).save(path)


def save_images(directory, samples, first_index: int = 0) -> list[Path]:
    """Write each sample to ``directory/00000.png`` and so on, counting from ``first_index``.

    Args:
        directory: an existing folder.
        samples: (N, C, H, W), as for ``to_uint8``.

    Returns:
        The files written, in order.
    """
    paths = []
    for index, pixels in enumerate(to_uint8(samples), start=first_index):
        paths.append(Path(directory) / f"{index:05d}.png")
        to_pil(pixels).save(paths[-1])
    return paths

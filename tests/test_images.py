"""Pictures: exact pixels, and grids in which every sample is where it should be."""

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm.errors import UsageError
from robustdm.reporting.images import grid, save_grid, save_images, to_uint8


def test_pixels_invert_the_usual_scaling():
    pixels = np.arange(256).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(pixels / 127.5 - 1)[..., 0], pixels[0])
    assert np.array_equal(to_uint8(torch.from_numpy(pixels / 127.5 - 1))[..., 0], pixels[0])


def test_pixels_outside_the_range_and_not_numbers():
    values = torch.tensor([-7.0, 7.0, float("nan"), float("inf")]).view(1, 1, 2, 2)
    assert to_uint8(values).ravel().tolist() == [0, 255, 0, 0]
    assert to_uint8(values.bfloat16().requires_grad_()).ravel().tolist() == [0, 255, 0, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_places_every_picture(tmp_path, channels):
    values = torch.linspace(-1, 1, 5 * channels * 2 * 3).view(5, channels, 2, 3)
    save_grid(tmp_path / "grid.png", values, columns=2, scale=3)
    sheet = np.asarray(Image.open(tmp_path / "grid.png")).reshape(3 * 6 + 4, 2 * 9 + 2, channels)
    for index in range(5):
        top, left = index // 2 * 8, index % 2 * 11
        enlarged = sheet[top:top + 6, left:left + 9]
        assert np.array_equal(enlarged[1::3, 1::3], to_uint8(values)[index])
        assert np.array_equal(enlarged, enlarged[1::3, 1::3].repeat(3, 0).repeat(3, 1))
    assert (sheet[:, 9:11] == 255).all() and (sheet[16:, 11:] == 255).all()


def test_tiny_pictures_are_enlarged_by_default():
    assert grid(torch.zeros(1, 1, 8, 8)).shape == (64, 64, 1)
    assert grid(torch.zeros(4, 3, 256, 256)).shape == (514, 514, 3)


def test_images_are_numbered(tmp_path):
    values = torch.rand(2, 3, 4, 4) * 2 - 1
    paths = save_images(tmp_path, values, first_index=9)
    assert [path.name for path in paths] == ["00009.png", "00010.png"]
    assert np.array_equal(np.asarray(Image.open(paths[1])), to_uint8(values)[1])


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (3, 4, 4), (5, 3)])
def test_wrong_shapes(shape):
    with pytest.raises(UsageError, match="shape"):
        to_uint8(torch.zeros(shape))


def test_wrong_grids():
    with pytest.raises(UsageError, match="empty"):
        grid(torch.zeros(0, 1, 4, 4))
    with pytest.raises(UsageError, match="columns is 0"):
        grid(torch.zeros(1, 1, 4, 4), columns=0)

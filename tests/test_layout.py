"""Images as rows of pixels and back: what is a view, and which memory is channels-last."""

import pytest
import torch

from densenet_efficient.layout import as_images, as_rows, channels_last, empty_images, is_channels_last

SIZES = [(7,), (3, 5), (2, 3, 5)]


def strides_of_pixels(channels: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Of images whose channels lie side by side."""
    return torch.empty(2, *size, channels).movedim(-1, 1).stride()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_images_and_back(size):
    images = torch.randn(2, 4, *size)
    rows = as_rows(images)
    assert torch.equal(rows[1], images.flatten(2)[0, :, 1])
    again = as_images(rows, *size)
    assert torch.equal(again, images) and again.data_ptr() == rows.data_ptr()
    assert as_rows(again).data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_new_images_are_channels_last_and_no_view(size):
    images = empty_images(torch.empty(1, dtype=torch.float64), 2, 4, *size)
    assert images.shape == (2, 4, *size) and images.stride() == strides_of_pixels(4, size)
    assert images.dtype == torch.float64 and not images._is_view()
    assert empty_images(torch.empty(1, device="meta"), 2, 4, *size).device.type == "meta"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_copied_where_they_are_not_channels_last(size):
    images = torch.randn(2, 4, *size)
    copied = channels_last(images)
    assert torch.equal(copied, images) and copied.stride() == strides_of_pixels(4, size)
    assert channels_last(copied).data_ptr() == copied.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_which_images_are_channels_last(size):
    """Of signals, which torch has no such format for, none."""
    images = torch.randn(2, 4, *size)
    assert not is_channels_last(images)
    assert is_channels_last(channels_last(images)) == (len(size) > 1)
    assert not is_channels_last(channels_last(images)[:, :3])

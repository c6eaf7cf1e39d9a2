import torch

from visionattn.layers.padding import lacking, pad_to_windows


def test_what_is_lacking_is_the_remainder() -> None:
    for length in range(1, 30):
        for window in range(1, 9):
            assert lacking(length, window) == -length % window


def test_maps_are_padded_at_the_bottom_and_right_alone() -> None:
    x = torch.randn(2, 5, 8, 3)
    y = pad_to_windows(x, 3, 4)
    assert y.shape == (2, 6, 8, 3)
    assert torch.equal(y[:, :5], x)
    assert not y[:, 5:].any()
    assert pad_to_windows(y, 3, 4) is y

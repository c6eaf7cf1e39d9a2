import pytest
import torch

from visionattn.analysis import flex
from visionattn.ops import neighborhood_attention, routed_attention, topk_regions, window_attention
from visionattn.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def maps(H: int, W: int) -> list[torch.Tensor]:
    return [randn(2, 2, H, W, 16, seed=i) for i in range(3)]


@pytest.mark.parametrize("shift", [0, 1])
def test_window(shift: int) -> None:
    tensors = [*maps(6, 9), randn(2, 9, 9, seed=3)]
    expected = window_attention(*tensors[:3], window=3, shift=shift, bias=tensors[3])
    torch.testing.assert_close(flex.window((6, 9), 3, shift, biased=True)(*tensors), expected)


@pytest.mark.parametrize("dilation", [1, 2])
def test_neighborhood(dilation: int) -> None:
    tensors = [*maps(7, 9), randn(2, 5, 5, seed=3)]
    expected = neighborhood_attention(*tensors, kernel_size=3, dilation=dilation)
    torch.testing.assert_close(flex.neighborhood_windows((7, 9), 3, dilation)(*tensors), expected)


def test_routed() -> None:
    q, k, v = maps(6, 9)
    index = topk_regions(q, k, grid=(3, 3), topk=4)
    expected = routed_attention(q, k, v, index, grid=(3, 3), scale=0.2)
    torch.testing.assert_close(flex.routed((6, 9), (3, 3), 0.2)(q, k, v, index), expected)

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import TOLERANCE, assert_grad_norms, golden, golden_input, relative_error
from visionattn import use_impl
from visionattn.layers.attention.infinite import InfiniteAttention
from visionattn.models._checkpoint import OfficialWeights
from visionattn.models.infvit import InfViT

PREFIX = "stages.0.attn."


class Layer(OfficialWeights, InfiniteAttention):
    """The layer, with the model's map of official keys."""

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        model = InfViT(dim=self.proj.in_features, depth=1, num_heads=self.num_heads, img_size=16)
        state = model.from_official({f"encoder.layers.0.attn.{k}": v for k, v in state.items()})
        return {k.removeprefix(PREFIX): v for k, v in state.items()}


def layer(**kwargs: Any) -> InfiniteAttention:
    torch.manual_seed(0)
    return InfiniteAttention(32, num_heads=4, **kwargs)


@pytest.mark.parametrize("impl", ["auto", "reference", "eager"])
@pytest.mark.parametrize("form", ["pure", "linear"])
def test_computes_what_the_authors_code_computes(form: str, impl: str) -> None:
    case = golden(f"infvit_op/infsa_{form}_d384_h6")
    attn = Layer(384, num_heads=6, form=form)
    attn.load_state_dict(attn.from_official(case.state_dict))
    with use_impl(impl):
        for i, recording in enumerate(case.manifest["cases"]):
            x = golden_input(tuple(recording["input_shape"]), recording["seed"])
            assert relative_error(attn(x), case.recorded(f"case{i}.logits")) <= TOLERANCE
            if "grad_norms" in recording:
                assert_grad_norms(case, attn, x, recording["grad_norms"])


def test_folded_projections_of_the_linear_form_are_exact() -> None:
    attn = layer(form="linear").double()
    x = torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for impl in ("auto", "reference"):
        with use_impl(impl):
            y = attn(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])])
    torch.testing.assert_close(*results)


def test_linear_form_gives_all_tokens_the_same() -> None:
    x = torch.randn(2, 20, 32)
    y = layer(form="linear")(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["pure", "linear"])
def test_order_of_tokens_does_not_matter(form: str) -> None:
    attn, x = layer(form=form), torch.randn(2, 20, 32)
    order = torch.randperm(20)
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["pure", "linear"])
def test_many_tokens_in_half_precision(form: str, dtype: torch.dtype) -> None:
    attn = layer(form=form).to(dtype)
    x = torch.randn(1, 4096, 32, dtype=dtype)
    y, exact = attn(x).double(), attn.double()(x.double())
    assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=0.1)

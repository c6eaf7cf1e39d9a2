import pytest
import timm
import torch

from tests.golden import assert_golden, golden, golden_model

CASES = ["biformer_tiny", "biformer_tiny_nwin8", "biformer_base_shallow", "biformer_stl_nchw"]


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"biformer/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("biformer_t", 13_142_760),
        ("biformer_s", 25_536_232),
        ("biformer_b", 56_804_968),
        ("biformer_stl", 28_372_552),
        ("biformer_stl_nchw", 28_372_552),
    ],
)
def test_published_parameter_counts(name: str, params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def test_the_two_implementations_of_routing_agree_where_regions_divide_the_map() -> None:
    arch = {"dims": (32, 64), "depths": (1, 1), "topk": (1, 4)}
    first = timm.create_model("biformer_stl", **arch).eval()
    second = timm.create_model("biformer_stl_nchw", **arch).eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="n_win and topk must be at least 1"):
        timm.create_model("biformer_t", n_win=0)
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("biformer_t", depths=(1, 1))

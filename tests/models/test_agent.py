import pytest
import timm
import torch

from tests.golden import assert_golden, golden, golden_model
from tests.models.variants import tiny
from visionattn import CheckpointError, load_checkpoint

TOLERANCE = 1e-5  # a bias table left out moves the logits by as little as 3e-5

CASES = [
    "agent_deit_t",
    "agent_pvt_t",
    "agent_pvt_t_dense",
    "agent_swin_t",
    "agent_swin_t_dense",
    "agent_cswin_t",
    "extra/agent_deit_t_bias50",
    "extra/agent_pvt_t_bias50",
    "extra/agent_swin_t_bias50",
    "extra/agent_cswin_t_bias50",
    pytest.param("agent_deit_b", marks=pytest.mark.slow),
]

PARAMS = {
    "agent_deit_t": 6_015_640,
    "agent_deit_s": 22_647_112,
    "agent_deit_s_448": 23_070_472,
    "agent_deit_b": 87_204_904,
    "agent_pvt_t": 11_570_352,
    "agent_pvt_s": 20_635_066,
    "agent_pvt_m": 35_921_746,
    "agent_pvt_m_256": 36_083_682,
    "agent_pvt_l": 48_738_180,
    "agent_swin_t": 28_902_964,
    "agent_swin_s": 49_666_684,
    "agent_swin_s_288": 49_707_964,
    "agent_swin_b": 88_095_096,
    "agent_swin_b_384": 88_305_016,
    "agent_cswin_t": 20_458_672,
    "agent_cswin_s": 32_814_100,
    "agent_cswin_b": 73_249_696,
    "agent_cswin_b_384": 73_328_416,
}

HOSTS = ("agent_deit", "agent_pvt", "agent_swin", "agent_cswin")


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"agent/{variant}")
    model = golden_model(case, tmp_path)
    stage_norms = 1344 if variant == "agent_swin_t_dense" else 0  # of the detector's first three outputs
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"] - stage_norms
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording, tolerance=TOLERANCE)


@pytest.mark.parametrize(("name", "params"), PARAMS.items())
def test_published_parameter_counts(name: str, params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


@pytest.mark.parametrize("family", HOSTS)
def test_weights_load_at_another_resolution(family: str, tmp_path) -> None:
    source = tiny(family)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    target = load_checkpoint(tiny(family, img_size=96), tmp_path / "weights.pth")
    resized = tiny(family)
    resized.load_state_dict(source.state_dict())
    resized.set_input_size(96)
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(target(x), resized(x))
    back = load_checkpoint(tiny(family), tmp_path / "weights.pth")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize("family", HOSTS)
def test_tables_resized_for_good_give_nearly_what_resizing_in_the_forward_pass_gives(family: str) -> None:
    model, x = tiny(family), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = model(x)
    model.set_input_size(64)
    torch.testing.assert_close(model(x), exact, rtol=0, atol=0)
    before = [tuple(p.shape) for p in model.parameters()]
    model.set_input_size((96, 64))
    assert [tuple(p.shape) for p in model.parameters()] != before
    assert model(torch.zeros(1, 3, 96, 64)).isfinite().all()


def test_a_rank_of_another_width_is_an_error(tmp_path) -> None:
    torch.save(tiny("agent_pvt").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="another shape"):
        load_checkpoint(tiny("agent_pvt", num_heads=(2, 2)), tmp_path / "weights.pth")


def test_detection_shifts_the_only_window_and_classification_does_not() -> None:
    arch = {"window_size": 8, "num_classes": 0}
    still, shifted = tiny("agent_swin", shift_single=False, **arch), tiny("agent_swin", **arch)
    shifted.load_state_dict(still.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (a, b), (c, d) = (m.forward_intermediates(x, intermediates_only=True) for m in (still, shifted))
    torch.testing.assert_close(a, c)
    assert not torch.allclose(b, d)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="must have an entry a stage"):
        timm.create_model("agent_swin_t", agents=((3, 3),))
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("agent_pvt_t", depths=(1, 1))
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("agent_cswin_t", depths=(1, 1))
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("agent_swin_t", depths=(1, 1))

import pytest
import timm
import torch
from torch import nn

from tests.golden import Golden, assert_golden, golden, golden_input, golden_model, relative_error
from visionattn.layers.attention.neighborhood import NeighborhoodAttention
from visionattn.layers.patch import PatchMerging
from visionattn.models._checkpoint import rename
from visionattn.models.nat import NAT, NATBlock

CASES = ["nat_mini", "dinat_mini", "dinat_s_tiny", "nat_isotropic_small", "dinat_isotropic_small"]


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"nat/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


def attention(kernel_size: int, dilation: int = 1, rel_pos_bias: bool = True) -> NeighborhoodAttention:
    return NeighborhoodAttention(
        64, num_heads=2, kernel_size=kernel_size, dilation=dilation, rel_pos_bias=rel_pos_bias
    ).eval()


MODULES = {
    "na2d_k3_d3_10x11": lambda: attention(3, 3),
    "na2d_k5_d1_8x6": lambda: attention(5),
    "na2d_k7_d1_7x7": lambda: attention(7),
    "na2d_k7_d1_9x12": lambda: attention(7),
    "na2d_k7_d1_norpb": lambda: attention(7, rel_pos_bias=False),
    "na2d_k7_d1_pad5x9": lambda: attention(7),
    "na2d_k7_d2_15x19": lambda: attention(7, 2),
    "na2d_k7_d4_28x30": lambda: attention(7, 4),
    "na2d_k11_d1_12x13": lambda: attention(11),
    "mhsarpb": lambda: attention(7),  # global attention with relative position bias is a kernel as large as the map
    "natlayer_ls": lambda: NATBlock(64, attention(7, 2), mlp_ratio=2.0, layer_scale=1e-5),
    "patchmerging_odd": lambda: PatchMerging(64),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compute_what_the_authors_modules_compute(name: str) -> None:
    case, module = golden(f"nat_op/{name}"), MODULES[name]()
    load(case, module)
    recording = case.manifest["cases"][0]
    y = module(golden_input(tuple(recording["input_shape"]), recording["seed"]))
    assert relative_error(y, case.recorded("case0.logits")) <= 1e-5
    y.square().mean().backward()
    norms = rename({n: p.grad.norm() for n, p in module.named_parameters()}, [(r"^ls(\d)\.gamma$", r"gamma\1")])
    assert norms.keys() == recording["grad_norms"].keys()
    for key, expected in recording["grad_norms"].items():
        assert norms[key].item() == pytest.approx(expected, rel=1e-3), key


def load(case: Golden, module: nn.Module) -> None:
    rules = [(r"^relative_position_index$", None), (r"^gamma(\d)$", r"ls\1.gamma")]
    module.load_state_dict(rename(case.state_dict, rules))


@pytest.mark.parametrize(
    ("name", "kwargs", "params"),
    [
        ("nat_mini", {}, 19_984_560),
        ("nat_t", {}, 27_900_000),
        ("nat_s", {}, 50_740_000),
        ("nat_b", {}, 89_770_000),
        ("dinat_mini", {}, 19_984_560),
        ("dinat_t", {}, 27_900_000),
        ("dinat_s", {}, 50_720_000),
        ("dinat_b", {}, 89_770_000),
        ("dinat_l", {}, 200_940_000),
        ("dinat_l", {"kernel_size": 11}, 201_140_000),
        ("dinats_t", {}, 28_290_000),
        ("dinats_s", {}, 49_610_000),
        ("dinats_b", {}, 87_770_000),
        ("dinats_l", {}, 196_530_000),
        ("nat_iso_s", {}, 21_999_736),
        ("nat_iso_b", {}, 86_470_000),
        ("dinat_iso_s", {}, 21_999_736),
        ("dinat_iso_b", {}, 86_470_000),
        ("nat_iso_s", {"kernel_size": 14}, 22_080_000),
        ("nat_iso_b", {"kernel_size": 14}, 86_630_000),
    ],
)
def test_published_parameter_counts(name: str, kwargs: dict, params: int) -> None:
    count = sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters())
    assert round(count / 1e6, 2) == round(params / 1e6, 2)


def dilations(model: nn.Module) -> list[list[int]]:
    stages = [m.blocks for m in model.stages] if isinstance(model, NAT) else [model.stages]
    return [[block.attn.dilation for block in blocks] for blocks in stages]


def test_dilations_are_the_published_ones() -> None:
    assert dilations(timm.create_model("nat_mini", device="meta")) == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    mini = timm.create_model("dinat_mini", device="meta")
    assert dilations(mini) == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]
    assert dilations(timm.create_model("dinats_t", device="meta")) == [[1, 8], [1, 4], [1, 2, 1, 2, 1, 2], [1, 1]]
    assert dilations(timm.create_model("dinat_iso_s", device="meta")) == [[1, 2] * 6]
    detection = timm.create_model("dinat_mini", device="meta", dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3), (1, 3)))
    assert dilations(detection) == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 3, 1, 3], [1, 3, 1, 3, 1]]


def test_layer_scale_is_where_the_weights_have_it() -> None:
    scaled = {
        name
        for name in ("nat_mini", "nat_t", "nat_s", "nat_b", "dinat_s", "dinat_b", "dinat_l")
        if any(".ls1." in key for key in timm.create_model(name, device="meta").state_dict())
    }
    assert scaled == {"nat_s", "nat_b", "dinat_b"}


def test_weights_of_global_attention_load_into_a_kernel_as_large_as_the_map(tmp_path) -> None:
    arch = {"dim": 32, "depth": 2, "head_dim": 16, "num_classes": 5, "kernel_size": 14}
    model = timm.create_model("nat_iso_s", **arch).eval()
    names = [(r"^stages\.", "layers."), (r"^stem\.", "patch_embed."), (r"^head\.fc\.", "head.")]
    official = rename(model.state_dict(), names)
    official |= {f"layers.{i}.attn.relative_position_index": torch.zeros(196, 196) for i in range(2)}
    torch.save(official, tmp_path / "vitrpb.pth")
    overlay = {"file": str(tmp_path / "vitrpb.pth")}
    loaded = timm.create_model("nat_iso_s", pretrained=True, pretrained_cfg_overlay=overlay, **arch).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), model(x))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("nat_mini", depths=(1, 1))
    with pytest.raises(ValueError, match="at least one dilation"):
        timm.create_model("dinat_mini", dilations=((1,), (1,), (), (1,)))
    with pytest.raises(ValueError, match="must not be empty"):
        timm.create_model("nat_iso_s", dilations=())
    with pytest.raises(ValueError, match="style must be"):
        timm.create_model("nat_mini", style="pvt")
    with pytest.raises(ValueError, match="kernel_size and dilation must be at least 1"):
        timm.create_model("nat_mini", kernel_size=0)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        NeighborhoodAttention(10, num_heads=3)

import copy
import io

import pytest
import timm
import torch

from tests.golden import assert_golden, golden, golden_model
from tests.models.variants import tiny
from visionattn.layers.log_position_bias import LogPositionBias

CASES = [
    "transnext_micro",
    "transnext_micro_aaaa_256",
    "transnext_micro_dense_extrap",
    "transnext_micro_dense_interp",
    "transnext_tiny_384_pool7",
]
COUNTS = {
    "transnext_micro": 12_809_304,
    "transnext_t": 28_258_960,
    "transnext_s": 49_741_564,
    "transnext_b": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}


def image(*size: int) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"transnext/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@pytest.mark.parametrize(("name", "params"), COUNTS.items())
def test_published_parameter_counts(name: str, params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def test_nothing_that_depends_on_a_size_is_stored() -> None:
    keys = [timm.create_model("transnext_micro", img_size=s, device="meta").state_dict().keys() for s in (224, 384)]
    assert keys[0] == keys[1]
    model = timm.create_model("transnext_micro", device="meta")
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_authors_choice_of_what_decays() -> None:
    model = timm.create_model("transnext_micro", device="meta")
    kept = model.no_weight_decay()
    assert "stages.0.blocks.0.attn.cpb.fc1.weight" in kept
    assert "stages.3.blocks.1.attn.query_embedding" in kept
    assert "stages.0.blocks.0.attn.relative_pos_bias_local" in kept
    assert "stages.0.blocks.0.attn.temperature" in kept
    assert not any("learnable" in name for name in kept)


def test_both_bias_modes_agree_at_the_size_of_the_biases_and_nowhere_else() -> None:
    model, other = tiny("transnext"), tiny("transnext", bias_mode="interpolate", img_size=(64, 96))
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        for p in m.parameters():
            p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    torch.testing.assert_close(other(image(64, 96)), model(image(64, 96)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other(image(96, 128)), model(image(96, 128)), rtol=1e-4, atol=1e-5)
    other.set_input_size((96, 128))
    torch.testing.assert_close(other(image(96, 128)), model(image(96, 128)), rtol=1e-4, atol=1e-5)


def test_a_pretrain_size_of_its_own_changes_the_coordinates() -> None:
    model, other = tiny("transnext"), tiny("transnext", pretrain_size=384)
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(image(64, 64)), model(image(64, 64)))


@pytest.mark.parametrize(
    ("size", "pooled"), [((7, 7), (7, 7)), ((12, 20), (3, 5)), ((13, 19), (6, 9)), ((5, 3), (1, 3))]
)
def test_position_bias_is_the_mlp_of_every_pair(size: tuple[int, int], pooled: tuple[int, int]) -> None:
    bias = LogPositionBias(3, pretrain_side=14).double()
    axes = []
    for n, p in zip(size, pooled, strict=True):
        query = torch.arange(n, dtype=torch.float64)
        key = torch.nn.functional.adaptive_avg_pool1d(query[None], p)[0]
        r = (query[:, None] - key) / 13 * 8
        axes.append(r.sign() * (r.abs() + 1).log2() / 3)  # (n, p)
    y = axes[0][:, None, :, None].expand(*size, *pooled)
    x = axes[1][None, :, None, :].expand(*size, *pooled)
    expected = bias.fc2(bias.fc1(torch.stack([y, x], dim=-1)).relu()).flatten(2, 3).flatten(0, 1).permute(2, 0, 1)
    torch.testing.assert_close(bias(size, pooled), expected)


def test_position_bias_is_made_once_for_each_distance() -> None:
    rows = []
    bias = LogPositionBias(3, pretrain_side=56)
    bias.fc1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for side, pooled in ((56, 7), (28, 7), (14, 7), (7, 7), (96, 12), (12, 12)):
        bias((side, side), (pooled, pooled))
    assert rows == [10816, 2704, 676, 169, 33856, 529]  # as the authors' tables


def test_a_kept_position_bias_is_never_stale() -> None:
    bias = LogPositionBias(2, pretrain_side=8).eval()
    size = (8, 8), (2, 2)

    def fresh() -> torch.Tensor:
        return bias(*size).detach()  # recording gradients: made anew

    @torch.no_grad()
    def kept() -> torch.Tensor:
        return bias(*size)

    assert kept().data_ptr() == kept().data_ptr()
    steps = {
        "in place": lambda: [p.mul_(2.0) for p in bias.parameters()],
        "load": lambda: bias.load_state_dict({k: v + 1 for k, v in bias.state_dict().items()}),
        "assign": lambda: bias.load_state_dict({k: v + 1 for k, v in bias.state_dict().items()}, assign=True),
        "dtype": lambda: bias.double(),
        "new data": lambda: [setattr(p, "data", p.data * 3) for p in bias.parameters()],
        "train and back": lambda: [bias.train(), *(p.data.mul_(2) for p in bias.parameters()), bias.eval()],
    }
    for name, change in steps.items():
        before = kept().clone()
        with torch.no_grad():
            change()
        assert kept().dtype == fresh().dtype, name
        torch.testing.assert_close(kept(), fresh(), msg=name)
        assert name == "dtype" or not torch.equal(kept(), before), name
    bias.bias_size = ((6, 6), (3, 3))
    torch.testing.assert_close(kept(), fresh())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert bias.float()(*size).dtype == torch.bfloat16
    assert kept().dtype == torch.float32
    with torch.no_grad():
        swapped = {k: v + 1 for k, v in bias.state_dict().items()}
        assert not torch.equal(torch.func.functional_call(bias, swapped, size), kept())
    copied = copy.deepcopy(bias)
    assert copied._kept == {}
    buffer = io.BytesIO()
    torch.save(bias, buffer)
    assert len(buffer.getvalue()) < 100_000


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="bias_mode must be"):
        timm.create_model("transnext_micro", bias_mode="nearest")
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("transnext_micro", depths=(1, 1))
    with pytest.raises(ValueError, match="pretrain_size must be 64 at least"):
        timm.create_model("transnext_micro", pretrain_size=32)
    with pytest.raises(ValueError, match="fixed_pool_size must be at least 1"):
        timm.create_model("transnext_micro", fixed_pool_size=-1)
    with pytest.raises(ValueError, match="window must be odd"):
        timm.create_model("transnext_micro", window=2)
    with pytest.raises(ValueError, match="img_size must be positive"):
        timm.create_model("transnext_micro", img_size=0)

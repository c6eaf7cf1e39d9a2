"""The wrapper: what it returns, trains, freezes and refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.dense.families import FAMILIES, PLAIN, arguments, backbone
from visionattn.dense import Backbone, BackboneError

pytestmark = pytest.mark.dense
every_family = pytest.mark.parametrize("family", FAMILIES)


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@every_family
@pytest.mark.parametrize("size", [(64, 96), (75, 107)], ids=str)
def test_maps_have_the_promised_channels_and_strides(family: str, size: tuple[int, int]) -> None:
    model = backbone(family)
    maps = model(image(*size))
    assert len(maps) == len(model.out_channels_list) == len(model.strides)
    for y, channels, stride in zip(maps, model.out_channels_list, model.strides, strict=True):
        assert y.shape[:2] == (2, channels)
        for got, side in zip(y.shape[2:], size, strict=True):
            assert side // stride <= got <= -(-side // stride), (y.shape, stride)
    sum(y.square().mean() for y in maps).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []


@every_family
def test_maps_are_those_of_forward_intermediates(family: str) -> None:
    model = backbone(family, norm_outputs=False).eval()
    whole = model.create().eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    x = image(64, 96)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, intermediates_only=True)
        if family in PLAIN:
            assert model.pyramid is not None
            expected = model.pyramid(expected[-1])
        for y, e in zip(model(x), expected[-len(model.strides) :], strict=True):
            torch.testing.assert_close(y, e)


def test_outputs_are_normed_as_in_the_families_dense_code() -> None:
    normed = {family: sorted(backbone(family).norms) for family in FAMILIES}
    assert normed["biformer"] == normed["mala"] == normed["nat"] == ["0", "1", "2", "3"]
    assert normed["litv2"] == ["1", "2", "3"]
    assert normed["davit"] == normed["agent_swin"] == normed["inline_swin"] == ["0", "1"]
    assert normed["transnext"] == normed["agent_pvt"] == normed["shvit"] == normed["maxvit"] == []


@pytest.mark.parametrize(("given", "normed"), [(True, [0, 2]), (False, []), ([2], [2]), ([1], [])], ids=str)
def test_norms_may_be_chosen(given: bool | list[int], normed: list[int]) -> None:
    model = backbone("biformer", out_indices=[0, 2], norm_outputs=given).eval()
    assert [int(i) for i in model.norms] == normed
    maps = model(image(64, 64))
    for i, y in zip([0, 2], maps, strict=True):
        mean = y.mean(dim=1).abs().max().item()
        assert (mean < 1e-5) == (i in normed)


def test_plain_models_have_one_norm() -> None:
    assert "norm.weight" not in backbone("gated_vit").model.state_dict()
    model = backbone("gated_vit", norm_outputs=True)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.zero_()
        for y, other in zip(model(image(64, 64)), model(2 + image(64, 64)), strict=True):
            assert torch.equal(y, other)


def test_stages_behind_the_last_level_are_left_out() -> None:
    whole, part = backbone("biformer"), backbone("biformer", out_indices=[0, 1])
    assert len(part.model.stages) == 2
    part.load_state_dict(whole.state_dict(), strict=False)
    x = image(64, 64)
    for y, e in zip(part.eval()(x), whole.eval()(x), strict=False):
        torch.testing.assert_close(y, e)


@every_family
def test_frozen_stages_do_not_train(family: str) -> None:
    model = (
        backbone(family, frozen_stages=1, drop_path_rate=0.5)
        if family != "shvit"
        else backbone(family, frozen_stages=1)
    )
    model.train()
    blocks = model.model.blocks if family == "convit" else model.model.stages
    stem = [p for k, p in model.model.named_parameters() if not k.startswith(("stages.", "blocks.", "norm"))]
    assert stem
    assert not any(p.requires_grad for p in [*stem, *blocks[0].parameters()])
    assert all(p.requires_grad for p in blocks[1].parameters())
    assert not any(m.training for m in blocks[0].modules())
    assert blocks[1].training
    before = copy.deepcopy(blocks[0].state_dict())
    sum(y.square().mean() for y in model(image(64, 64))).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for key, value in blocks[0].state_dict().items():
        assert torch.equal(value, before[key]), key


def test_norm_eval_keeps_running_statistics() -> None:
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    for norm_eval in (False, True):
        model = backbone("biformer", norm_eval=norm_eval).train()
        stats = [m.running_mean.clone() for m in model.modules() if isinstance(m, norms)]
        model(image(64, 64))
        kept = [
            torch.equal(m.running_mean, s)
            for m, s in zip([m for m in model.modules() if isinstance(m, norms)], stats, strict=True)
        ]
        assert stats
        assert kept == [norm_eval] * len(stats)
        assert all(p.requires_grad for p in model.parameters())


@every_family
def test_checkpointing_keeps_gradients(family: str) -> None:
    torch.manual_seed(0)
    plain = backbone(family).train()
    kept = backbone(family, grad_checkpointing=True).train()
    kept.load_state_dict(plain.state_dict())
    x = image(64, 96)
    for model in (plain, kept):
        sum(y.square().mean() for y in model(x)).backward()
    for (key, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


def test_checkpointing_saves_activations() -> None:
    def saved(model: Backbone) -> int:
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.train()(image(64, 64))
        return count

    assert saved(backbone("transnext", grad_checkpointing=True)) < 0.4 * saved(backbone("transnext"))


@every_family
def test_builds_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = backbone(family)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "biformer_small"}, "Did you mean .*biformer_s"),
        ({"name": "resnet50"}, "no backbone is called 'resnet50'"),
        ({"out_indices": [0, 4]}, r"has 4 levels: out_indices must be a rising choice of 0 to 3, got \[0, 4\]"),
        ({"out_indices": [2, 1]}, "rising choice"),
        ({"out_indices": []}, "rising choice"),
        ({"norm_outputs": [7]}, "norm_outputs must be a rising choice"),
        ({"frozen_stages": 5}, r"must be in \[-1, 4\], got 5"),
        ({"pretrained": "a.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "b.pth"}}, "give one"),
        ({"init_cfg": {"type": "Kaiming"}}, "init_cfg must be"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_clear_error(kwargs: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        Backbone(**{**arguments("biformer"), **kwargs})


def test_plain_models_refuse_norms_of_levels_and_other_patches() -> None:
    with pytest.raises(BackboneError, match="one map"):
        backbone("gated_vit", norm_outputs=[0])
    with pytest.raises(BackboneError, match="patches of 14 pixels"):
        backbone("nat_iso", patch_size=14)


def test_unknown_arguments_are_the_models_type_error() -> None:
    with pytest.raises(TypeError, match="n_wim"):
        backbone("biformer", n_wim=16)

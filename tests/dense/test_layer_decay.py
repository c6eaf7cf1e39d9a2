"""Layer-wise decay of the learning rate: which parameter gets which rate."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from tests.dense.families import FAMILIES, backbone
from visionattn.dense import BackboneError

pytestmark = pytest.mark.dense


def rates(model: nn.Module, lr: float = 1.0, wd: float = 0.1, **paramwise) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    cfg = {
        "type": "OptimWrapper",
        "constructor": "visionattn.LayerDecayOptimWrapperConstructor",
        "optimizer": {"type": "AdamW", "lr": lr, "weight_decay": wd},
        "paramwise_cfg": paramwise,
    }
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    names = {id(p): k for k, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return found


def detector(family: str, **kwargs) -> nn.Module:
    return nn.ModuleDict({"backbone": backbone(family, **kwargs), "head": nn.Conv2d(16, 4, 1)})


def test_rates_fall_from_the_last_block_to_the_stem() -> None:
    found = rates(detector("biformer"), layer_decay=0.5)  # depths (1, 1, 2, 1): the stem and five blocks
    order = ["stem.0", "stages.0.blocks.0.attn.qkv", "stages.1.blocks.0.attn.qkv", "stages.2.blocks.0.attn.qkv"]
    order += ["stages.2.blocks.1.attn.qkv", "stages.3.blocks.0.attn.qkv"]
    for i, key in enumerate(order):
        assert found[f"backbone.model.{key}.weight"] == (pytest.approx(0.5 ** (6 - i)), 0.1)
    assert (
        found["backbone.model.stages.2.downsample.0.weight"][0]
        == found["backbone.model.stages.2.blocks.0.mlp.fc1.weight"][0]
    )
    assert found["backbone.norms.0.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group(family: str) -> None:
    model = detector(family)
    found = rates(model, layer_decay=0.8)
    assert set(found) == {k for k, _ in model.named_parameters()}
    inner = {lr for k, (lr, _) in found.items() if k.startswith("backbone.model.")}
    assert max(inner) == pytest.approx(0.8)
    assert len(inner) > 2
    assert sorted(inner) == pytest.approx([0.8**i for i in range(len(inner), 0, -1)])
    assert {lr for k, (lr, _) in found.items() if not k.startswith("backbone.model.")} == {1.0}
    no_decay = model["backbone"].undecayed()
    for key, p in model.named_parameters():
        name = key.removeprefix("backbone.model.")
        assert (found[key][1] == 0) == (p.ndim <= 1 or name in no_decay), key


def test_named_parameters_do_not_decay() -> None:
    found = rates(detector("nat"), layer_decay=1.0)
    tables = {k: v for k, v in found.items() if k.endswith(".rpb")}
    assert tables
    assert set(tables.values()) == {(1.0, 0.0)}


def test_custom_keys_are_further_factors() -> None:
    found = rates(
        detector("litv2"),
        layer_decay=0.5,
        custom_keys={"offset": {"lr_mult": 0.01}, "head": {"decay_mult": 0.0}, "downsample.offset": {"lr_mult": 0.1}},
    )
    conv, offset = (found[f"backbone.model.stages.3.downsample.{k}.weight"][0] for k in ("conv", "offset"))
    assert offset == pytest.approx(0.1 * conv)
    assert found["head.weight"] == (1.0, 0.0)


def test_frozen_parameters_are_left_out_and_rates_step() -> None:
    model = detector("transnext", frozen_stages=1)
    found = rates(model, layer_decay=0.5)
    assert not any("stages.0." in k or ".stem." in k for k in found)
    assert set(found) == {k for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({}, "needs a layer_decay"),
        ({"layer_decay": 0}, r"in \(0, 1\], got 0"),
        ({"layer_decay": "0.9"}, r"got '0.9'"),
        ({"layer_decay": 0.9, "layer_decay_rate": 0.9}, "got layer_decay_rate"),
        ({"layer_decay": 0.9, "custom_keys": {"head": {"lr": 1}}}, r"custom_keys\['head'\] takes lr_mult"),
    ],
    ids=str,
)
def test_bad_settings_get_one_clear_error(paramwise: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        rates(detector("nat"), **paramwise)


def test_a_model_without_our_backbone() -> None:
    with pytest.raises(BackboneError, match="found none"):
        rates(torch.nn.Linear(3, 3), layer_decay=0.9)

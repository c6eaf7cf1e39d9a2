import argparse
import collections
import pickle
import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visionattn
from tests.models.variants import tiny
from visionattn import CheckpointError, load_checkpoint


class Payload:
    """Would create a file if it were unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
        lambda s: {"state_dict": collections.OrderedDict((f"module.{k}", v) for k, v in s.items())},
        lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"neck.conv.weight": torch.zeros(1)}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
    ids=["bare", "model", "module prefix", "detector", "compiled and wrapped"],
)
def test_wrappers_and_prefixes_come_off(wrap, tmp_path) -> None:
    source, target = tiny("biformer"), tiny("biformer")
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    assert not same(source, target)
    assert load_checkpoint(target, tmp_path / "weights.pth") is target
    assert same(source, target)


def test_safetensors_and_averaged_weights(tmp_path) -> None:
    raw, averaged, target = tiny("biformer"), tiny("biformer"), tiny("biformer")
    save_file(raw.state_dict(), tmp_path / "weights.safetensors")
    assert same(load_checkpoint(target, tmp_path / "weights.safetensors"), raw)
    torch.save({"model_ema": averaged.state_dict(), "model": raw.state_dict()}, tmp_path / "both.pth")
    assert same(load_checkpoint(target, tmp_path / "both.pth"), raw)
    assert same(load_checkpoint(target, tmp_path / "both.pth", use_ema=True), averaged)


def test_a_yacs_configuration_beside_the_weights_is_read_without_yacs(tmp_path, monkeypatch) -> None:
    CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    package.config, module.CfgNode = module, CfgNode
    config = CfgNode(MODEL=CfgNode(NAME="x", DEPTHS=[2, 2], SHAPE=(7, None)), AMP=True)
    config.__dict__.update(__immutable__=True, __deprecated_keys__=set())
    source, target = tiny("biformer"), tiny("biformer")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": source.state_dict(), "config": config}, tmp_path / "weights.pth")
    assert same(load_checkpoint(target, tmp_path / "weights.pth"), source)


def test_code_in_a_pickle_is_never_run(tmp_path) -> None:
    target = tiny("biformer")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    trap = tmp_path / "trap"
    torch.save({"model": target.state_dict(), "args": Payload(trap)}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(trap)))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="could run code, so it was not loaded"):
            load_checkpoint(target, tmp_path / name)
        with pytest.raises(CheckpointError, match="could run code"):
            timm.create_model("biformer_t", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / name)})
    assert not trap.exists()
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_another_class_count(tmp_path) -> None:
    source = timm.create_model("biformer_t", depths=(1, 1, 1, 1), num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    target = timm.create_model("biformer_t", depths=(1, 1, 1, 1), num_classes=9)
    head = target.head.fc.weight.clone()
    with pytest.raises(CheckpointError, match=r"classifies 5 classes, the model 9; nothing was loaded.*num_classes=5"):
        load_checkpoint(target, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth", keep_classifier=True)
    assert torch.equal(target.head.fc.weight, head)
    assert torch.equal(target.stem[0].weight, source.stem[0].weight)
    # timm's way of fine-tuning: the backbone's weights and a fresh classifier
    overlay = {"file": str(tmp_path / "weights.pth")}
    tuned = timm.create_model(
        "biformer_t", pretrained=True, pretrained_cfg_overlay=overlay, depths=(1, 1, 1, 1), num_classes=9
    )
    assert torch.equal(tuned.stem[0].weight, source.stem[0].weight)
    assert tuned.head.fc.weight.shape == (9, 512)
    bare = timm.create_model(
        "biformer_t", pretrained=True, pretrained_cfg_overlay=overlay, depths=(1, 1, 1, 1), num_classes=0
    )
    assert torch.equal(bare.stem[0].weight, source.stem[0].weight)
    grey = timm.create_model(
        "biformer_t", pretrained=True, pretrained_cfg_overlay=overlay, depths=(1, 1, 1, 1), num_classes=5, in_chans=1
    )
    torch.testing.assert_close(grey.stem[0].weight, source.stem[0].weight.sum(dim=1, keepdim=True))


def test_features_only_takes_a_classifiers_weights(tmp_path) -> None:
    source = timm.create_model("biformer_t", depths=(1, 1, 1, 1)).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = timm.create_model(
        "biformer_t",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
        depths=(1, 1, 1, 1),
        features_only=True,
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x)[-1], source.forward_intermediates(x, intermediates_only=True)[-1])


def test_another_architecture_changes_nothing(tmp_path) -> None:
    target = tiny("biformer")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "resnet.pth")
    torch.save(tiny("biformer", dims=(16, 32, 48, 128)).state_dict(), tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match=r"does not fit BiFormer; nothing was loaded.*missing.*does not have"):
        load_checkpoint(target, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"of another shape: .* in the file and .* in the model"):
        load_checkpoint(target, tmp_path / "wider.pth")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_damaged_files_are_explained(tmp_path) -> None:
    target = tiny("biformer")
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        load_checkpoint(target, tmp_path / "missing.pth")
    torch.save(target.state_dict(), tmp_path / "weights.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("cut.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(target, tmp_path / name)
    torch.save({"epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no weights: found the entries epoch"):
        load_checkpoint(target, tmp_path / "other.pth")


def test_any_module_can_be_loaded_by_its_own_keys(tmp_path) -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(source.state_dict(), tmp_path / "linear.pth")
    assert same(visionattn.load_checkpoint(target, tmp_path / "linear.pth"), source)

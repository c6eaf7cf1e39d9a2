"""What every model promises. Each registered name is run on the meta device; one small variant a family for real."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import visionattn
from tests.models.variants import TINY, tiny

NAMES = visionattn.list_models()
every_name = pytest.mark.parametrize("name", NAMES)
every_family = pytest.mark.parametrize("family", TINY)


def image(*size: int, batch: int = 2, seed: int = 0, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(seed))


def meta(name: str, **kwargs: object) -> tuple[nn.Module, Tensor]:
    model = timm.create_model(name, device="meta", **kwargs)
    return model, torch.empty(2, *model.default_cfg["input_size"], device="meta")


# Every registered name, on the meta device: shapes, keys and configuration, without the arithmetic.


@every_name
def test_classifies_and_trains_every_parameter(name: str) -> None:
    model, x = meta(name, num_classes=42)
    y = model.train()(x)
    assert y.shape == (2, 42)
    y.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@every_name
def test_default_cfg_is_true(name: str) -> None:
    model, x = meta(name)
    cfg, keys = model.default_cfg, model.state_dict()
    assert model.num_classes == cfg["num_classes"]
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    assert keys[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert cfg["license"]
    assert cfg["origin_url"].startswith("https://")
    features = model.forward_features(x)
    if features.ndim == 4:
        assert features.shape[1:] == (model.num_features, *cfg["pool_size"])
    else:
        assert features.shape[-1] == model.num_features
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


@every_name
def test_features_only(name: str) -> None:
    model, x = meta(name, features_only=True)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    maps = model(x)
    assert len(maps) == len(channels)
    for y, c, s in zip(maps, channels, strides, strict=True):
        assert y.shape == (2, c, x.shape[2] // s, x.shape[3] // s)
    one = timm.create_model(name, device="meta", features_only=True, out_indices=(1,))
    assert len(one(x)) == 1


@every_name
def test_unknown_argument_raises_type_error(name: str) -> None:
    with pytest.raises(TypeError, match="wrong_argument"):
        timm.create_model(name, device="meta", wrong_argument=1)


@every_name
def test_layer_decay_reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, device="meta")
    groups = group_parameters(model, model.group_matcher(coarse=False))
    parameters = dict(model.named_parameters())
    assert sorted(n for names in groups.values() for n in names) == sorted(parameters)
    assert len(groups) > len(model.feature_info)
    assert model.no_weight_decay() <= set(parameters)
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert 1 < len(coarse) <= len(groups)
    decayed = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    scales = sorted({g["lr_scale"] for g in decayed})
    assert scales[-1] == 1.0
    assert len(scales) > 3
    first = next(n for n in parameters if n.startswith(model.default_cfg["first_conv"]))
    stem = next(g for g in decayed if any(p is parameters[first] for p in g["params"]))
    assert stem["lr_scale"] == scales[0]


# One small variant a family, for real.


@every_family
@pytest.mark.parametrize("size", [(32, 32), (37, 61), (64, 96), (111, 45)], ids=str)
def test_any_size(family: str, size: tuple[int, int]) -> None:
    y = tiny(family)(image(*size))
    assert y.shape == (2, 7)
    assert y.isfinite().all()
    assert y.std() > 0


SMALL = ((2, 9), (7, 40), (28, 29), (32, 31), (60, 63))


@every_family
def test_images_that_are_too_small_are_refused_in_one_sentence(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly those that PyTorch fails on in the middle of the model, which the sentence spares the reader."""
    for training, batch in ((False, 2), (True, 1)):
        model = tiny(family).train(training)
        for size in SMALL:
            x, why = image(*size, batch=batch), None
            with monkeypatch.context() as patch:
                patch.setattr(model, "_check_images", lambda x: None)
                try:
                    model(x)
                except (RuntimeError, ValueError) as error:
                    why = str(error)
            for run in (model, model.forward_intermediates):
                if why is None:
                    run(x)
                    continue
                with pytest.raises(ValueError, match=rf"{type(model).__name__}: .* {size[0]} x {size[1]}") as refusal:
                    run(x)
                least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
                model(image(least, least, batch=1 if "batch norm" in str(refusal.value) else 3))
                assert least > min(size), why


def test_what_is_no_batch_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BiFormer: images must be \(B, 3, H, W\), got \(3, 32, 32\)"):
        tiny("biformer")(image(32, 32)[0])


@every_family
def test_every_parameter_gets_a_finite_gradient(family: str) -> None:
    model = tiny(family, drop_path_rate=0.0).train()
    model(image(64, 64, batch=4)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@every_family
def test_items_of_a_batch_do_not_mix(family: str) -> None:
    model, x = tiny(family), image(64, 48, batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@every_family
def test_intermediates_agree_with_features(family: str) -> None:
    model, x = tiny(family), image(64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [i["num_chs"] for i in model.feature_info]
    (last,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(last, maps[0])
    nhwc = model.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)
    if nhwc[0].ndim == 4 and nhwc[0].shape != maps[-1].shape:
        torch.testing.assert_close(nhwc[0].permute(0, 3, 1, 2), maps[-1])
    getter = tiny(family, num_classes=0, features_only=True, out_indices=(0, 1))
    getter.model.load_state_dict(model.state_dict(), strict=False)
    for a, b in zip(getter(x), maps[:2], strict=True):
        torch.testing.assert_close(a, b)


@every_family
def test_pruned_model_gives_the_same_map(family: str) -> None:
    model, x = tiny(family), image(64, 64)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    count = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([1]) == [1]
    assert sum(p.numel() for p in model.parameters()) < count
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


@every_family
def test_classifier_can_be_replaced(family: str) -> None:
    model, x = tiny(family), image(64, 64)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.get_classifier().out_features == 5
    assert model.num_classes == 5
    pre = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pre), model(x))


@every_family
def test_grad_checkpointing_changes_nothing(family: str) -> None:
    model, x = tiny(family, drop_path_rate=0.0).train(), image(64, 64)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@every_family
def test_saves_loads_and_copies(family: str, tmp_path) -> None:
    model, x = tiny(family), image(64, 64)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = tiny(family)
    assert not torch.equal(other(x), model(x))
    visionattn.load_checkpoint(other, tmp_path / "model.pth")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


@every_family
def test_bf16_autocast_is_close(family: str) -> None:
    model, x = tiny(family), image(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    exact = model(x)
    assert y.isfinite().all()
    assert (y.float() - exact).abs().max() <= 0.1 * exact.abs().max()


@every_family
def test_channels_last_changes_nothing(family: str) -> None:
    model, x = tiny(family), image(64, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_factory_dtype_and_in_chans(family: str) -> None:
    model = tiny(family, in_chans=1, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image(64, 64, chans=1).double()).dtype == torch.float64


@every_family
def test_reference_and_fast_operators_agree(family: str) -> None:
    model, x = tiny(family), image(72, 56)
    fast = model(x)
    with visionattn.use_impl("reference"):
        torch.testing.assert_close(model(x), fast, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.slow
def test_compiles_to_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model, x = tiny(family), image(64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_family
@pytest.mark.slow
def test_exports_with_a_dynamic_batch(family: str) -> None:
    model = tiny(family)
    program = torch.export.export(model, (image(64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = image(64, 64, batch=3, seed=1)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.slow
def test_onnx_runtime_agrees(family: str, tmp_path) -> None:
    import onnxruntime

    model, path = tiny(family), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (image(64, 64),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = image(64, 64, batch=3, seed=1)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, model(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_every_family_has_a_small_variant() -> None:
    families = {module.__name__.rpartition(".")[2] for module in visionattn.models.FAMILIES}
    covered = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name, _ in TINY.values()}
    assert covered == families


def test_names_are_lower_case() -> None:
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", n) for n in NAMES)
    assert len(set(NAMES)) == len(NAMES) > 0

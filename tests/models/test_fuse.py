"""timm's own families: official files, and the same outputs, gradients and keys when fused."""

import copy
import logging

import pytest
import timm
import torch
from torch import Tensor, nn

import visionattn
from tests.golden import NAMES, assert_golden, golden, relative_error
from visionattn.fuse import FusedConVit, fuse, fuse_report
from visionattn.layers import inference

CASES = [
    "convit/convit_tiny",
    "convit/convit_tiny_img256",
    "davit/DaViT_tiny",
    "maxvit/maxvit_tiny_tf_224",
    "maxvit/maxvit_tiny_tf_256x320",
    "shvit/shvit_s1",
]


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


SMALL = {  # a few blocks of each kind, random weights
    "convit": (
        "convit_tiny",
        {"embed_dim": 16, "num_heads": 2, "depth": 3, "local_up_to_layer": 2, "img_size": 64},
        64,
    ),
    "davit": ("davit_tiny", {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2)}, 60),
    "florence2": ("davit_base_fl", {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2)}, 64),
    "maxvit": ("test_maxvit", {}, 160),
    "maxvit_head_first": (
        "maxvit_rmlp_pico_rw_256",
        {"depths": (1, 1, 1, 1), "embed_dim": (32,) * 4, "img_size": 64},
        64,
    ),
    "shvit": ("shvit_s1", {"embed_dim": (16, 24, 32), "partial_dim": (8, 12, 16), "depth": (1, 1, 1)}, 128),
}
every_small = pytest.mark.parametrize("kind", SMALL)


def small(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    name, kwargs, side = SMALL[kind]
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():  # branches that start at zero would hide the attention
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, image(side, side)


@pytest.mark.parametrize("fused", [False, True], ids=["timm", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_official_files_give_the_recorded_outputs(name: str, fused: bool, tmp_path) -> None:
    case = golden(name)
    torch.save({"model": case.state_dict}, tmp_path / "official.pth")
    model = timm.create_model(NAMES[name]["model"], **NAMES[name].get("kwargs", {})).eval()
    visionattn.load_checkpoint(model, tmp_path / "official.pth")
    if fused:
        fuse(model)
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@every_small
@pytest.mark.parametrize("batch", [1, 2])
def test_fused_model_computes_the_same(kind: str, batch: int) -> None:
    model, x = small(kind)
    x = x[:batch]
    fused = fuse(copy.deepcopy(model))
    report = fuse_report(fused)
    assert report.replaced
    assert report.left == {}
    assert list(fused.state_dict()) == list(model.state_dict())
    expected, actual = model(x), fused(x)
    assert relative_error(actual, expected) < 1e-5
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    names = [n for n, _ in model.named_parameters()]
    grads = [torch.autograd.grad(y, list(m.parameters()), cotangent) for y, m in ((expected, model), (actual, fused))]
    largest = max(g.abs().max() for g in grads[0])
    for n, a, b in zip(names, *grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-6 * largest, n


@every_small
@pytest.mark.parametrize("part_bytes", [2**20, 4096], ids=["whole", "in parts"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_fused_model_infers_the_same(kind: str, part_bytes: int, layout: torch.memory_format, monkeypatch) -> None:
    monkeypatch.setattr(inference, "MAPPED_BYTES", part_bytes)
    monkeypatch.setattr(inference, "PART_BYTES", part_bytes)
    model, x = small(kind)
    fused = fuse(copy.deepcopy(model))
    stages = [m.stages if hasattr(m, "stages") else m.blocks for m in (model, fused)]
    with torch.inference_mode():
        assert relative_error(fused(x), model(x)) < 1e-5
        if kind in ("davit", "florence2"):  # stages take maps in any layout
            y = torch.randn(2, 16, 15, 14, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
            assert relative_error(stages[1](y.clone()), stages[0](y)) < 1e-5


@pytest.mark.parametrize("kind", ["davit", "florence2"])
def test_hooks_see_what_inference_would_overwrite(kind: str) -> None:
    model, x = small(kind)
    fused = fuse(copy.deepcopy(model))
    outputs: list[dict[str, Tensor]] = [{}, {}]
    for m, seen in zip((model, fused), outputs, strict=True):
        for name, module in m.named_modules():
            if name.endswith(("cpe1", "cpe2", "proj", "norm1", "norm2", "mlp", "fc1", "act", "fc2")):
                module.register_forward_hook(lambda _m, _i, y, name=name, seen=seen: seen.update({name: y}))
    with torch.no_grad():
        for m in (model, fused):
            m(x)
    assert outputs[0].keys() == outputs[1].keys()
    for name, expected in outputs[0].items():
        if not name.endswith(("attn.proj", "norm1")):  # tokens come by windows there
            assert relative_error(outputs[1][name].reshape(expected.shape), expected) < 1e-5, name


@every_small
def test_checkpoints_travel_both_ways(kind: str) -> None:
    model, x = small(kind)
    fused = fuse(small(kind)[0])
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(0.9)
    model.load_state_dict(fused.state_dict())
    assert relative_error(fused(x), model(x)) < 1e-5
    again = copy.deepcopy(fused)
    torch.testing.assert_close(again(x), fused(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convit", "davit", "maxvit", "shvit"])
def test_fused_model_trains_and_compiles(kind: str) -> None:
    torch._dynamo.reset()
    model, x = small(kind)
    fused = fuse(model).train()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


def test_report_says_what_was_left_and_why(caplog) -> None:
    model = timm.create_model("convit_tiny", attn_drop_rate=0.1, depth=2, local_up_to_layer=1)
    with caplog.at_level(logging.INFO, logger="visionattn"):
        assert fuse(model) is model
    report = fuse_report(model)
    assert report.replaced == {}
    assert report.left["blocks.0.attn"] == "attention dropout of 0.1 needs the matrix of weights"
    assert "fused 0 modules, left 2" in caplog.text
    vit = fuse(timm.create_model("test_vit"))
    assert set(fuse_report(vit).left.values()) == {"Attention is not of a family that fuse() knows"}


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (70, 45), (128, 64)], ids=str)
def test_fused_convit_takes_any_size(size: tuple[int, int]) -> None:
    model = fuse(small("convit")[0])
    assert isinstance(model, FusedConVit)
    x = image(*size)
    assert model(x).shape == (2, 5)
    final, maps = model.forward_intermediates(x)
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    assert [m.shape for m in maps] == [(2, 32, rows, columns)] * 3
    torch.testing.assert_close(final, model.forward_features(x))
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed, final[:, 1:])


def test_fused_convit_checkpoints_gradients() -> None:
    model, x = small("convit")
    fuse(model)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_batch_norms_fold_for_inference() -> None:
    model, x = small("shvit")
    expected = model(x)
    fuse(model, fold_batchnorm=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert relative_error(model(x), expected) < 1e-4


def test_maxvit_takes_maps_that_windows_do_not_divide() -> None:
    block = fuse(timm.create_model("maxvit_tiny_tf_224").eval()).stages[0].blocks[0].attn_block
    x = torch.randn(2, 10, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = block(x)
        assert y.shape == x.shape
        # Whole windows know nothing of the padding behind them.
        torch.testing.assert_close(y[:, :7, :7], block(x[:, :7, :7]))

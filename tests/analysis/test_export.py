import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import AvgPool2dSame, Conv2dSame
from timm.models.davit import SpatialBlock
from torch import nn
from torchvision.ops import Permute

import visionattn
from tests.golden import golden
from tests.models.variants import tiny
from visionattn.analysis import export as exporting
from visionattn.analysis.export import ExportError, export
from visionattn.analysis.folder import FolderError, read_folder, remapped, same_logits, write_folder
from visionattn.analysis.quantize import session
from visionattn.analysis.subject import Subject, create, settle
from visionattn.layers.attention.window import WindowAttention
from visionattn.testing import randn

TOOLS = Path(__file__).parents[2] / "tools"


def vit(**kwargs: object) -> nn.Module:
    arch = {"num_classes": 7, "dim": 16, "num_heads": 2, "depth": 1, "img_size": 64, **kwargs}
    return timm.create_model("gated_vit_s16", **arch).eval()


def run_tool(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with torch.enable_grad(), pytest.raises(SystemExit) as end:  # the tool switches gradients off
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return int(end.value.code or 0)


def close(run, model: nn.Module, *shape: int) -> None:
    x = randn(*shape, seed=5)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_with_an_open_size_runs_where_the_model_was_not_traced(tmp_path) -> None:
    model, path = vit(gate="mlp"), tmp_path / "new" / "model.onnx"
    result = export(model, path, format="onnx", size=(64, 64), dynamic_size=True)
    assert result.path == path
    assert result.smallest == 64
    assert {shape[0] for shape in result.shapes} == {1, 3}
    assert len({shape[2:] for shape in result.shapes}) > 2
    run = session(path)
    close(run, model, 2, 3, 64, 64)  # the size of the position embedding
    close(run, model, 5, 3, 128, 160)
    assert list(path.parent.iterdir()) == [path]


@torch.no_grad()
def test_pt2_with_an_open_size_says_from_which_size_on(tmp_path) -> None:
    model = tiny("infvit_pure", depth=1)
    result = export(model, tmp_path / "model.pt2", format="pt2", size=(96, 64), dynamic_size=True)
    run = torch.export.load(result.path).module(check_guards=False)
    close(run, model, 4, 3, 160, 96)


@pytest.mark.slow
@torch.no_grad()
def test_neighbourhoods_larger_than_the_map_export_with_an_open_size() -> None:
    model = tiny("nat", dims=(16,), depths=(1,), kernel_size=19)  # maps of 64 pixels are 16 tokens a side
    program = exporting._program(model, (64, 64), True).module(check_guards=False)
    for size in ((64, 64), (64, 160), (128, 96)):
        close(program, model, 1, 3, *size)


@pytest.mark.slow
@torch.no_grad()
def test_logits_scaled_by_the_number_of_tokens_export_with_an_open_size() -> None:
    arch = {"dims": (16,), "depths": (1,), "mlp_ratios": (2,), "sr_ratios": (1,), "head_dim": 8}
    model = tiny("transnext", **arch)
    attn = model.stages[0].blocks[0].attn
    for layer in (attn.qkv, attn.proj):  # what attention adds is small at the start
        layer.weight *= 20
    program = exporting._program(model, (64, 64), True).module(check_guards=False)
    for size in ((64, 64), (128, 96)):
        close(program, model, 1, 3, *size)


@pytest.mark.slow
@torch.no_grad()
def test_maps_padded_to_windows_export_with_an_open_size() -> None:
    arch = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("davit_tiny", num_classes=7, **arch)
    for block in (m for m in model.modules() if isinstance(m, SpatialBlock)):
        torch.nn.init.normal_(block.attn.qkv.bias)  # what padded tokens are
    model = visionattn.fuse(model.eval())
    program = exporting._program(model, (224, 224), True).module(check_guards=False)
    assert not model._forward_pre_hooks
    for size in ((224, 224), (256, 320)):
        close(program, model, 1, 3, *size)


@pytest.mark.slow
@torch.no_grad()
def test_windows_that_shift_on_maps_of_several_alone_export_with_an_open_size(tmp_path) -> None:
    windows = WindowAttention(8, num_heads=2, window=2, shift=1)
    torch.nn.init.normal_(windows.bias.relative_position_bias_table)
    model = nn.Sequential(nn.Conv2d(3, 8, 32, 32), Permute([0, 2, 3, 1]), windows).eval()
    run = exporting._onnx(model, tmp_path / "model.onnx", (64, 64), True)
    for size in ((64, 64), (64, 160), (96, 128)):
        close(run, model, 2, 3, *size)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_paddings_of_tensorflow_export_with_an_open_size(stride: int, tmp_path) -> None:
    convolution = Conv2dSame(3, 4, (5, 3), stride=stride, dilation=(1, 2))
    model = nn.Sequential(convolution, AvgPool2dSame(2, 2), AvgPool2dSame(3, 1), nn.Flatten(2)).eval()
    path = tmp_path / "model.pt2"
    torch.export.save(exporting._program(model, (64, 64), True), path)
    program = torch.export.load(path).module(check_guards=False)
    assert "forward" not in vars(convolution)
    for size in ((64, 64), (96, 160)):
        close(program, model, 2, 3, *size)


class Chooses(nn.Module):
    """The sign of how much brighter images are than some level."""

    def __init__(self, level: torch.Tensor) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.sum() > self.level, 1.0, -1.0).expand(len(x), 1)


def test_images_between_two_choices_say_nothing_of_a_file() -> None:
    shape = (1, 3, 64, 64)
    between = Chooses(randn(*shape, seed=1).sum())
    run = Chooses(between.level - 1e-4)  # chooses the other for these images alone
    assert exporting._off(run(randn(*shape, seed=1)), between(randn(*shape, seed=1))) == 2
    assert exporting._error(between, run, shape, "onnx", False) == 0
    wrong = Chooses(-between.level)
    with pytest.raises(ExportError, match=r"off by 2.0e\+00 of the largest value"):
        exporting._error(between, wrong, shape, "onnx", False)


class Amplifies(nn.Module):
    """Rounding, until nothing else is left."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e6 * x).flatten(1).sin()


def test_a_model_that_amplifies_rounding_is_told_from_a_file_that_is_off() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return Amplifies()(x * (1 + 1e-6))

    with pytest.raises(ExportError, match=r"cannot be checked: noise of 2e-06 .* moves what the model itself returns"):
        exporting._error(Amplifies(), run, (1, 3, 8, 8), "onnx", False)


@torch.no_grad()
def test_random_weights_get_averages_of_batch_norm_that_keep_activations_in_bounds() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    model[0].weight *= 100
    settle(Subject(model, (32, 32), {}, None))
    assert not any(module.training for module in model.modules())
    assert norm.momentum == 0.1
    out = model(randn(4, 3, 32, 32, seed=1))
    torch.testing.assert_close(out.std(dim=(0, 2, 3)), torch.ones(4), rtol=0.1, atol=0)
    too_small = nn.Sequential(nn.Conv2d(3, 4, 5), norm).eval()
    with pytest.raises(ValueError, match=r"does not run on images \(4, 3, 2, 2\): "):
        settle(Subject(too_small, (2, 2), {}, None))
    assert not norm.training
    assert norm.momentum == 0.1


@torch.no_grad()
def test_torchscript_takes_other_batches(tmp_path) -> None:
    model = tiny("biformer", depths=(1, 1, 1, 1))
    result = export(model, tmp_path / "model.pt", format="torchscript", size=(64, 96))
    close(torch.jit.load(result.path), model, 3, 3, 64, 96)
    assert result.largest_error <= exporting.TOLERANCE


@torch.no_grad()
def test_timms_models_export_fused(tmp_path) -> None:
    model = visionattn.fuse(timm.create_model("convit_tiny", num_classes=7)).eval()
    result = export(model, tmp_path / "model.pt", format="torchscript", size=(64, 64))
    close(torch.jit.load(result.path), model, 2, 3, 64, 64)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch) -> None:
    def wrong(model, path, size, dynamic_size):
        path.write_text("something")
        return lambda x: 1.001 * model(x)

    monkeypatch.setitem(exporting._WRITERS, "torchscript", wrong)
    (tmp_path / "model.pt").write_text("what was there before")
    with pytest.raises(ExportError, match=r"off by 1.0e-03 .*nothing was written"):
        export(vit(), tmp_path / "model.pt", format="torchscript", size=(64, 64))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.pt", "what was there before")]


def test_an_exporter_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(model, path, size, dynamic_size):
        raise KeyError("no such operator\nsecond line")

    monkeypatch.setitem(exporting._WRITERS, "pt2", fail)
    with pytest.raises(ExportError, match=r"cannot be exported to pt2 with an open H and W: .*no such operator"):
        export(vit(), tmp_path / "model.pt2", format="pt2", size=(64, 64), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_first(tmp_path) -> None:
    out = tmp_path / "model"
    with pytest.raises(ValueError, match="torchscript leaves no H and W open: export to onnx or pt2"):
        export(vit(), out, format="torchscript", size=(64, 64), dynamic_size=True)
    with pytest.raises(ValueError, match="multiples of 32 from 64 up, the images are 64 x 72"):
        export(vit(), out, format="onnx", size=(64, 72), dynamic_size=True)
    with pytest.raises(ValueError, match="in training mode"):
        export(vit().train(), out, format="onnx", size=(64, 64))
    with pytest.raises(ValueError, match="cls_token is elsewhere"):
        export(vit(dtype=torch.float64), out, format="onnx", size=(64, 64))
    with pytest.raises(ValueError, match=r"format must be one of onnx, .*got 'tflite'"):
        export(vit(), out, format="tflite", size=(64, 64))
    with pytest.raises(ValueError, match="no model is named 'biformer'"):
        create("biformer")


def test_a_folder_is_what_timm_makes_an_equal_model_of(tmp_path) -> None:
    model, folder = tiny("agent_pvt"), tmp_path / "folder"
    names = [f"kind {i}" for i in range(7)]
    card = {"data_config": {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0}, "label_names": names}
    export(model, folder, format="safetensors", size=(64, 64), card=card)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same_logits(model, loaded, randn(2, 3, 64, 96))
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "agent_pvt_t"
    assert config["label_names"] == names
    assert list(timm.data.resolve_model_data_config(loaded)["mean"]) == [0.1, 0.2, 0.3]
    readme = (folder / "README.md").read_text()
    for part in ("library_name: timm", "license: ", "https://arxiv.org/abs/2312.08874", "import timm, visionattn"):
        assert part in readme
    export(model, folder, format="safetensors", size=(64, 64))  # in place of itself


@pytest.mark.parametrize("family", ["agent_swin", "agent_pvt", "clipped_vit", "transnext_interpolate"])
def test_a_model_made_for_another_size_keeps_it_in_its_folder(family: str, tmp_path) -> None:
    kwargs = {"window_size": None} if family == "agent_swin" else {}
    if family == "clipped_vit":
        kwargs = {"clip": None, "alpha": 0.5}
    model = tiny(family, **kwargs)
    size = (256, 288)  # in Swin, windows would follow from it at construction
    model.set_input_size(size)
    loaded = write_folder(model, tmp_path / "folder")
    assert same_logits(model, loaded, randn(1, 3, *size))


def test_a_folder_of_something_else_is_not_replaced(tmp_path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(FolderError, match=r"holds photo.jpg: name a folder that is new"):
        export(vit(), tmp_path, format="safetensors", size=(64, 64))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(FolderError, match="is a file"):
        export(vit(), tmp_path / "photo.jpg", format="safetensors", size=(64, 64))


def test_a_model_that_was_changed_has_no_folder(tmp_path) -> None:
    model = visionattn.convert(timm.create_model("vit_tiny_patch16_224", depth=1), "linear_infsa").eval()
    with pytest.raises(FolderError, match="timm cannot make VisionTransformer from its arguments"):
        export(model, tmp_path / "folder", format="safetensors", size=(224, 224))
    assert list(tmp_path.iterdir()) == []


def test_official_keys_to_a_folder(tmp_path, monkeypatch, capsys) -> None:
    case = golden("agent/agent_deit_t")
    torch.save({"model": case.state_dict}, tmp_path / "official.pth")
    code = run_tool("convert.py", "agent_deit_t", tmp_path / "official.pth", "--out", tmp_path / "out",
                    monkeypatch=monkeypatch)  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "patch_embed.proj.weight -> stem.proj.weight" in said.out
    model = visionattn.load_checkpoint(timm.create_model("agent_deit_t"), tmp_path / "official.pth").eval()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert same_logits(model, loaded, randn(1, 3, 224, 224))
    code = run_tool("convert.py", "agent_deit_s", tmp_path / "official.pth", "--out", tmp_path / "other",
                    monkeypatch=monkeypatch)  # fmt: skip
    assert code == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_was_renamed_joined_and_dropped_is_told(tmp_path) -> None:
    model = vit(gate="none")
    state = {}
    for key, value in model.state_dict().items():
        old = key.replace("stem.", "patch_embed.").replace("stages.", "blocks.").replace("attn.proj.", "attn.out_proj.")
        if ".qkv." in old:
            state |= {old.replace("qkv", f"{n}_proj"): part for n, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[old] = value
    torch.save(state, tmp_path / "official.pth")
    other = vit()  # has gates, which it loses: the file has none
    visionattn.load_checkpoint(other, tmp_path / "official.pth")
    told = remapped(other, tmp_path / "official.pth")
    q, k, v = (f"blocks.0.attn.{n}_proj.weight" for n in "qkv")
    assert told.joined["stages.0.attn.qkv.weight"] == (k, q, v) or set(told.joined["stages.0.attn.qkv.weight"]) == {
        q,
        k,
        v,
    }
    assert told.renamed["stages.0.norm1.weight"] == "blocks.0.norm1.weight"
    assert told.sources["cls_token"] == ("cls_token",)
    assert told.dropped == ()
    loaded = write_folder(other, tmp_path / "folder")
    assert same_logits(model, loaded, randn(1, 3, 64, 64))
    assert read_folder(tmp_path / "folder", like=other).stages[0].attn.gate is None

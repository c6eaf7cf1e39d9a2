"""Training, resuming and testing through the command lines, on generated data; errors before the first step."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense.data import CLASSES, detection, segmentation
from tests.dense.families import arguments
from visionattn.dense import ConfigError, DatasetError, WeightsError
from visionattn.dense.run import load_config, load_whole, read_run

pytestmark = pytest.mark.dense
ROOT = Path(__file__).parents[2]
CONFIGS = {
    "mmdet": "configs/bccd/retinanet_biformer_t_bccd.py",
    "mmseg": "configs/camvid/fpn_transnext_micro_camvid.py",
}
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line of tools/ in a folder of its own; returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str, *args: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        return int(stopped.value.code or 0)

    return run


def backbone(family: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": "visionattn.Backbone", **arguments(family, **kwargs)}


def small_config(scope: str, root: Path, **changes: Any) -> Path:
    """The committed config of a toolbox at small size on generated data."""
    data = detection(root / "data") if scope == "mmdet" else segmentation(root / "data")
    common: dict[str, Any] = {
        "train_cfg": {"max_epochs": 2, "val_interval": 1},
        "param_scheduler": [],
        "default_hooks": {"checkpoint": {"save_best": None}},
    }
    loader = {"batch_size": 4, "num_workers": 0, "persistent_workers": False}
    if scope == "mmdet":
        dataset: dict[str, Any] = {
            "data_root": f"{data}/",
            "ann_file": "boxes.json",
            "data_prefix": {"img": "images/"},
            "metainfo": {"classes": CLASSES},
        }
        model = {
            "backbone": {"_delete_": True, **backbone("biformer", out_indices=[1, 2, 3])},
            "neck": {"in_channels": [32, 48, 64], "out_channels": 16},
            "bbox_head": {"num_classes": 2, "in_channels": 16, "feat_channels": 16, "stacked_convs": 1},
        }
        evaluator: dict[str, Any] = {"ann_file": f"{data}/boxes.json"}
    else:
        dataset = {
            "data_root": str(data),
            "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
            "metainfo": {"classes": ("ground", *CLASSES), "palette": [[0, 0, 0], [255, 0, 0], [0, 255, 0]]},
            "ignore_index": 255,
        }
        model = {
            "backbone": {"_delete_": True, **backbone("transnext")},
            "neck": {"in_channels": [16, 32, 48, 64], "out_channels": 16},
            "decode_head": {"in_channels": [16] * 4, "channels": 16, "num_classes": 3, "ignore_index": 255},
        }
        evaluator = {}
    loaders = {f"{split}_dataloader": {**loader, "dataset": dataset} for split in ("train", "val", "test")}
    evaluators = {f"{split}_evaluator": evaluator for split in ("val", "test")} if evaluator else {}
    path = root / "small.py"
    lines = [f"{k} = {v!r}" for k, v in {**common, "model": model, **loaders, **evaluators, **changes}.items()]
    path.write_text("\n".join([f"_base_ = {str(ROOT / CONFIGS[scope])!r}", *lines]))
    return path


@pytest.mark.parametrize("scope", CONFIGS)
def test_train_resume_test(scope: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(scope, tmp_path)
    work = tmp_path / "work"
    assert run("train_dense.py", config, "--work-dir", work, "--cfg-options", "train_cfg.max_epochs=1") == 0
    assert "is in order" in capsys.readouterr().out
    first = read_run(work / "epoch_1.pth")
    assert run("train_dense.py", config, "--work-dir", work, "--resume") == 0
    assert (work / "last_checkpoint").read_text().endswith("epoch_2.pth")
    second = read_run(work / "epoch_2.pth")
    assert any(not torch.equal(first[k], second[k]) for k in first if k.startswith("backbone."))
    steps = [json.loads(line).get("step") for log in work.glob("*/vis_data/scalars.json") for line in log.open()]
    assert max(steps) >= 2
    assert list(work.glob("*/vis_data/events.out.tfevents*"))
    capsys.readouterr()

    options = ["model.test_cfg.score_thr=0.0"] if scope == "mmdet" else ["model.test_cfg.mode=whole"]
    shown = tmp_path / "shown"
    command = ["test_dense.py", config, work / "epoch_2.pth", "--work-dir", work, "--show-dir", shown]
    assert run(*command, "--cfg-options", *options) == 0
    assert ("coco/bbox_mAP_50" if scope == "mmdet" else "mIoU") in capsys.readouterr().out.splitlines()[-1]
    assert len([*shown.rglob("*.jpg"), *shown.rglob("*.png")]) == 4


def test_faults_of_the_data_stop_training(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config("mmdet", tmp_path)
    (tmp_path / "data/images/2.jpg").unlink()
    assert run("train_dense.py", config) == 1
    error = capsys.readouterr().err
    assert "error: the data cannot be trained on:" in error
    assert "train: 1 of 4 images are missing" in error
    assert run("check_dataset.py", config) == 1
    assert not (tmp_path / "output").exists()


def test_heads_have_as_many_classes_as_the_data(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config("mmseg", tmp_path)
    assert run("check_dataset.py", config) == 0
    assert "train: BaseSegDataset is in order" in capsys.readouterr().out
    assert run("check_dataset.py", config, "--cfg-options", "model.decode_head.num_classes=150") == 1
    assert "model.decode_head.num_classes is 150, but the dataset has 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default_scope = 'mmpose'", "must set default_scope to 'mmdet' or 'mmseg', got 'mmpose'"),
        ("default_scope = ", "is not a config that mmengine can read"),
    ],
)
def test_configs_that_cannot_run(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.py")


def test_no_config_and_no_gpu(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train_dense.py", tmp_path / "none.py") == 1
    assert f"error: no config at {tmp_path / 'none.py'}" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run("train_dense.py", small_config("mmseg", tmp_path), "--amp") == 1
        assert "error: --amp needs a GPU" in capsys.readouterr().err
        assert run("train_dense.py", tmp_path / "small.py", "--launcher", "pytorch") == 1
        assert "error: --launcher pytorch needs a GPU a process" in capsys.readouterr().err


def test_an_imagenet_file_is_no_detector(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config("mmdet", tmp_path)
    torch.save({"model": {"stem.0.weight": torch.ones(3)}}, tmp_path / "imagenet.pth")
    assert run("test_dense.py", config, tmp_path / "imagenet.pth") == 1
    error = capsys.readouterr().err
    assert "holds a classifier's or a backbone's weights, without the neck and heads of a RetinaNet" in error
    assert "model.backbone.pretrained" in error


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_checkpoints_are_read_without_running_code(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "message_hub": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="could run code"):
        read_run(tmp_path / "evil.pth")
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": {"config": "import os"}}, tmp_path / "config.pth")
    with pytest.raises(WeightsError, match="would execute"):
        read_run(tmp_path / "config.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_run(tmp_path / "empty.pth")
    config = small_config("mmseg", tmp_path, load_from=str(tmp_path / "evil.pth"))
    assert run("train_dense.py", config, "--no-check") == 1


def test_weights_of_another_model_are_told() -> None:
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "neck": torch.nn.Linear(2, 2)})
    state = {k: v + 1 for k, v in model.state_dict().items()}
    load_whole(model, state, "x.pth")
    assert torch.equal(model["neck"].bias, state["neck.bias"])
    with pytest.raises(WeightsError, match=r"1 missing from the file: neck\.bias"):
        load_whole(model, {k: v for k, v in state.items() if k != "neck.bias"}, "x.pth")


def test_an_unknown_dataset_is_told(tmp_path: Path) -> None:
    cfg = load_config(small_config("mmseg", tmp_path), {"train_dataloader.dataset.type": "NoSuchDataset"})
    from visionattn.dense.datasets import check_config

    with pytest.raises(DatasetError, match="no dataset is called 'NoSuchDataset' in mmseg"):
        check_config(cfg)

"""The configs of COCO and ADE20K: every one builds, and its size is the published one."""

import ast
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from visionattn.analysis import cards, dense_flops

mmengine = pytest.importorskip("mmengine", reason="needs the `dense` extra")
pytest.importorskip("mmdet", reason="needs the `dense` extra")
pytest.importorskip("mmseg", reason="needs the `dense` extra")

from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DATASETS, METRICS, PARAM_SCHEDULERS, TRANSFORMS, DefaultScope, Registry  # noqa: E402

from visionattn.dense import Backbone  # noqa: E402

pytestmark = pytest.mark.dense

ROOT = Path(__file__).parents[2]
FILES = {
    f"{p.parent.name}/{p.stem}": p for f in ("coco", "ade20k") for p in sorted((ROOT / "configs" / f).glob("*.py"))
}
RESULTS = {r["config"]: (card, r) for card in cards.read(ROOT) for r in card.results}
METRICS_OF = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}
EACH = {}  # one config a family and head
for _name, (_card, _) in RESULTS.items():
    EACH.setdefault((_card.front["family"], _name.partition("_")[0]), _name)
QUICK = {name.partition("_")[0]: name for name in reversed(EACH.values())}.values()  # one a head
every_config = pytest.mark.parametrize("name", FILES)


@pytest.fixture(autouse=True)
def _fast_and_quiet(monkeypatch):
    """Skip what costs time and matters to nobody here: an index of published models, initial values on meta."""

    def not_in_the_index(*_: Any) -> str:
        raise ValueError

    monkeypatch.setattr("mmengine.config.config._get_external_cfg_path", not_in_the_index)
    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_config_is_on_a_card_and_the_other_way_round() -> None:
    assert set(FILES) == set(RESULTS)
    assert len(FILES) > 100


@every_config
def test_head_comment_says_what_was_reported(name: str) -> None:
    card, result = RESULTS[name]
    text = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert "Reported in" in text
    assert "(not measured here)" in text
    for key, label in METRICS_OF.items():
        if key in result:
            assert f"{label} {result[key]}" in text
    assert card.front["dense"]["kind"] == "reported"


@every_config
def test_size_is_the_published_one(name: str) -> None:
    """Parameters within 1 %, multiply-adds within 2 %, or the same when rounded as published, or the card says why."""
    card, result = RESULTS[name]
    row = cards.Tables(ROOT).detector(result)
    for what, unit, tolerance in (("params", 1e6, 0.01), ("macs", 1e9, 0.02)):
        published = result.get(what)
        if published is not None and not cards.agrees(row[what] / unit, published, tolerance):
            reason = result.get(f"why_{what}", card.front["dense"].get(f"why_{what}"))
            assert reason, f"{what}: {row[what] / unit:.2f}, published {published}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FILES])
def test_config_builds_and_is_counted_as_committed(name: str) -> None:
    cfg = mmengine.Config.fromfile(FILES[name])
    model, scope = dense_flops.build(FILES[name])
    assert isinstance(model.backbone, Backbone)
    assert scope == ("mmdet" if name.startswith("coco") else "mmseg")
    _, result = RESULTS[name]
    row = cards.Tables(ROOT).detector(result)
    assert sum(p.numel() for p in model.parameters()) == row["params"]
    if name in EACH.values():
        counted = dense_flops.model_cost(model, tuple(row["size"]))
        assert (counted.macs, counted.by_kind) == (row["macs"], row["by_kind"])
    with DefaultScope.overwrite_default_scope(scope):
        check_optimizer(model, cfg)
        check_data_and_schedule(cfg)


def check_optimizer(model: torch.nn.Module, cfg: Any) -> None:
    """Every parameter is trained once, and every name that the config gives special treatment occurs."""
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    names = [n for n, _ in model.named_parameters()]
    for key in cfg.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {}):
        assert any(key in n for n in names), key
    if "paramwise_cfg" in cfg.optim_wrapper:
        undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
        assert {id(p) for n, p in model.backbone.named_parameters() if "norm" in n} <= undecayed


def check_data_and_schedule(cfg: Any) -> None:
    """What the config names is registered, the schedule fills the run, and the rate follows the number of GPUs."""
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert registered(DATASETS, loader.dataset.type)
        for transform in loader.dataset.pipeline:
            TRANSFORMS.build(transform)
    assert registered(METRICS, cfg.val_evaluator.type)
    length = cfg.train_cfg.get("max_epochs") or cfg.train_cfg.max_iters
    assert all(registered(PARAM_SCHEDULERS, s.type) for s in cfg.param_scheduler)
    assert cfg.param_scheduler[-1].end == length  # behind the warm-up
    assert cfg.auto_scale_lr == {"enable": True, "base_batch_size": 8 * cfg.train_dataloader.batch_size}


def registered(root: Registry, name: str) -> bool:
    """Whether the toolbox of the scope in force, or mmengine, knows a name."""
    with root.switch_scope_and_registry(None) as registry:
        return registry.get(name) is not None


def test_all_levels_of_a_backbone_are_used() -> None:
    """RetinaNet's pyramid begins at stage 2: stage 1 is no output, so that none of its parameters is left over."""
    model, _ = dense_flops.build(FILES["coco/retinanet_biformer_s_fpn_1x_coco"])
    assert model.backbone.strides == [8, 16, 32]
    assert len(model.neck.lateral_convs) == 3


def test_command_line_counts_a_config(monkeypatch, capsys) -> None:
    path = FILES["ade20k/fpn_litv2_s_80k_ade20k-512x512"]
    monkeypatch.setattr(sys, "argv", ["flops.py", "--config", str(path), "--size", "64", "96"])
    runpy.run_path(str(ROOT / "tools/flops.py"), run_name="__main__")
    assert re.search(r"64x96 +31\.449 ", capsys.readouterr().out)


def test_bad_input_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        dense_flops.count_config(tmp_path / "none.py")
    (tmp_path / "scope.py").write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(ValueError, match="must set default_scope to one of mmdet, mmseg, got None"):
        dense_flops.count_config(tmp_path / "scope.py")

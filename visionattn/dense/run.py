"""Train and test mmdetection's and mmsegmentation's configs on mmengine's runner."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.dense.datasets import check_config
from visionattn.dense.errors import ConfigError, WeightsError
from visionattn.extras import require
from visionattn.models._checkpoint import WRAPPERS, CheckpointError, misfits, read_checkpoint

EXTRA = "visionattn[dense]"


def load_config(
    path: str | Path, options: Mapping[str, Any] | None = None, *, work_dir: str | None = None, launcher: str = "none"
) -> Any:
    """Read an mmengine config and complete it.

    Args:
        path: A Python, YAML or JSON config of mmdetection or mmsegmentation.
        options: Values to set, by dotted name.
        work_dir: Where the run writes; the config's ``work_dir`` if None, else ``output/<the config's name>``.
        launcher: What started the processes.

    Returns:
        ``mmengine.Config``. TensorBoard is among its writers, and predictions are drawn while validating.

    Raises:
        ConfigError: The file is missing, cannot be read, or is not a toolbox's.
        MissingExtraError: A package of the ``dense`` extra is not installed.
    """
    mmengine = require("mmengine", "tools/train_dense.py", EXTRA)
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config at {path}")
    try:
        cfg = mmengine.Config.fromfile(path)
    except (SyntaxError, OSError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a config that mmengine can read: {error}") from error
    if options:
        cfg.merge_from_dict(dict(options))
    scope = cfg.get("default_scope")
    if scope not in ("mmdet", "mmseg"):
        raise ConfigError(f"{path} must set default_scope to 'mmdet' or 'mmseg', got {scope!r}")
    require(scope, str(path), EXTRA)
    if find_spec("mmcv._ext") is None:
        raise ConfigError(
            "mmcv has no compiled operators: it was built in isolation from torch. Reinstall it with "
            "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv"
        )
    cfg.work_dir = work_dir or cfg.get("work_dir") or f"output/{path.stem}"
    cfg.launcher = launcher
    if launcher != "none" and not torch.cuda.is_available():
        raise ConfigError(f"--launcher {launcher} needs a GPU a process: mmengine's does not start on the CPU")
    name = {"mmdet": "DetLocalVisualizer", "mmseg": "SegLocalVisualizer"}[scope]
    cfg.setdefault("visualizer", {"type": name})
    writers = cfg.visualizer.setdefault("vis_backends", [{"type": "LocalVisBackend"}])
    if not any(writer["type"] == "TensorboardVisBackend" for writer in writers):
        cfg.visualizer.vis_backends = [*writers, {"type": "TensorboardVisBackend"}]
    drawing = {"mmdet": "DetVisualizationHook", "mmseg": "SegVisualizationHook"}[scope]
    cfg.setdefault("default_hooks", {}).setdefault("visualization", {"type": drawing}).setdefault("draw", True)
    return cfg


def train(cfg: Any, *, resume: bool = False, amp: bool = False, check: bool = True) -> None:
    """Check the datasets of a config from `load_config`, then train.

    Args:
        cfg: The config.
        resume: Go on from the last checkpoint in the work directory, or from ``load_from`` if the config names one;
            where there is none, start afresh.
        amp: Train in mixed precision (on a GPU).
        check: Check the datasets first.

    Raises:
        DatasetError: A dataset has faults; the message lists them.
        ConfigError: The config asks for what cannot be had here.
        WeightsError: The checkpoint to go on from holds code, or is damaged.
    """
    from mmengine.runner import Runner, find_latest_checkpoint

    if check:
        for line in check_config(cfg):
            print(line)
    if amp:
        if not torch.cuda.is_available():
            raise ConfigError("--amp needs a GPU: mmengine's mixed precision does not run on the CPU")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    cfg.resume = resume
    source = cfg.get("load_from") or (find_latest_checkpoint(cfg.work_dir) if resume else None)
    if source:
        read_run(source)  # mmengine would run code that a file holds
    Runner.from_cfg(cfg).train()


def evaluate(
    cfg: Any, checkpoint: str | Path, *, show_dir: str | Path | None = None, check: bool = True
) -> dict[str, Any]:
    """Evaluate a checkpoint on the test set of a config from `load_config`.

    Args:
        cfg: The config.
        checkpoint: What training wrote.
        show_dir: Where to write pictures of every prediction.
        check: Check the test set first.

    Returns:
        The metrics.

    Raises:
        WeightsError: The file holds code, is damaged, or was made for another model; weights of a classifier or of a
            backbone alone are told apart.
        DatasetError: The test set has faults.
    """
    from mmengine.runner import Runner

    if check:
        for line in check_config(cfg, splits=("test",)):
            print(line)
    state = read_run(checkpoint)
    hook = cfg.default_hooks.visualization
    hook.draw = show_dir is not None
    if show_dir is not None:
        hook.interval = 1
        if cfg.default_scope == "mmdet":
            hook.test_out_dir = str(Path(show_dir).absolute())
        else:
            cfg.visualizer.save_dir = str(Path(show_dir).absolute())
    cfg.load_from = None
    cfg.resume = False
    runner = Runner.from_cfg(cfg)
    load_whole(runner.model, state, checkpoint)
    return runner.test()


def read_run(path: str | Path) -> dict[str, Tensor]:
    """Read the model's weights from what training wrote, without running any code that the file holds.

    Raises:
        WeightsError: There is no such file, it holds code, or it is damaged.
    """
    try:
        data = read_checkpoint(path)
    except (FileNotFoundError, CheckpointError) as error:
        raise WeightsError(str(error)) from error
    if not isinstance(data, Mapping):
        raise WeightsError(f"{path} holds a {type(data).__name__}, expected what tools/train_dense.py writes")
    if isinstance(data.get("meta"), Mapping) and "config" in data["meta"]:
        raise WeightsError(f"{path} holds a configuration in meta['config'], which mmengine would execute")
    data = next((data[key] for key in WRAPPERS if isinstance(data.get(key), Mapping)), data)
    state = {k.removeprefix("module."): v for k, v in data.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no weights: expected what tools/train_dense.py writes")
    return state


def load_whole(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a detector's or segmenter's weights, all of them.

    Raises:
        WeightsError: Something is missing, too much or of another shape.
    """
    model = getattr(model, "module", model)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("data_preprocessor.")}
    state = {k: v for k, v in state.items() if not k.startswith("data_preprocessor.")}
    if not any(k.startswith("backbone.") for k in state):
        raise WeightsError(
            f"{path} holds a classifier's or a backbone's weights, without the neck and heads of a "
            f"{type(model).__name__}. To start training from them, set model.backbone.pretrained to the file; testing "
            "needs what that training wrote"
        )
    if problems := misfits(state, own):
        raise WeightsError(
            f"{path} does not fit this {type(model).__name__}. {' '.join(problems)} Give the config that it was "
            "trained with"
        )
    model.load_state_dict({**model.state_dict(), **state})

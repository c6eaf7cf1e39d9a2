"""What each of two gloo processes does: `python -m torch.distributed.run --nproc_per_node 2 pair.py FOLDER`.

Each process begins once and does everything in turn, so that the start is paid for once; the first one writes
`FOLDER/losses.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from torch.nn.modules.batchnorm import _BatchNorm

from tests.models.variants import TINY
from visionattn.train import TrainConfig, train
from visionattn.train import engine as engine_module
from visionattn.train.engine import _Run
from visionattn.train.setup import assemble
from visionattn.train.signals import StopSignal

STEPS = 20
FAMILIES = (
    "biformer", "dinat", "transnext", "agent_pvt", "infvit_pure", "gated_vit", "inline_swin", "mala", "litv2",
    "convit", "davit", "maxvit", "shvit",
)  # fmt: skip
HOSTED: dict[str, tuple[str, dict[str, Any]]] = {  # timm's, fused
    "convit": ("convit_tiny", {"embed_dim": 8, "depth": 3, "local_up_to_layer": 2, "patch_size": 8, "img_size": 64}),
    "davit": ("davit_tiny", {"embed_dims": [16, 32], "num_heads": [1, 2], "depths": [1, 1], "window_size": 4}),
    "maxvit": ("maxvit_tiny_tf_224", {"embed_dim": [32, 64], "depths": [1, 1], "stem_width": 8, "img_size": 64}),
    "shvit": ("shvit_s1", {"embed_dim": [16, 32, 48], "partial_dim": [8, 16, 16], "depth": [1, 1, 1]}),
}
SCALARS = ("infvit_pure",)  # families with parameters that have no dimensions, which DeepSpeed does not take
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ZERO = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
KINDS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp": FSDP}
if is_deepspeed_available():
    KINDS["zero"] = ZERO


def recipe(family: str, folder: Path, experiment: str, **changes: Any) -> TrainConfig:
    """Twenty updates of eight digits, over all processes and without chance, on a family's small variant."""
    name, arch = HOSTED.get(family) or TINY[family]
    values: dict[str, Any] = {
        "model": name, "fuse": family in HOSTED, "model_kwargs": arch, "dataset": "digits", "img_size": 64,
        "no_aug": True, "lr": 1e-3,
        "global_batch_size": 8, "epochs": 1, "warmup_epochs": 0, "sched": "none", "clip_grad": 1.0, "workers": 0,
        "output": str(folder), "experiment": experiment, "tensorboard": False, "progress": False, "overwrite": True,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def forget() -> None:
    """Let the next run be the first of this process for accelerate."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if torch.distributed.is_initialized():
        PartialState().distributed_type = DistributedType.MULTI_CPU


def losses(cfg: TrainConfig) -> list[float]:
    """The losses of the first updates, each the mean over all processes and accumulated batches."""
    forget()
    run = _Run(assemble(cfg), StopSignal())
    run.parts.model.train()
    for module in run.parts.model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # statistics of half a batch are other statistics
    found: list[float] = []
    batches = run.parts.loader.epoch(0)
    for update in range(STEPS):
        parts = [run._step(next(batches), update * cfg.grad_accum_steps + i) for i in range(cfg.grad_accum_steps)]
        found.append(float(run.accelerator.reduce(torch.stack(parts).mean(), "mean")))
    return found


def resumable(folder: Path, experiment: str, **changes: Any) -> TrainConfig:
    """A run with everything in its state, whose epoch has three updates."""
    return recipe(
        "gated_vit", folder, experiment, dataset="", data_dir=str(folder / "images"), epochs=2, drop_path=0.2,
        mixup=0.5, model_ema=True, model_ema_decay=0.5, log_interval=1, sched="cosine", overwrite=False, **changes,
    )  # fmt: skip


def stopped_and_resumed(folder: Path, name: str) -> None:
    """A whole run, and one that the first process is told to stop in the middle of its second epoch."""
    forget()
    train(resumable(folder, f"{name}-whole"))
    step = engine_module._Run._step

    def stepping(run: Any, batch: Any, number: int) -> torch.Tensor:
        loss = step(run, batch, number)
        if run.at.update == 4 and run.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    engine_module._Run._step = stepping  # type: ignore[method-assign]
    forget()
    result = train(resumable(folder, f"{name}-part"))
    engine_module._Run._step = step  # type: ignore[method-assign]
    assert result.stopped_by == signal.SIGTERM
    assert len(result.history) == 1
    forget()
    train(resumable(folder, f"{name}-part", resume="auto"))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    found: dict[str, dict[str, list[float]]] = {}
    for kind, variables in KINDS.items():
        os.environ.update(variables)
        families = [family for family in FAMILIES if kind != "zero" or family not in SCALARS]
        found[kind] = {family: losses(recipe(family, folder, kind)) for family in families}
        found[kind]["accumulated"] = losses(recipe("mala", folder, kind, grad_accum_steps=2))
        # Unclipped: a norm over shards is summed in another order, and bf16 makes much of its last bit.
        found[kind]["bf16"] = losses(recipe("mala", folder, kind, amp="bf16", clip_grad=None))
        found[kind]["checkpointed"] = losses(recipe("mala", folder, kind, grad_checkpointing=True, drop_path=0.2))
        stopped_and_resumed(folder, kind)
    if int(os.environ["RANK"]) == 0:
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

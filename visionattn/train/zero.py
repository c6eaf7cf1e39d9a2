"""DeepSpeed's ZeRO through accelerate, stages 1 and 2: every process has the weights and a part of the optimiser.

As in every other run the weights stay in float32 and mixed precision is autocast. DeepSpeed joins the weights of a
group into one vector and cuts it without regard to layers, so the optimiser must treat each number by itself.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available, is_transformers_available
from torch import nn

from visionattn.train.config import TrainConfig
from visionattn.train.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from accelerate import DeepSpeedPlugin

ELEMENTWISE = ("adam", "adamw", "lion", "momentum", "nadam", "nadamw", "nesterov", "rmsprop", "sgd")
# What of DeepSpeed's optimiser state is tensors and plain values, and needed to continue.
_STATE = (
    "base_optimizer_state", "single_partition_of_fp32_groups", "clip_grad", "group_paddings",
    "param_alignment_paddings", "partition_count", "ds_version",
)  # fmt: skip


def plugin_from_launch(cfg: TrainConfig) -> DeepSpeedPlugin | None:
    """Return what `accelerate launch --use_deepspeed` asked for, with the run's batch and clipping, or ``None``.

    Raises:
        ConfigError: DeepSpeed is missing, or was asked for what it does differently from every other run.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if not (is_deepspeed_available() and is_transformers_available()):  # accelerate looks at transformers' version
        raise ConfigError("DeepSpeed is not installed here: pip install visionattn[deepspeed]")
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(gradient_accumulation_steps=cfg.grad_accum_steps, gradient_clipping=cfg.clip_grad or 0.0)
    config = plugin.deepspeed_config
    stage = int(config["zero_optimization"]["stage"])
    if stage not in (1, 2):
        raise ConfigError(f"ZeRO runs in stages 1 and 2, not {stage}: to cut the weights too, launch with --use_fsdp")
    offloaded = [
        name for name in ("offload_optimizer", "offload_param")
        if config["zero_optimization"].get(name, {}).get("device", "none") != "none"
    ]  # fmt: skip
    precisions = [config.pop(name, {}) for name in ("fp16", "bf16", "amp", "torch_autocast")]
    theirs = [name for name in ("optimizer", "scheduler") if name in config]
    if any(precision.get("enabled") is True for precision in precisions):
        theirs.append("mixed precision")
    if offloaded or theirs:
        raise ConfigError(
            f"leave {', '.join(offloaded + theirs)} out of DeepSpeed's configuration: optimiser, schedule and "
            "precision are this run's own, and nothing is offloaded"
        )
    if cfg.amp == "fp16":
        raise ConfigError("with DeepSpeed give --amp bf16 or none: it scales losses for fp16 in a way of its own")
    if cfg.clip_grad is not None and cfg.clip_mode != "norm":
        raise ConfigError(f"DeepSpeed clips gradients by their norm alone, clip_mode is {cfg.clip_mode!r}")
    if cfg.opt.lower() not in ELEMENTWISE:
        raise ConfigError(
            f"opt {cfg.opt!r} looks at whole layers or is not known to treat each weight by itself, as ZeRO needs: "
            f"take one of {', '.join(ELEMENTWISE)}, or launch with --use_fsdp"
        )
    config["gradient_accumulation_steps"] = cfg.grad_accum_steps
    config["gradient_clipping"] = cfg.clip_grad or 0.0
    return plugin


def start(accelerator: Accelerator, plugin: DeepSpeedPlugin | None, amp: str) -> None:
    """Let the plugin count on CPUs too, where accelerate overlooks it, and let autocast be torch's."""
    if plugin is None:
        return
    state = accelerator.state
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        PartialState().distributed_type = DistributedType.DEEPSPEED  # whence every later look at the state copies it
        state.distributed_type = DistributedType.DEEPSPEED
        plugin.set_mixed_precision("no")
        state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)
    accelerator.autocast = functools.partial(
        torch.autocast, accelerator.device.type, torch.bfloat16, enabled=amp == "bf16"
    )


def is_used(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed drives the run."""
    return bool(accelerator.distributed_type is DistributedType.DEEPSPEED)


def plan(accelerator: Accelerator, model: nn.Module, batch: int) -> None:
    """Tell DeepSpeed the images of one process in one pass; before ``prepare``.

    Raises:
        ConfigError: the model has parameters that DeepSpeed cannot send to the other processes.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ConfigError(
            f"DeepSpeed takes no parameter without dimensions ({scalars[0]}, ...): launch with --use_fsdp"
        )
    config = accelerator.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"], config["train_batch_size"] = batch, "auto"


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """This process's part of the optimiser's state, as tensors and plain values.

    Args:
        optimizer: as `Accelerator.prepare` returned it.
    """
    state = optimizer.optimizer.state_dict()
    return {"stage": int(state["zero_stage"]), **{name: state[name] for name in _STATE}}


def load_optimizer(accelerator: Accelerator, optimizer: Any, parts: list[dict[str, Any]] | None) -> None:
    """Continue from the parts of all processes; the model has been loaded.

    Raises:
        CheckpointError: the state is not DeepSpeed's, or of another number of processes or another stage.
    """
    if parts is None:
        raise CheckpointError("the state was not saved under DeepSpeed: continue it as it was launched")
    mine = accelerator.num_processes, int(optimizer.optimizer.state_dict()["zero_stage"])
    theirs = len(parts), parts[0]["stage"]
    if mine != theirs:
        raise CheckpointError(
            f"the state is of {theirs[0]} processes and ZeRO stage {theirs[1]}, this run has {mine[0]} and stage "
            f"{mine[1]}: continue it as it was launched"
        )
    optimizer.optimizer.load_state_dict(parts, load_from_fp32_weights=True)

"""FSDP2 through accelerate: a model sharded by block, its average too, and states written as one file a process.

Sharding changes where numbers lie and nothing else: parameters, gradients and optimiser states stay in float32, mixed
precision is autocast as in every other run, and activation checkpointing is the model's own, which draws the same
random numbers again. What was saved in shards is put together on reading, so that any number of processes, sharded or
not, continues from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from visionattn.train.errors import CheckpointError, ConfigError
from visionattn.train.files import write_atomically


def plugin_from_launch() -> FullyShardedDataParallelPlugin | None:
    """Return what `accelerate launch --use_fsdp` asked for, or ``None``.

    Raises:
        ConfigError: it asked for the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("training shards with FSDP2: give accelerate launch --fsdp_version 2")
    plugin.cpu_ram_efficient_loading = False  # every process builds the same weights from the seed
    return plugin


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let the plugin count on CPUs too, where accelerate overlooks it."""
    if plugin is not None and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        PartialState().distributed_type = DistributedType.FSDP  # whence every later look at the state copies it
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only its part of the model."""
    return bool(accelerator.is_fsdp2)


def plan(accelerator: Accelerator, model: nn.Module) -> None:
    """Decide what is gathered at once: a block, unless `accelerate launch` said otherwise; before ``prepare``."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not size_based_auto_wrap_policy:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or sorted(block_classes(model))
    plugin.mixed_precision_policy = None  # autocast, as everywhere
    if plugin.activation_checkpointing:  # accelerate's would draw other random numbers in the backward pass
        plugin.activation_checkpointing = False
        model.set_grad_checkpointing(True)
    _leave_scalars_whole(accelerator, model)


def shard_like(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a second model (an average) as `Accelerator.prepare` sharded the first."""
    _leave_scalars_whole(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


def _leave_scalars_whole(accelerator: Accelerator, model: nn.Module) -> None:
    """FSDP2 cannot cut a parameter without dimensions: every process keeps it."""
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList(scalars)]


def average_whole_gradients(model: nn.Module) -> None:
    """Average over the processes what FSDP2 leaves alone: gradients of parameters that are not cut."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def block_classes(model: nn.Module) -> set[str]:
    """Class names of a model's blocks, by timm's convention that they lie in lists named ``blocks``.

    Isotropic backbones of this library hold their blocks in ``stages`` itself.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    chosen = [module for name, module in lists.items() if name.rpartition(".")[2] == "blocks"]
    if not chosen:
        chosen = [lists[name] for name in ("stages", "layers") if name in lists]
    return {type(block).__name__ for module in chosen for block in _leaves(module)}


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Members of nested lists."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return [module]
    return [leaf for child in module for leaf in _leaves(child)]


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return value.to_local() if isinstance(value, DTensor) else value


# States. A shard of a tensor is saved as {"shard": dimension, "local": this process's part}; `checkpoint.join_shards`
# puts them together.

_TENSORS = ("update", "model", "ema", "optimizer")  # what processes but the first write


def save_shards(path: Path, state: dict[str, Any], accelerator: Accelerator, own: dict[str, Any] | None = None) -> None:
    """Write this process's part of a state into the folder ``path``; call it in every process.

    The folder appears complete, in one step.

    Args:
        path: of the state.
        state: tensors, sharded or not, and plain values, which are the first process's.
        accelerator: of the run.
        own: what cannot be put together: on reading, a list of all processes' under this name.

    Raises:
        CheckpointError: in every process, if one could not write; earlier states are intact.
    """
    part = path.with_name(f".{path.name}.part")
    if accelerator.is_main_process:
        part.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        state = {name: state[name] for name in _TENSORS}
    mine = {**_map(state, _split(accelerator.is_main_process)), "processes": accelerator.num_processes}
    if own is not None:
        mine["own"] = own
    problem = ""
    try:
        write_atomically(part / f"process-{accelerator.process_index:04d}.pt", lambda file: torch.save(mine, file))
    except CheckpointError as error:
        problem = str(error)
    problems = [text for text in gather_object([problem]) if text]
    if accelerator.is_main_process:
        if problems:
            shutil.rmtree(part)
        else:
            part.replace(path)
    accelerator.wait_for_everyone()
    if problems:
        raise CheckpointError(problems[0])


def load_model(model: nn.Module, full: dict[str, Tensor]) -> None:
    """Load a whole state dict into a model that may be sharded.

    Raises:
        RuntimeError: it does not fit.
    """
    own = model.state_dict()
    model.load_state_dict({name: _part(value, own.get(name)) for name, value in full.items()})


def load_optimizer(optimizer: Any, full: dict[str, Any]) -> None:
    """Load a whole optimiser state where the parameters may be sharded.

    Raises:
        ValueError: it does not fit, or keeps sums of another shape than the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    for index, values in full["state"].items():
        like = parameters[index]
        if isinstance(like, DTensor) and any(_sized(v) and v.shape != like.shape for v in values.values()):
            raise ValueError("this optimiser cannot continue in shards: its state has another shape than the weights")
        states[index] = {key: _part(value, like) if _sized(value) else value for key, value in values.items()}
    optimizer.load_state_dict({**full, "state": states})


def _sized(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _part(value: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, laid out like another."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _split(first: bool) -> Callable[[Any], Any]:
    def split(value: Any) -> Any:
        if isinstance(value, DTensor):
            (placement,) = value.placements
            assert isinstance(placement, Shard), placement
            return {"shard": placement.dim, "local": value.to_local().detach().cpu().clone()}
        return value if first else None

    return split


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map(value, change) for value in tree]
    return change(tree)

"""What a model costs before it is trained: parameters, operations, memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visionattn.macs import cost


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of a forward pass on one image: what papers call FLOPs.

    Args:
        model: on any device, in any mode, which it keeps.
        input_size: channels, height, width.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    return cost(twin, lambda: twin(torch.empty(1, *input_size, device="meta"))).macs


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a process holds in an update, without the libraries and the allocator's spare."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    average: int  # of the weights, where one is kept
    activations: int  # kept for the backward pass, of one image
    batch: int  # images in a forward pass

    @property
    def total(self) -> int:
        """All of it, with one batch's activations."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations * self.batch


def measure_memory(
    model: nn.Module, optimizer: Optimizer, *, input_size: tuple[int, int, int], num_classes: int,
    batch: int, average: bool, autocast: Any,
) -> TrainingMemory:  # fmt: skip
    """Measure one real update on two images, and reckon up from it.

    Activations are what autograd saves here, by the operators chosen for this device; what a checkpointed block
    keeps of its input is not seen. The update changes the model's weights.

    Args:
        model: unwrapped, on its device.
        optimizer: of the model; its state is made by the update.
        input_size: channels, height, width.
        num_classes: of the model.
        batch: images in a forward pass of the run.
        average: whether a copy of the weights is kept.
        autocast: context manager of the mixed precision.
    """
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(2, *input_size, device=device)
    targets = torch.full((2, num_classes), 1 / num_classes, device=device)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast:
            logits = model(images)
        first = logits[0] if isinstance(logits, tuple) else logits
        value = torch.sum(-targets * first.float().log_softmax(-1)) / 2
    value.backward()
    gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    weights = _bytes((*model.parameters(), *model.buffers()))
    state = _bytes(v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    return TrainingMemory(
        weights=weights, gradients=gradients, optimizer=state, average=weights if average else 0,
        activations=sum(saved.values()) // 2, batch=batch,
    )  # fmt: skip


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

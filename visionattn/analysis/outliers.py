"""Outliers of activations: what makes transformers hard to quantise to 8 bits.

The two measures of Bondarenko et al., "Quantizable Transformers", NeurIPS 2023, arXiv:2306.12929, as their released
code defines them: https://github.com/Qualcomm-AI-research/outlier-free-transformers @ 1e59744.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Outputs of blocks, of norms, of the projection behind attention and of the MLP.
ACTIVATIONS = r"(^|\.)((stages|blocks)\.\d+|norm\d*|attn\.proj|mlp\.fc2)$"


@dataclass(frozen=True)
class Outliers:
    """Measures of one activation, averaged over the images.

    Attributes:
        name: Of the module that returns it.
        infinity_norm: Largest absolute value.
        kurtosis: Fourth standardised moment; 3 for a normal distribution.
    """

    name: str
    infinity_norm: float
    kurtosis: float


@dataclass(frozen=True)
class Summary:
    """Measures of a model.

    Attributes:
        images: How many were run.
        max_infinity_norm: Largest infinity norm of any activation.
        mean_kurtosis: Average of the activations' kurtosis.
        max_kurtosis: Largest of them.
        activations: Each of them.
    """

    images: int
    max_infinity_norm: float
    mean_kurtosis: float
    max_kurtosis: float
    activations: tuple[Outliers, ...]


def infinity_norm(x: Tensor) -> Tensor:
    """Return the largest absolute value of each item of a batch: ``(B, ...)`` to ``(B,)``."""
    return x.flatten(1).abs().amax(dim=1)


def kurtosis(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the kurtosis of all values of each item of a batch: ``(B, ...)`` to ``(B,)``, in the dtype of ``x``.

    It is the mean of the fourth power of what is left of the mean, over ``s ** 4 + eps``, where ``s`` is the standard
    deviation with Bessel's correction.
    """
    x = x.flatten(1)
    centred = x - x.mean(dim=1, keepdim=True)
    return (centred**4).mean(dim=1) / (x.std(dim=1) ** 4 + eps)


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Tensor], activations: str = ACTIVATIONS) -> Summary:
    """Run a model on images and measure the outliers of its activations.

    Args:
        model: In the mode and on the device that it is to be measured in.
        batches: Images ``(B, C, H, W)`` each, on that device.
        activations: Regular expression that is searched for in the names of modules; the output of each that has it
            is measured, in float64.

    Raises:
        ValueError: no module has such a name, or there are no images.
    """
    chosen = [(name, module) for name, module in model.named_modules() if re.search(activations, name)]
    if not chosen:
        raise ValueError(f"no module of {type(model).__name__} has a name with {activations!r} in it")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in chosen}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            x = output.double()
            found[name].extend(zip(infinity_norm(x).tolist(), kurtosis(x).tolist(), strict=True))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in chosen]
    images = 0
    try:
        for batch in batches:
            model(batch)
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise ValueError("there are no images to run the model on")
    rows = [Outliers(name, *_means(values)) for name, values in found.items() if values]
    kurtoses = [row.kurtosis for row in rows]
    return Summary(
        images=images,
        max_infinity_norm=max(row.infinity_norm for row in rows),
        mean_kurtosis=statistics.mean(kurtoses),
        max_kurtosis=max(kurtoses),
        activations=tuple(rows),
    )


def _means(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    norms, kurtoses = zip(*values, strict=True)
    return statistics.mean(norms), statistics.mean(kurtoses)

"""Measured crossovers: up to where the first of two ways of computing is the faster one, by device.

Data, each number with its source. A device that has no number takes the second way: on GPUs nothing has been measured
yet, so ``auto`` takes the first of an operator's ``IMPLS`` that accepts the input, which moves the fewest bytes.
"""

from typing import NamedTuple

import torch


class Crossover(NamedTuple):
    """The first way wins up to this value, the value itself included."""

    upto: float
    source: str


_TWO_CORES = "two cores of an Intel Xeon, torch 2.11, 2026-11-22, by tools/benchmark.py ops"

# What is counted, and the two ways; the device is "cpu" or a GPU's "sm_90".
CROSSOVERS: dict[tuple[str, str], Crossover] = {
    ("SHViT's attention: tokens; two products, fused attention of transposed tokens", "cpu"): Crossover(
        2500, "two cores of an Intel Xeon, torch 2.11, 2026-11-25: products won on every map up to 50 x 50"
    ),
    ("window_attention: tokens of a window; two products, fused attention", "cpu"): Crossover(64, _TWO_CORES),
    ("routed_attention: regions for each routed one; mask, gather", "cpu"): Crossover(4, _TWO_CORES),
}


def first_wins(name: str, value: float, device: torch.device) -> bool:
    """Whether the first of two ways is the faster one at ``value``, as far as was measured on such a device.

    Args:
        name: What is counted and which two ways there are, as in `CROSSOVERS`.
        value: The count.
        device: Where the tensors are.
    """
    row = CROSSOVERS.get((name, _kind(device)))
    return row is not None and value <= row.upto


@torch.compiler.assume_constant_result  # compilers need not look into it
def _kind(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

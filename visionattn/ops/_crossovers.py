"""Measured crossovers: which way of computing is the faster one, by device, dtype and size.

Data, each number with its source. Here are the two ways that one implementation has; `_ranks` says the order of whole
implementations. Where nothing was measured, as on GPUs until now, the second way is taken, and the first of an
operator's ``IMPLS`` that accepts the input, which moves the fewest bytes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops._autocast import autocast_dtype
from visionattn.ops._ranks import RANKS


class Crossover(NamedTuple):
    """The first way wins up to this value, the value itself included."""

    upto: float
    source: str


_TWO_CORES = "two cores of an Intel Xeon, torch 2.11, 2026-11-22, by tools/benchmark.py ops"

# What is counted, and the two ways; the device, "cpu" or a GPU's "sm_90"; a key of DTYPES, or None for any other.
CROSSOVERS: dict[tuple[str, str, str | None], Crossover] = {
    ("SHViT's attention: tokens; two products, fused attention of transposed tokens", "cpu", None): Crossover(
        2500, "two cores of an Intel Xeon, torch 2.11, 2026-11-25: products won on every map up to 50 x 50"
    ),
    ("window_attention: tokens of a window; two products, fused attention", "cpu", None): Crossover(64, _TWO_CORES),
    ("window_attention: elements of the queries, shifted; all windows masked, zones", "cpu", None): Crossover(
        4e5, "two cores of an AMD EPYC, torch 2.11, 2026-11-29: masked won at 3e5, zones at 6e5"
    ),
    ("clipped_softmax_attention: scores; whole, tiles", "cpu", None): Crossover(
        1.5e6, "two cores of an AMD EPYC, torch 2.11, 2026-11-30: whole won at 9.3e5, tiles without backward at 1.9e6"
    ),
    ("clipped_softmax_attention: scores, with gradients; whole and kept, tiles computed again", "cpu", None): Crossover(
        7e6, "two cores of an AMD EPYC, torch 2.11, 2026-11-30: whole won at 6.3e6"
    ),
    ("infinite_attention: scores; whole, tiles", "cpu", None): Crossover(
        1.5e6, "two cores of an AMD EPYC, torch 2.11, 2026-11-30: whole won at 1.2e6, with backward neither"
    ),
    ("routed_attention: regions for each routed one; mask, gather", "cpu", None): Crossover(4, _TWO_CORES),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def first_wins(name: str, value: float, x: Tensor) -> bool:
    """Whether the first of two ways is the faster one at ``value``, as far as was measured on such tensors.

    Args:
        name: What is counted and which two ways there are, as in `CROSSOVERS`.
        value: The count.
        x: A tensor that takes part.
    """
    device = kind(x.device)
    row = CROSSOVERS.get((name, device, _dtype(x)), CROSSOVERS.get((name, device, None)))
    return row is not None and value <= row.upto


def ranked(op: str, known: Iterable[str], q: Tensor) -> list[str]:
    """Return the names of an operator's implementations in the order in which they should be tried.

    Those that were measured at this size are sorted among the places that they hold; the others keep theirs.

    Args:
        op: The operator's name.
        known: Names, in the order for an input that nothing is known of.
        q: The queries.
    """
    order = list(known)
    for row in RANKS.get((op, kind(q.device), _dtype(q) or ""), ()):
        if row.upto is None or q.numel() <= row.upto:
            places = [i for i, name in enumerate(order) if name in row.order]
            for i, name in zip(places, [name for name in row.order if name in order], strict=True):
                order[i] = name
            break
    return order


def _dtype(x: Tensor) -> str | None:
    """The dtype that is computed in."""
    return _NAMES.get((autocast_dtype(x) if x.dtype == torch.float32 else None) or x.dtype)


@torch.compiler.assume_constant_result  # compilers need not look into it
def kind(device: torch.device) -> str:
    """Return what crossovers call a device: its type, or the architecture of a GPU, ``"sm_90"`` or ``"gfx942"``."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

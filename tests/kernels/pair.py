"""What each of two gloo processes does: `python pair.py RANK FOLDER`.

Both take half of a batch through small models on Triton's kernels, in the interpreter; the first one writes the
gradients that `DistributedDataParallel` leaves.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import visionattn
from tests.models.variants import tiny
from visionattn.testing import randn

FAMILIES: dict[str, dict[str, Any]] = {
    "clipped_vit": {"depth": 1},  # two operators in one
    "dinat": {"dims": (8, 16), "depths": (1, 1), "dilations": ((1,), (1,))},  # tables get their gradients from kernels
}


def model(family: str) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return tiny(family, drop_path_rate=0.0, **FAMILIES[family]).train()


def images() -> Tensor:
    """The whole batch."""
    return randn(4, 3, 16, 16)


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean of the squared logits."""
    net.zero_grad()
    with visionattn.use_impl("triton"):
        net(x).square().mean().backward()
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    half = images()[2 * rank : 2 * rank + 2]
    found = {family: gradients(DistributedDataParallel(model(family)), half) for family in FAMILIES}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""How kernels are started: at a fixed configuration, at one chosen by timing, or compiled without being run.

The first configuration of a kernel is its default, so results do not depend on timings. `set_autotune` has each kernel
timed at its few configurations, once for each kind of input; the choice is kept beside Triton's compiled kernels.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRET = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel's blocks, by the names of its constants, its warps and its pipeline stages."""

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled for some arguments and not run; ``kernel`` is Triton's."""

    name: str
    config: Config
    kernel: Any


_autotune = False
_chosen: dict[str, int] | None = None  # number of a kernel's fastest configuration, by what it was timed on
_compiled: list[Compiled] | None = None


def set_autotune(on: bool) -> None:
    """Time kernels at each of their configurations and keep the fastest, from now on in this process.

    Configurations add in different orders, so results may differ in their last digits from one machine to another.
    """
    global _autotune
    _autotune = on


@contextmanager
def compile_only() -> Iterator[list[Compiled]]:
    """Compile what is launched inside for Triton's current target without running it; yields what was compiled."""
    global _compiled
    _compiled = []
    try:
        yield _compiled
    finally:
        _compiled = None


def launch(
    kernel: Any, programs: Callable[[dict[str, int]], int], *args: Any, configs: Sequence[Config], **constants: Any
) -> None:
    """Start a kernel.

    Args:
        kernel: A ``@triton.jit`` function that reads nothing of what it writes, so that it can be run again.
        programs: Size of the grid for a configuration's blocks. Grids have one axis, which kernels take apart
            themselves: the others end at 65535.
        *args: Tensors and numbers, in the kernel's order; the first is a tensor.
        configs: The default configuration, then alternatives to time.
        **constants: Compile-time constants besides the configuration's blocks.
    """
    config = configs[0]
    if programs(config.blocks) == 0:
        return
    if _compiled is not None:
        options = {"num_warps": config.warps, "num_stages": config.stages}
        compiled = kernel.run(*args, grid=(1,), warmup=True, **constants, **config.blocks, **options)
        _compiled.append(Compiled(kernel.fn.__name__, config, compiled))
        return

    def start(config: Config) -> None:
        # The interpreter has no warps.
        options = {} if INTERPRET else {"num_warps": config.warps, "num_stages": config.stages}
        kernel[(programs(config.blocks),)](*args, **constants, **config.blocks, **options)

    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if _autotune and len(configs) > 1 and _can_time(device):
            size = programs(config.blocks).bit_length()
            config = configs[_fastest(_key(kernel, args, constants, configs, size), configs, start)]
        start(config)


def _can_time(device: torch.device) -> bool:
    """Whether kernels can be timed: not in the interpreter, nor while they are recorded for a CUDA graph."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _key(kernel: Any, args: Sequence[Any], constants: dict[str, Any], configs: Sequence[Config], size: int) -> str:
    """What a choice holds for: the kernel, the kind of its arguments, the power of two of its programs, the GPU."""
    dtypes = [str(x.dtype) for x in args if isinstance(x, Tensor)]
    device = args[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return json.dumps(
        [kernel.fn.__module__, kernel.fn.__name__, name, triton.__version__, dtypes, constants, size, str(configs)]
    )


def _fastest(key: str, configs: Sequence[Config], start: Callable[[Config], None]) -> int:
    """Return the number of the fastest configuration, from the cache or by timing."""
    global _chosen
    path = Path(triton.knobs.cache.dir) / "visionattn_autotune.json"
    if _chosen is None:
        _chosen = _stored(path)
    if key not in _chosen:
        times = [_milliseconds(start, config) for config in configs]
        _chosen = {**_stored(path), **_chosen, key: min(range(len(configs)), key=times.__getitem__)}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}")  # other processes read and write the file as well
        whole.write_text(json.dumps(_chosen))
        whole.replace(path)
    return _chosen[key]


def _stored(path: Path) -> dict[str, int]:
    return json.loads(path.read_text()) if path.exists() else {}


def _milliseconds(start: Callable[[Config], None], config: Config) -> float:
    """Time a kernel on a GPU; endless if the GPU has not the shared memory or registers for it."""
    try:
        return float(triton.testing.do_bench(lambda: start(config), warmup=10, rep=50, return_mode="median"))
    except triton.OutOfResources:
        return math.inf

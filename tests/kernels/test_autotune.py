"""Choosing configurations by timing, with a clock that says what the test wants: there need not be a GPU."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import triton
from torch import Tensor

import visionattn
from tests.kernels import test_clipped_softmax_attention as clipped
from tests.kernels import test_infinite_attention as infinite
from tests.kernels import test_linear_attention as linear
from tests.kernels import test_routed_attention as routed
from tests.kernels import test_window_attention as window
from tests.kernels.checks import DEVICE, DTYPES, check_budget
from visionattn.kernels import _launch
from visionattn.kernels._launch import Config
from visionattn.ops import OPERATORS, topk_regions
from visionattn.testing import randn

MODULES = [
    importlib.import_module(f"visionattn.kernels.{name}") for name in (*OPERATORS, "_agent_bias", "_agent_backward")
]


class Clock:
    """Times configurations: the last one of a kernel is the fastest."""

    def __init__(self) -> None:
        self.timed: list[Config] = []
        self.slow: set[str] = set()  # configurations that take for ever

    def __call__(self, start: Callable[[Config], None], config: Config) -> float:
        start(config)
        self.timed.append(config)
        return math.inf if str(config) in self.slow else -len(self.timed)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock, no choices yet, and a cache of its own; autotuning is off again afterwards."""
    clock = Clock()
    monkeypatch.setattr(_launch, "_milliseconds", clock)
    monkeypatch.setattr(_launch, "_can_time", lambda device: True)
    monkeypatch.setattr(_launch, "_chosen", None)
    monkeypatch.setattr(_launch, "_autotune", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return clock


def attend() -> list[Tensor]:
    """Output and gradients of an operator whose three kernels have two configurations each."""
    tensors = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in clipped.data(1, 20, 20, 16, 16)]
    out = clipped.attend("triton", (-0.01, 1.0))(*tensors)
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


def stored() -> dict[str, int]:
    return json.loads((Path(triton.knobs.cache.dir) / "visionattn_autotune.json").read_text())


def test_nothing_is_timed_unless_asked_for(clock: Clock) -> None:
    first = attend()
    assert all(torch.equal(a, b) for a, b in zip(first, attend(), strict=True))
    assert clock.timed == []
    assert not Path(triton.knobs.cache.dir).exists()
    visionattn.set_autotune(True)
    attend()
    assert len(clock.timed) == 6
    visionattn.set_autotune(False)
    assert all(torch.equal(a, b) for a, b in zip(first, attend(), strict=True))
    assert len(clock.timed) == 6


def test_a_choice_is_made_once_and_kept_for_later_processes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    visionattn.set_autotune(True)
    first = attend()
    assert list(stored().values()) == [1, 1, 1]
    timed = len(clock.timed)
    again = attend()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(clock.timed) == timed
    monkeypatch.setattr(_launch, "_chosen", None)  # as in a new process
    attend()
    assert len(clock.timed) == timed
    other = {**stored(), "of another process": 0}
    (Path(triton.knobs.cache.dir) / "visionattn_autotune.json").write_text(json.dumps(other))
    clock.slow = {str(config) for config in clock.timed[1::2]}
    q, k, v = (x.to(DEVICE, torch.bfloat16) for x in clipped.data(4, 65, 20, 16, 16))
    clipped.attend("triton", (-0.01, 1.0))(q, k, v)  # more programs: another kind of input
    assert len(clock.timed) == timed + 2
    assert list(stored().values()) == [1, 1, 1, 0, 0]
    assert [x.name for x in Path(triton.knobs.cache.dir).iterdir()] == ["visionattn_autotune.json"]


def test_the_chosen_configuration_is_the_one_that_runs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        """Notes what it is started with, and on how many programs."""

        fn = clipped.launches
        runs: ClassVar[list[tuple[int, dict[str, int]]]] = []

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **constants: self.runs.append((grid[0], constants))

    def launch(size: int, dtype: torch.dtype = torch.float32) -> tuple[int, dict[str, int]]:
        x = torch.empty(size, dtype=dtype, device=DEVICE)
        _launch.launch(Kernel(), lambda b: size // b["BLOCK"], x, configs=configs, FLAG=True)
        return Kernel.runs[-1]

    monkeypatch.setattr(_launch, "INTERPRET", True)  # no warps
    configs = [Config({"BLOCK": 2}), Config({"BLOCK": 4})]
    assert launch(64) == (32, {"FLAG": True, "BLOCK": 2})
    visionattn.set_autotune(True)
    assert launch(64) == (16, {"FLAG": True, "BLOCK": 4})
    count = len(clock.timed)
    launch(66), launch(126)  # as many programs, to the power of two
    assert len(clock.timed) == count
    launch(128), launch(64, torch.bfloat16)
    assert len(clock.timed) == count + 4
    assert launch(0) == Kernel.runs[-1]
    monkeypatch.setattr(_launch, "_can_time", lambda device: False)  # a CUDA graph is recorded
    assert launch(1024) == (512, {"FLAG": True, "BLOCK": 2})


@pytest.mark.parametrize("operator", OPERATORS)
def test_candidates_are_few_and_can_be_told_apart(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, Any]] = []

    def note(kernel: Any, programs: Any, *args: Any, configs: list[Config], **constants: Any) -> None:
        launched.append({"configs": configs, "key": _launch._key(kernel, args, constants, configs, 1)})

    for module in MODULES:
        monkeypatch.setattr(module, "launch", note, raising=False)
    for dtype in DTYPES:
        for _, start in importlib.import_module(f"tests.kernels.test_{operator}").launches(dtype):
            start()
    assert launched
    for each in launched:
        assert 1 <= len(each["configs"]) <= 2
        assert len(set(map(str, each["configs"]))) == len(each["configs"])
        assert json.loads(each["key"])


def test_every_alternative_is_right(clock: Clock) -> None:
    visionattn.set_autotune(True)
    q, k, _ = (randn(1, 1, 9, 16, 16, seed=i) for i in range(3))
    index = topk_regions(q, k, grid=(1, 2), topk=1)
    cases = {
        "clipped_softmax_attention": (lambda i: clipped.attend(i, (-0.01, 1.0)), clipped.data(1, 131, 20, 16, 16)),
        "infinite_attention": (lambda i: infinite.attend(i, "pure"), infinite.data(1, 131, 20, 16, 16)[:3]),
        "linear_attention": (lambda i: linear.attend(i, "sum"), linear.data(70, 70, 16, 16, "sum")),
        "routed_attention": (lambda i: routed.attend(i, (1, 2)), [q, k, k, index]),
        "window_attention": (lambda i: window.attend(i, (2, 3)), window.inputs((1, 1, 4, 6, 16), (2, 3))),
    }
    for operator, (run, tensors) in cases.items():
        count = len(clock.timed)
        check_budget(run("triton"), run("reference"), tensors, torch.bfloat16)
        assert len(clock.timed) > count, operator
        names = [json.loads(key)[0].rpartition(".")[2] for key, number in stored().items() if number == 1]
        assert operator in names

"""Side-by-side measurements in one process: time as a ratio with its spread, peak memory, and where it was measured."""

import copy
import gc
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from visionattn import __version__, fuse, list_models
from visionattn.ops import OPERATORS, use_impl
from visionattn.ops._crossovers import DTYPES, kind
from visionattn.testing import randn

Run = Callable[..., Tensor]
DIRECTIONS = ("forward", "forward+backward")
KEYS = ("subject", "shape", "contestant", "direction", "dtype")


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Attributes:
        operator: Its name.
        shape: What a reader recognises, such as ``"BiFormer-S stage 3 at 224"``.
        inputs: Makes the tensors on the CPU in float32; floating ones are cast, moved, and get gradients.
        run: The operator as the library runs it, a function of the tensors.
        published: The authors' formulation, a function of the same tensors with the same result.
        others: What else a user would pick, by name.
        unbatched: Positions of the inputs that have no batch axis.
        gpu_others: As ``others``, on a GPU alone.
    """

    operator: str
    shape: str
    inputs: Callable[[], Sequence[Tensor]]
    run: Run
    published: Run
    others: Mapping[str, Run] = field(default_factory=dict)
    unbatched: Sequence[int] = ()
    gpu_others: Mapping[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant: times in ms, memory in MB, speed-ups against the baseline of its race."""

    subject: str  # an operator or a model
    shape: str
    contestant: str
    direction: str  # "forward" or "forward+backward"
    dtype: str
    ms: float
    speedup: float  # median over rounds of (baseline's time / own time)
    speedup_low: float  # quartiles
    speedup_high: float
    peak_mb: float  # most memory held at once beyond what was held before the call
    gb_per_s: float | None = None  # of operators: the fewest bytes that must move, over the time
    tflop_per_s: float | None = None  # of operators: the definition's matrix products, over the time
    elements: int | None = None  # of operators: elements of the first input, the queries


def machine(device: str) -> dict[str, Any]:
    """Describe where and with what something is measured; a GPU by its architecture as well."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        **({"kind": kind(torch.device(device, torch.cuda.current_device()))} if device == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "visionattn": __version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def operator_cases(names: Sequence[str] = (), device: str = "cpu") -> list[Case]:
    """Return the cases of the named operators (all if none), in the order of `visionattn.ops.OPERATORS`.

    What their contestants hold besides the inputs, such as masks, is made on ``device``.

    Raises:
        ValueError: there is no such operator.
    """
    unknown = set(names) - set(OPERATORS)
    if unknown:
        raise ValueError(f"no operator named {', '.join(sorted(unknown))}; there are: {', '.join(OPERATORS)}")
    modules = [
        importlib.import_module(f"visionattn.analysis.operators.{name}")
        for name in OPERATORS
        if not names or name in names
    ]
    with torch.device(device):
        return [case for module in modules for case in module.cases()]


def measure(
    case: Case, *, device: str = "cpu", dtype: str = "fp32", rounds: int = 7, at_least: float = 0.0
) -> list[Row]:
    """Race an operator against its authors' formulation, after checking that all contestants agree.

    Args:
        case: What to measure.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `DTYPES`.
        rounds: Times that each contestant is measured, in turn.
        at_least: Seconds that each race lasts, by more rounds if need be.

    Raises:
        AssertionError: a contestant does not compute what the authors' formulation computes; nothing is timed then.
    """
    contestants = {"published": case.published, "visionattn": case.run, **case.others}
    tensors = [x.to(device, DTYPES[dtype]) if x.is_floating_point() else x.to(device) for x in case.inputs()]
    exact = case.published(*[x.double() if x.is_floating_point() else x for x in tensors])
    for name, run in contestants.items():
        check_close(f"{case.operator}, {case.shape}: {name}", run(*tensors), exact, 1e-4 if dtype == "fp32" else 0.05)
    return [
        row
        for direction in DIRECTIONS
        for row in race(
            {name: _call(run, tensors, direction) for name, run in contestants.items()},
            {
                "subject": case.operator,
                "shape": case.shape,
                "direction": direction,
                "dtype": dtype,
                "elements": tensors[0].numel(),
            },
            device,
            rounds,
            at_least,
        )
    ]


def measure_model(
    name: str,
    *,
    size: int,
    batch: int,
    device: str = "cpu",
    dtype: str = "fp32",
    rounds: int = 5,
    compiled: bool = False,
    train: bool = False,
) -> list[Row]:
    """Race a whole model: against itself on the reference operators, or timm's own class against it fused.

    Args:
        name: A registered name: one of this library, or one of timm that `visionattn.fuse` knows.
        size: Side of the images.
        batch: Images in a batch.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `DTYPES`.
        rounds: Times that each contestant is measured, in turn.
        compiled: Race both through ``torch.compile`` as well, against each other.
        train: Race the forward and backward pass too.

    Raises:
        AssertionError: the contestants' outputs differ; nothing is timed then.
    """
    ours = name in list_models()
    if ours:
        model = timm.create_model(name).eval().to(device, DTYPES[dtype])
        contestants: dict[str, nn.Module] = {"reference operators": OnReference(model), "visionattn": model}
    else:
        sized: dict[str, Any] = {"img_size": size} if name.startswith("convit") else {}
        model = timm.create_model(name, **sized).eval()
        if hasattr(model, "set_input_size"):
            model.set_input_size((size, size))
        model = model.to(device, DTYPES[dtype])
        contestants = {"timm": model, "visionattn": fuse(copy.deepcopy(model))}
    races = [contestants]
    if compiled:
        torch.compiler.reset()  # else what was compiled at one size is compiled again for any, and more slowly
        races.append({f"{key}, compiled": _compiled(run) for key, run in contestants.items()})
    x = randn(batch, 3, size, size).to(device, DTYPES[dtype])
    label = f"{size}x{size}, batch {batch}"
    with torch.no_grad():
        expected = next(iter(contestants.values()))(x)
        for contestant, run in ((key, run) for group in races for key, run in group.items()):
            check_close(f"{name}, {label}: {contestant}", run(x), expected, 1e-3 if dtype == "fp32" else 0.1)
    rows = []
    for direction in DIRECTIONS if train else DIRECTIONS[:1]:
        what = {"subject": name, "shape": label, "direction": direction, "dtype": dtype}
        for group in races:
            calls = {key: _model_call(run, x, direction) for key, run in group.items()}
            rows += race(calls, what, device, rounds)
    return rows


def _compiled(model: nn.Module) -> nn.Module:
    own: Any = torch.compile(copy.deepcopy(model), dynamic=False)
    return own


class OnReference(nn.Module):
    """A model run on the reference implementation of every operator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        with use_impl("reference"):
            return self.model(x)


def check_close(label: str, actual: Tensor, expected: Tensor, budget: float) -> None:
    """Raise AssertionError if ``actual`` is off by more than ``budget`` of the largest value of ``expected``."""
    off = ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
    if not off <= budget:
        raise AssertionError(f"{label} is off by {off:.1e} of the largest value, allowed are {budget:.0e}")


def race(
    calls: Mapping[str, Callable[[], object]], what: dict[str, Any], device: str, rounds: int, at_least: float = 0.0
) -> list[Row]:
    """Time calls in turn, round by round; the first one is the baseline.

    Args:
        calls: Contestants by name.
        what: The fields of `Row` that all rows share.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: Times that each contestant is measured.
        at_least: Seconds that the race lasts, by more rounds if need be.
    """
    if device == "cpu":
        _settle_allocator()
    baseline = next(iter(calls))
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        seconds(call, device)  # warms up
    begun, order = time.perf_counter(), list(calls)
    while len(times[baseline]) < rounds or time.perf_counter() - begun < at_least:
        for name in order:
            times[name].append(seconds(calls[name], device))
        order.reverse()
    rows = []
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(times[baseline], own, strict=True))
        rows.append(
            Row(
                contestant=name,
                ms=round(statistics.median(own) * 1e3, 4),
                speedup=round(statistics.median(ratios), 2),
                speedup_low=round(ratios[len(ratios) // 4], 2),
                speedup_high=round(ratios[-1 - len(ratios) // 4], 2),
                peak_mb=round(peaks[name] / 2**20, 2),
                **what,
            )
        )
    return rows


def _settle_allocator() -> None:
    """Let freed memory stay with the process, as it does in any that has worked on tensors of 32 MB for a while.

    glibc gives blocks back to the system from a size on, which grows with what is freed, up to 32 MB. In a young
    process a call may fault its pages in anew, or not, by how its blocks happen to lie: a factor of two and more that
    says nothing of the operator. Without effect on other allocators.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed at once; a block has a header and is aligned


def _model_call(model: nn.Module, x: Tensor, direction: str) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return model(x)

    def both() -> object:
        return torch.autograd.grad(
            model(x).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )

    return forward if direction == "forward" else both


def _call(run: Run, tensors: Sequence[Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors]
    wanted = [x for x in leaves if x.requires_grad]
    with torch.no_grad():
        out = run(*leaves)
    # As a loss far behind would send them; those of a plain sum are one number in memory, which some products take ill.
    dout = randn(*out.shape).to(out)

    def both() -> object:
        return torch.autograd.grad(run(*leaves), wanted, dout)

    return both


def fits(run: Callable[..., object], *tensors: Tensor) -> bool:
    """Whether the device's memory suffices for one call, without gradients."""
    try:
        with torch.no_grad():
            run(*tensors)
    except torch.OutOfMemoryError:
        return False
    return True


def seconds(call: Callable[[], object], device: str, at_least: float = 0.02) -> float:
    """Return the time of one call: the mean over enough calls to fill ``at_least`` seconds.

    On a GPU it is the median of the device's own time, with a cold second-level cache.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=5, rep=int(at_least * 1e3), return_mode="median")) / 1e3
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        took = time.perf_counter() - start
        if took >= at_least:
            return took / count


def peak_bytes(call: Callable[[], object], device: str, *, warm_up: bool = True) -> int:
    """Return the most bytes of tensors held at once during one call, beyond those held before it.

    Args:
        call: What to run.
        device: ``"cpu"`` or ``"cuda"``.
        warm_up: Run it once before.
    """
    if warm_up:
        call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def read(path: Path, where: Mapping[str, Any], *, same: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what `write` wrote, or a file without rows if there is none.

    Args:
        path: The file.
        where: What `machine` said.
        same: The entries of ``where`` that rows of one file share; all of them if None.

    Raises:
        ValueError: the rows in the file were made on another machine, by other versions or on another day.
    """
    if not path.exists():
        return {"machine": where, "rows": []}
    old: dict[str, Any] = json.loads(path.read_text())
    if same is None and old["machine"] != dict(where):
        raise ValueError(f"{path} is from another machine, versions or day: {old['machine']}; this is {dict(where)}")
    theirs, ours = ({key: said.get(key) for key in same or ()} for said in (old["machine"], where))
    if theirs != ours:
        raise ValueError(f"{path} is by other versions: {theirs}; these are {ours}")
    return old


def as_dicts(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]


def write(
    path: Path,
    where: Mapping[str, Any],
    rows: Sequence[Any],
    *,
    append: bool = False,
    keys: Sequence[str] = KEYS,
    same: Sequence[str] | None = None,
    **more: Any,
) -> None:
    """Write rows and the machine as JSON.

    Args:
        path: The file; its folder is made if need be.
        where: What `machine` said.
        rows: What was measured: dataclasses of one kind, such as `Row`.
        append: Keep the rows that are in the file already, but for those measured again.
        keys: Fields that tell rows apart.
        same: As for `read`.
        **more: Further entries of the file.

    Raises:
        ValueError: the rows in the file were made on another machine, by other versions or on another day.
    """
    old: dict[str, Any] = read(path, where, same=same) if append else {"machine": where, "rows": []}
    new = {tuple(row[k] for k in keys): row for row in as_dicts(rows)}
    kept = [new.pop(tuple(row[k] for k in keys), row) for row in old["rows"]]  # what is measured again keeps its place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**old, **more, "machine": dict(where), "rows": kept + list(new.values())}, indent=1) + "\n"
    )

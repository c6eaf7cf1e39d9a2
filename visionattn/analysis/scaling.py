"""How a model's speed and memory grow with the image, and what a training step costs: one row a model and size."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn import fuse
from visionattn.analysis import cards, flops
from visionattn.analysis.bench import DTYPES, peak_bytes
from visionattn.testing import randn

FAMILIES = {  # a small variant of each
    "Agent": "agent_pvt_t",
    "BiFormer": "biformer_t",
    "ConViT": "convit_tiny",
    "DaViT": "davit_tiny",
    "gated ViT": "gated_vit_s16",
    "InfViT": "infvit_s6_linear",
    "InLine": "inline_pvt_t",
    "LITv2": "litv2_s",
    "MALA": "mala_t",
    "MaxViT": "maxvit_tiny_tf_224",
    "NAT": "nat_mini",
    "SHViT": "shvit_s1",
    "TransNeXt": "transnext_micro",
}
SIZES = (224, 320, 512, 768, 1024, 1536, 2048, 3072)
KEYS = ("model", "size", "batch", "direction", "dtype", "device")

Log = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """What was measured of one model at one size, or why nothing was."""

    family: str
    model: str
    size: int
    batch: int
    direction: str  # "forward" or "training step"
    dtype: str
    device: str
    images_per_s: float | None  # by the median time
    ms: float | None  # of one call: the median
    ms_low: float | None  # quartiles
    ms_high: float | None
    calls: int  # that were timed
    peak_mb: float | None  # most memory held at once beyond the weights and the images
    stopped: str = ""  # why this size and larger ones were not measured


def resolution(
    models: Mapping[str, str],
    sizes: Sequence[int] = SIZES,
    *,
    known: Sequence[Mapping[str, Any]] = (),
    device: str = "cpu",
    dtype: str = "fp32",
    budget_s: float = 60.0,
    memory_gb: float = 8.0,
    log: Log = print,
) -> Iterator[Point]:
    """Measure the forward pass of models on images of growing size, one image at a time.

    A model is stopped before a size that, judged by the two sizes before, would overrun a budget, or where the device's
    memory turns out to be too small; its last row says so.

    Args:
        models: Registered names by family; those that `visionattn.fuse` knows are fused.
        sizes: Sides of the images, in growing order.
        known: Rows that exist already and are not measured again.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `visionattn.analysis.bench.DTYPES`.
        budget_s: Seconds for each model.
        memory_gb: That a call may hold.
        log: Told what is about to be measured.
    """
    done = {tuple(row[k] for k in KEYS): row for row in known}
    for number, (family, name) in enumerate(models.items(), 1):
        start = time.perf_counter()
        model: nn.Module | None = None
        measured: list[tuple[int, float, float]] = []  # size, seconds, bytes
        for size in sizes:
            what = _what(family, name, size, 1, "forward", dtype, device)
            row = done.get(tuple(what[k] for k in KEYS))
            if row is not None:
                if row["stopped"]:
                    break
                measured.append((size, row["ms"] / 1e3, row["peak_mb"] * 2**20))
                continue
            used = time.perf_counter() - start
            why = _overrun(measured, size, budget_s - used, memory_gb * 2**30)
            if why:
                yield _stopped(what, why)
                break
            log(f"{number} of {len(models)}: {name} at {size}, {used:.0f} of {budget_s:.0f} s used")
            model = model or _build(name, device, dtype).eval()
            call = _forward(_sized(model, size), randn(1, 3, size, size).to(device, DTYPES[dtype]))
            try:
                point = _measure(call, what)
            except (torch.OutOfMemoryError, MemoryError) as e:
                yield _stopped(what, f"memory: {str(e).splitlines()[0]}")
                break
            measured.append((size, (point.ms or 0) / 1e3, (point.peak_mb or 0) * 2**20))
            yield point


def train(
    models: Mapping[str, str],
    *,
    size: int = 224,
    batch: int = 8,
    known: Sequence[Mapping[str, Any]] = (),
    device: str = "cpu",
    dtype: str = "fp32",
    log: Log = print,
) -> Iterator[Point]:
    """Measure training steps: forward pass, cross entropy, backward pass and AdamW.

    The peak is that of the first step, in which the optimiser makes its state: activations, gradients and state.

    Args:
        models: Registered names by family; those that `visionattn.fuse` knows are fused.
        size: Side of the images.
        batch: Images a step.
        known: Rows that exist already and are not measured again.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `visionattn.analysis.bench.DTYPES`.
        log: Told what is about to be measured.
    """
    done = {tuple(row[k] for k in KEYS) for row in known}
    for number, (family, name) in enumerate(models.items(), 1):
        what = _what(family, name, size, batch, "training step", dtype, device)
        if tuple(what[k] for k in KEYS) in done:
            continue
        log(f"{number} of {len(models)}: a training step of {name}")
        model = _sized(_build(name, device, dtype), size).train()
        x = randn(batch, 3, size, size).to(device, DTYPES[dtype])
        yield _measure(_training_step(model, x), what)


def accurate(root: Path, gmacs: float, **options: Any) -> Iterator[Point]:
    """Measure as `resolution` does, at its own size, each model whose accuracy without further data a card reports.

    Args:
        root: The repository.
        gmacs: Leave out what costs more, in 10^9 multiply-adds an image as counted.
        **options: Handed to `resolution`.
    """
    tables = cards.Tables(root)
    for card in cards.read(root):
        for variant in card.variants:
            if own_accuracy(variant) and tables.size(variant)["macs"] <= gmacs * 1e9:
                name = variant["model"]
                yield from resolution({card.front["family"]: name}, flops.native_size(name)[:1], **options)


def own_accuracy(variant: Mapping[str, Any]) -> bool:
    """Whether a card's entry has the accuracy of a registered name as it is: its size, its options, no further data."""
    return "top1" in variant and not variant.keys() & {"kwargs", "size", "weights"}


def _build(name: str, device: str, dtype: str) -> nn.Module:
    return fuse(timm.create_model(name)).to(device, DTYPES[dtype])


def _sized(model: nn.Module, size: int) -> nn.Module:
    """Tell a model of timm's the size of the images; this library's take any."""
    if hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
    return model


def _forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.inference_mode():
            return model(x)

    return forward


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.arange(len(x), device=x.device)

    def step() -> None:
        F.cross_entropy(model(x).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _what(*values: Any) -> dict[str, Any]:
    return dict(zip(("family", *KEYS), values, strict=True))


def _measure(call: Callable[[], object], what: dict[str, Any], fill_s: float = 1.0) -> Point:
    """Time calls, at least one and at most seven, until they fill ``fill_s`` seconds; one before finds the peak."""
    peak = peak_bytes(call, what["device"], warm_up=False)
    times: list[float] = []
    while not times or (sum(times) < fill_s and len(times) < 7):
        start = time.perf_counter()
        call()
        if what["device"] == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times.sort()
    middle = statistics.median(times)
    return Point(
        **what,
        images_per_s=round(what["batch"] / middle, 3),
        ms=round(middle * 1e3, 2),
        ms_low=round(times[len(times) // 4] * 1e3, 2),
        ms_high=round(times[-1 - len(times) // 4] * 1e3, 2),
        calls=len(times),
        peak_mb=round(peak / 2**20, 1),
    )


def _stopped(what: dict[str, Any], why: str) -> Point:
    return Point(**what, images_per_s=None, ms=None, ms_low=None, ms_high=None, calls=0, peak_mb=None, stopped=why)


def _overrun(measured: list[tuple[int, float, float]], size: int, seconds: float, memory: float) -> str:
    """Why not to try ``size``, or nothing: what time and memory would be if they went on growing as they did."""
    if len(measured) < 2:
        return ""
    (s0, t0, m0), (s1, t1, m1) = measured[-2:]

    def predicted(before: float, last: float) -> float:
        power = math.log(max(last, 1e-9) / max(before, 1e-9)) / math.log(s1 / s0)
        return last * (size / s1) ** min(max(power, 2.0), 4.0)  # of the side: linear to quadratic in tokens

    if 2 * predicted(t0, t1) > seconds:
        return f"time: about {predicted(t0, t1):.0f} s a call were expected"
    if predicted(m0, m1) > memory:
        return f"memory: about {predicted(m0, m1) / 2**30:.0f} GB were expected"
    return ""

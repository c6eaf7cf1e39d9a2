"""Recorded behaviour of the authors' implementations, and how a model is held to it.

A case is a JSON manifest and an NPZ beside it. Weights are not stored: `fill_value` draws every parameter from a
generator that its official key seeds, so the same weights can be made anywhere.
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import visionattn  # noqa: F401 - registers the models
from visionattn.models import _timm
from visionattn.models._checkpoint import OfficialWeights

ROOT = Path(__file__).parent / "goldens"
NAMES: dict[str, Any] = json.loads((ROOT / "names.json").read_text())
TOLERANCE = 1e-4  # of the largest recorded value, for logits and features
GRAD_TOLERANCE = 1e-3


def fill_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 value of the parameter or running statistic ``key`` ("fill-v1")."""
    z = np.random.Generator(np.random.Philox(zlib.crc32(key.encode()))).standard_normal(shape)
    leaf = key.rpartition(".")[2]
    if leaf == "running_var":
        z = np.abs(z) + 0.5
    elif leaf == "running_mean":
        z = 0.1 * z
    elif len(shape) > 1:
        z = z / math.sqrt(max(1, math.prod(shape[1:])))
    elif leaf == "bias":
        z = 0.1 * z
    else:
        z = 1.0 + 0.1 * z
    return np.asarray(z, dtype=np.float32)


def golden_input(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the standard normal images of a case."""
    rng = np.random.Generator(np.random.Philox(1_000_003 + seed))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def sample(x: Tensor, count: int = 256) -> Tensor:
    """Return the elements of ``x`` at which a case records it."""
    at = np.unique(np.linspace(0, x.numel() - 1, num=min(count, x.numel())).round().astype(np.int64))
    return x.flatten()[torch.from_numpy(at)]


@dataclass(frozen=True)
class Golden:
    """One recorded variant."""

    case: str  # "family/variant"
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """An official checkpoint: filled parameters, and zeros where the architecture computes the values."""
        state = {}
        for key, shape, dtype, filled in self.manifest["state_dict"]:
            value = fill_value(key, tuple(shape)) if filled else np.zeros(shape, dtype)
            rule = self.manifest.get("post_fill")
            if filled and rule and re.search(rule["key_regex"], key):
                value = value * np.float32(rule["multiply"])
            state[key] = torch.from_numpy(np.array(value))
        return state

    def recorded(self, name: str) -> Tensor:
        """Return a recorded array."""
        return torch.from_numpy(self.arrays[name])


def golden(case: str) -> Golden:
    """Read a case by its name, ``family/variant``."""
    with np.load(ROOT / f"{case}.npz") as arrays:
        return Golden(case, json.loads((ROOT / f"{case}.json").read_text()), dict(arrays))


def golden_model(case: Golden, path: Path, **kwargs: Any) -> nn.Module:
    """Create the registered model of a case from its official keys, through a file as a user would."""
    entry = NAMES[case.case]
    torch.save({"model": case.state_dict}, path / "official.pth")
    return timm.create_model(
        entry["model"],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path / "official.pth")},
        **entry.get("kwargs", {}),
        **kwargs,
    ).eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value (over one, if that is smaller)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def assert_golden(
    case: Golden, model: nn.Module, number: int, *, grads: bool = False, tolerance: float = TOLERANCE
) -> None:
    """Hold logits, stage features and (if recorded and asked for) gradient norms to a case's recording."""
    entry = NAMES[case.case]
    recording = case.manifest["cases"][number]
    compare = entry.get("compare", ["logits", "features"])
    x = golden_input(tuple(recording["input_shape"]), recording["seed"])
    with torch.no_grad():
        if "logits" in compare and f"case{number}.logits" in case.arrays:
            error = relative_error(model(x), case.recorded(f"case{number}.logits"))
            assert error <= tolerance, f"{case.case} case {number}: logits are off by {error:.2e}"
        maps = model.forward_intermediates(x, intermediates_only=True, norm=entry.get("norm", False))
    features = recording["features"]
    for j, (summary, y) in enumerate(zip(features, maps[-len(features) :], strict=True)):
        assert list(y.shape) == summary["shape"], f"feature {j}: {tuple(y.shape)}, recorded {summary['shape']}"
        error = relative_error(sample(y), case.recorded(f"case{number}.feature{j}"))
        assert error <= tolerance, f"{case.case} case {number}: feature {j} is off by {error:.2e}"
    if grads:
        assert_grad_norms(case, model, x, recording["grad_norms"])


def assert_grad_norms(case: Golden, model: nn.Module, x: Tensor, recorded: dict[str, float]) -> None:
    """Compare the gradient norm of every official parameter.

    Which of the model's elements come from which official key is found by converting a state dict whose tensors
    hold the number of their key.
    """
    keys = [row[0] for row in case.manifest["state_dict"]]
    numbered = {k: torch.full(tuple(v.shape), float(i)) for i, (k, v) in enumerate(case.state_dict.items())}
    timms_own = not isinstance(model, OfficialWeights)
    origin = _timm.from_official(model, numbered) if timms_own else model.from_official(numbered)
    model.zero_grad()
    model(x).square().mean().backward()
    squares = torch.zeros(len(keys), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.double().square().flatten()
        squares.index_add_(0, origin[name].flatten().long(), grad)
    norms = dict(zip(keys, squares.sqrt().tolist(), strict=True))
    floor = 1e-6 * max(recorded.values())  # a gradient that is zero in exact arithmetic is recorded as rounding noise
    off = {k: (norms[k], r) for k, r in recorded.items() if abs(norms[k] - r) > GRAD_TOLERANCE * r + floor}
    assert not off, f"{case.case}: gradient norms (ours, recorded) differ for {len(off)} of {len(recorded)}: {off}"
    assert len(recorded) > 0

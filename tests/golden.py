"""Recorded behaviour of the authors' implementations, and how a model is held to it.

A case is a JSON manifest and an NPZ beside it. Weights are not stored: `fill_value` draws every parameter from a
generator that its official key seeds, so the same weights can be made anywhere.
"""

import argparse
import json
import math
import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import visionattn
from visionattn.analysis.bench import machine
from visionattn.models import _timm
from visionattn.models._checkpoint import OfficialWeights

ROOT = Path(__file__).parent / "goldens"
NAMES: dict[str, Any] = json.loads((ROOT / "names.json").read_text())
TOLERANCE = 1e-4  # of the largest recorded value, for logits and features
GRAD_TOLERANCE = 1e-3
# Recorded in a memory layout whose gradients PyTorch gets wrong on the CPU; its own test compares in that layout.
GRADS_IN_ANOTHER_LAYOUT = ("litv2/litv2_s",)


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


def golden_errors(case: Golden, model: nn.Module, number: int) -> dict[str, float]:
    """Return how far a model's logits and stage features are off a case's recording, over the largest value."""
    entry = NAMES[case.case]
    recording = case.manifest["cases"][number]
    compare = entry.get("compare", ["logits", "features"])
    x = golden_input(tuple(recording["input_shape"]), recording["seed"])
    errors = {}
    with torch.no_grad():
        if "logits" in compare and f"case{number}.logits" in case.arrays:
            errors["logits"] = relative_error(model(x), case.recorded(f"case{number}.logits"))
        maps = model.forward_intermediates(x, intermediates_only=True, norm=entry.get("norm", False))
    features = recording["features"]
    for j, (summary, y) in enumerate(zip(features, maps[-len(features) :], strict=True)):
        assert list(y.shape) == summary["shape"], f"feature {j}: {tuple(y.shape)}, recorded {summary['shape']}"
        errors[f"feature {j}"] = relative_error(sample(y), case.recorded(f"case{number}.feature{j}"))
    return errors


def assert_golden(
    case: Golden, model: nn.Module, number: int, *, grads: bool = False, tolerance: float = TOLERANCE
) -> None:
    """Hold logits, stage features and (if recorded and asked for) gradient norms to a case's recording."""
    for what, error in golden_errors(case, model, number).items():
        assert error <= tolerance, f"{case.case} case {number}: {what} is off by {error:.2e}"
    if grads:
        recording = case.manifest["cases"][number]
        x = golden_input(tuple(recording["input_shape"]), recording["seed"])
        assert_grad_norms(case, model, x, recording["grad_norms"])


def grad_norms(case: Golden, model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the norm of the gradient of every official parameter.

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
    return dict(zip(keys, squares.sqrt().tolist(), strict=True))


def grad_floor(recorded: dict[str, float]) -> float:
    """Return the size under which a gradient is rounding noise: it is zero in exact arithmetic."""
    return 1e-6 * max(recorded.values())


def assert_grad_norms(case: Golden, model: nn.Module, x: Tensor, recorded: dict[str, float]) -> None:
    """Compare the gradient norm of every official parameter with the recorded one."""
    norms, floor = grad_norms(case, model, x), grad_floor(recorded)
    off = {k: (norms[k], r) for k, r in recorded.items() if abs(norms[k] - r) > GRAD_TOLERANCE * r + floor}
    assert not off, f"{case.case}: gradient norms (ours, recorded) differ for {len(off)} of {len(recorded)}: {off}"
    assert len(recorded) > 0


def measure(name: str, path: Path) -> dict[str, Any]:
    """Return the largest errors of a case over its inputs, for the model cards."""
    case = golden(name)
    torch.save({"model": case.state_dict}, path / "official.pth")
    model = timm.create_model(NAMES[name]["model"], **NAMES[name].get("kwargs", {})).eval()
    visionattn.load_checkpoint(visionattn.fuse(model), path / "official.pth")
    recordings = case.manifest["cases"]
    errors = [max(golden_errors(case, model, i).values()) for i in range(len(recordings))]
    grads = []
    for recording in recordings:
        if "grad_norms" in recording and name not in GRADS_IN_ANOTHER_LAYOUT:
            x = golden_input(tuple(recording["input_shape"]), recording["seed"])
            norms, floor = grad_norms(case, model, x), grad_floor(recording["grad_norms"])
            grads += [(abs(norms[k] - r) - floor) / r for k, r in recording["grad_norms"].items() if r]
    return {
        "case": name,
        "model": NAMES[name]["model"],
        "inputs": [r["input_shape"] for r in recordings],
        "outputs": max(errors),
        "grads": max(0.0, *grads) if grads else None,
    }


def main() -> None:
    """Measure all cases, and write the rows: ``python -m tests.golden --json benchmarks/parity.json``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            if (ROOT / f"{name}.json").exists():
                rows.append(measure(name, Path(folder)))
                print(rows[-1], flush=True)
    args.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

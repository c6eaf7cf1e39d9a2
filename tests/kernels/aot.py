"""Compile kernels for GPUs that are not here, and read what the compilers say of them.

``python -m tests.kernels.aot clipped_softmax_attention sm_80 sm_90`` compiles what the launchers of that operator start
at its default configuration, and prints one JSON object a kernel. It needs a process of its own, without
TRITON_INTERPRET.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from visionattn.kernels import _blocks
from visionattn.kernels._launch import Compiled, compile_only

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_TARGETS = ("sm_90",)  # elsewhere only the names of its instructions would differ from those of bf16


@dataclass(frozen=True)
class Report:
    """What the compilers said of one kernel: registers and spills of a thread, bytes of shared memory of a block."""

    operator: str
    kernel: str
    target: str
    dtype: str
    case: str
    warps: int
    registers: int
    spills: int
    shared: int


class Offline:
    """Stands in for the driver of a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, Any]:
        return self.target.backend, self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def reports(operator: str, targets: list[str]) -> Iterator[Report]:
    """Compile everything that ``tests.kernels.test_<operator>.launches`` starts."""
    if any(target.startswith("gfx") for target in targets):
        assert all(target.startswith("gfx") for target in targets), "AMD's targets need a process of their own"
        _blocks.FP32 = tl.constexpr("ieee")  # as it is where PyTorch is built for them
    module = importlib.import_module(f"tests.kernels.test_{operator}")
    for target in targets:
        triton.runtime.driver.set_active(Offline(TARGETS[target]))
        for name, dtype in DTYPES.items():
            if name == "fp16" and target not in FP16_TARGETS:
                continue
            told: list[Any] = []  # what is started twice is compiled once
            for case, start in module.launches(dtype):
                with compile_only() as compiled:
                    start()
                for kernel in compiled:
                    if any(kernel.kernel is other for other in told):
                        continue
                    told.append(kernel.kernel)
                    registers, spills = _usage(kernel, target)
                    shared = kernel.kernel.metadata.shared
                    yield Report(
                        operator, kernel.name, target, name, case, kernel.config.warps, registers, spills, shared
                    )


def _usage(compiled: Compiled, target: str) -> tuple[int, int]:
    """Registers of a thread and bytes (sm) or registers (gfx) spilled."""
    asm = compiled.kernel.asm
    if target.startswith("gfx"):
        text = asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    knobs = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        text = _output(knobs.cuobjdump.path, "-res-usage", str(binary)).stdout
        if not _number(r"\bSTACK:(\d+)", text):  # nowhere to spill to
            return _number(r"\bREG:(\d+)", text), 0
        ptxas = knobs.ptxas_blackwell if int(target.removeprefix("sm_")) >= 100 else knobs.ptxas
        arch = re.search(r"\.target\s+(\w+)", asm["ptx"])
        assert arch is not None
        source = Path(folder) / "kernel.ptx"
        source.write_text(asm["ptx"])
        text = _output(ptxas.path, "-v", f"--gpu-name={arch[1]}", str(source), "-o", str(binary)).stderr
    return _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes spill stores", text)


def _output(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"the compiler did not report {pattern}"
    return max(int(number) for number in found)


if __name__ == "__main__":
    for report in reports(sys.argv[1], sys.argv[2:]):
        print(json.dumps(asdict(report)), flush=True)

"""Every kernel is compiled for GPUs that need not be here: no register spilled, shared memory within the limit."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.aot import SHARED_LIMIT
from visionattn.ops import OPERATORS

BACKENDS = {"cuda": ("sm_80", "sm_90", "sm_100"), "hip": ("gfx942",)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_spills(operator: str, backend: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.aot", operator, *BACKENDS[backend]]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["target"] for r in reports} == set(BACKENDS[backend])
    spilling = [r for r in reports if r["spills"]]
    assert not spilling, spilling
    large = [r for r in reports if r["shared"] > SHARED_LIMIT[r["target"]]]
    assert not large, large

"""Two processes train on Triton's kernels as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import pair

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_data_parallel_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, pair.__file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, env=env)
        for rank in range(2)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    two = torch.load(tmp_path / "gradients.pt")
    for family in pair.FAMILIES:
        model = pair.model(family)
        one = pair.gradients(model, pair.images())
        assert set(one) == set(two[family]) == {name for name, _ in model.named_parameters()}
        for name, grad in one.items():
            largest = grad.abs().max().item()
            assert largest > 0, name
            torch.testing.assert_close(
                two[family][name], grad, rtol=0, atol=1e-5 * largest, msg=lambda s, n=name: n + s
            )

import importlib
import subprocess
import sys

import pytest
import torch

import visionattn
from visionattn import env, ops
from visionattn.ops import _crossovers, _ranks, routed_attention
from visionattn.testing import randn


def call(impl: str = "auto") -> torch.Tensor:
    q = randn(1, 1, 4, 4, 2)
    return routed_attention(q, q, q, torch.zeros(1, 4, 1, dtype=torch.int64), grid=(2, 2), impl=impl)


def test_named_implementation_runs() -> None:
    torch.testing.assert_close(call("reference"), call("eager"))


def test_unknown_implementation_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown impl='cuda'; known: auto, reference, eager"):
        call("cuda")
    with pytest.raises(ValueError, match="unknown impl='cuda'"):
        visionattn.set_impl("cuda")


def test_implementation_that_cannot_run_says_why() -> None:
    with pytest.raises(visionattn.UnsupportedError, match="there is no impl='natten'"):
        call("natten")


def test_measured_crossovers_decide_and_say_where_they_come_from(monkeypatch) -> None:
    x = torch.zeros(10)
    assert not _crossovers.first_wins("this, that", 1, x)  # nothing was measured
    monkeypatch.setitem(_crossovers.CROSSOVERS, ("this, that", "cpu", None), _crossovers.Crossover(10, "a test"))
    monkeypatch.setitem(_crossovers.CROSSOVERS, ("this, that", "cpu", "bf16"), _crossovers.Crossover(5, "a test"))
    assert _crossovers.first_wins("this, that", 10, x)
    assert not _crossovers.first_wins("this, that", 11, x)
    assert not _crossovers.first_wins("this, that", 6, x.bfloat16())
    assert _crossovers.first_wins("this, that", 6, x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert not _crossovers.first_wins("this, that", 6, x)
    assert not _crossovers.first_wins("this, that", 1, x.to("meta"))
    assert all(row.source for row in _crossovers.CROSSOVERS.values())
    assert {device for _, device, _ in _crossovers.RANKS} <= set(_ranks.SOURCES)


def test_the_choice_by_size_and_dtype_is_compiled_and_exported(monkeypatch) -> None:
    rows = (_ranks.Rank(32, ("reference", "eager")), _ranks.Rank(None, ("eager", "reference")))
    monkeypatch.setitem(_crossovers.RANKS, ("routed_attention", "cpu", "fp32"), rows)
    implementations = importlib.import_module("visionattn.ops.routed_attention").IMPLS
    monkeypatch.setattr(implementations["eager"], "forward", lambda q, *_: torch.ones_like(q))
    monkeypatch.setattr(implementations["reference"], "forward", lambda q, *_: torch.zeros_like(q))

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return routed_attention(q, q, q, index, grid=(2, 2))

    index = torch.zeros(2, 4, 1, dtype=torch.int64)
    small, large = randn(2, 1, 4, 4, 1), randn(2, 1, 4, 4, 2)
    for q, expected in ((small, 0), (large, 1), (small.double(), 1)):
        torch._dynamo.reset()
        for run in (Attend(), torch.compile(Attend(), fullgraph=True, backend="aot_eager")):
            assert bool((run(q, index) == expected).all())
    batch = torch.export.Dim("batch")
    torch.export.export(Attend(), (small, index), dynamic_shapes=({0: batch}, {0: batch}))  # no guard on the size


def test_default_is_used_and_restored() -> None:
    with visionattn.use_impl("natten"):
        assert visionattn.get_impl() == "natten"
        with pytest.raises(visionattn.UnsupportedError):
            call()
        call("eager")  # the argument wins
    assert visionattn.get_impl() == "auto"
    with pytest.raises(RuntimeError, match="stop"), visionattn.use_impl("reference"):
        raise RuntimeError("stop")
    assert visionattn.get_impl() == "auto"
    visionattn.set_impl("reference")
    assert visionattn.get_impl() == "reference"
    visionattn.set_impl("auto")


def test_report_names_every_operator_and_implementation() -> None:
    text = env.report()
    for name in ops.OPERATORS:
        assert name in text
    assert "runs here" in text
    assert f"visionattn {visionattn.__version__}" in text


@pytest.mark.slow
def test_import_needs_torch_and_timm_alone() -> None:
    """In a fresh process where optional packages cannot be imported."""
    code = """
import sys
for name in ("triton", "natten", "accelerate", "tensorboard", "sklearn", "matplotlib", "onnx", "mmengine", "mmcv"):
    sys.modules[name] = None
import time, timm, torch
start = time.perf_counter()
import visionattn
took = time.perf_counter() - start
assert timm.create_model("biformer_t", depths=(1, 1, 1, 1), num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
assert took < 5, took
print("fine", *[m for m in ("triton", "natten", "mmcv") if sys.modules.get(m)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stdout + done.stderr

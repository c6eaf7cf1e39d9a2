import subprocess
import sys

import pytest
import torch

import visionattn
from visionattn import env, ops
from visionattn.ops import _crossovers, _dispatch, routed_attention
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
    class Accepts:
        def why_not(self, *args: object) -> None:
            return None

    plain, kernel = Accepts(), Accepts()
    known = {"triton": kernel, "eager": plain}
    q = torch.zeros(10)
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    assert _dispatch.choose("some_op", "auto", known, q) is kernel  # nothing was measured
    row = _crossovers.Crossover(10, "a test")
    monkeypatch.setitem(_crossovers.CROSSOVERS, ("some_op: elements of the queries; plain, kernel", "cpu"), row)
    assert _dispatch.choose("some_op", "auto", known, q) is plain
    assert _dispatch.choose("some_op", "auto", known, torch.zeros(11)) is kernel
    assert _dispatch.choose("some_op", "triton", known, q) is kernel  # by name, whatever was measured
    assert all(row.source for row in _crossovers.CROSSOVERS.values())


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

import itertools

import pytest
import torch
from torch import Tensor

from visionattn.analysis import bench, kernels
from visionattn.ops import OPERATORS, clipped_softmax_attention
from visionattn.testing import randn


def case(run=None) -> bench.Case:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return clipped_softmax_attention(q, k, v, gamma=-0.01)

    def inputs() -> list[Tensor]:
        return [randn(1, 2, n, 8, seed=n) for n in (19, 20, 20)]

    return bench.Case("clipped_softmax_attention", "tiny", inputs, run or attend, attend)


def test_check_runs_every_implementation_and_says_so() -> None:
    lines = list(kernels.check(case(), device="cpu", dtypes=["fp32"]))
    assert lines == [f"clipped_softmax_attention, tiny, fp32, {impl}: right" for impl in ("triton", "eager")]


def test_check_sees_what_is_wrong_and_what_is_not_deterministic(monkeypatch) -> None:
    from visionattn.ops.clipped_softmax_attention import triton

    right = triton.forward
    monkeypatch.setattr(triton, "forward", lambda *args: right(*args) * 1.001)
    with pytest.raises(AssertionError, match=r"tiny, fp32, triton: output: .* over the budget"):
        list(kernels.check(case(), device="cpu", dtypes=["fp32"]))
    noise = itertools.cycle([1.0, 1.0 + 2.4e-7])
    monkeypatch.setattr(triton, "forward", lambda *args: right(*args) * next(noise))
    with pytest.raises(AssertionError, match="two runs on the same input differ"):
        list(kernels.check(case(), device="cpu", dtypes=["fp32"]))


def test_race_times_each_implementation_and_its_rates(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "compiled_reference", lambda run: kernels.on_impl(run, "reference"))  # a minute less
    rows = kernels.race(case(), device="cpu", dtype="fp32", rounds=1)
    assert [r.contestant for r in rows if r.direction == "forward"] == [
        "published", "visionattn", "triton", "eager", "reference, compiled",
    ]  # fmt: skip
    assert all(r.gb_per_s is not None and r.gb_per_s >= 0 for r in rows)


def test_work_counts_tensors_once_a_pass_and_matrix_products() -> None:
    tensors = case().inputs()
    size, out = sum(x.nbytes for x in tensors), 2 * 19 * 8 * 4
    flops = 2 * 2 * (2 * 19 * 20 * 8)  # heads, products
    assert kernels.work(case(), tensors, "forward") == (size + out, flops)
    assert kernels.work(case(), tensors, "forward+backward") == (3 * size + 2 * out, 3 * flops)


def test_repeated_fills_the_batch_and_leaves_tables_alone() -> None:
    table = bench.Case("x", "small", lambda: [randn(2, 3), randn(5)], lambda *x: x[0], lambda *x: x[0], unbatched=(1,))
    bigger = kernels.repeated(table, elements=60)
    assert [tuple(x.shape) for x in bigger.inputs()] == [(20, 3), (5,)]
    assert bigger.shape == "small, batch x 10"


def _batched(x: Tensor, times: int) -> tuple[int, ...]:
    return (times * x.shape[0], *x.shape[1:]) if x.ndim else ()


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_says_which_inputs_have_no_batch(operator: str) -> None:
    for each in bench.operator_cases([operator], device="meta"):
        if "800" not in each.shape:  # large ones take long to draw
            shapes = [_batched(x, 1 if i in each.unbatched else 2) for i, x in enumerate(each.inputs())]
            dtypes = [x.dtype for x in each.inputs()]
            y = each.run(*(torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)))
            assert y.shape[0] == 2 * len(each.inputs()[0]), each.shape


def test_ceilings_are_measured() -> None:
    found = kernels.ceilings("cpu", megabytes=4, side=128)
    assert set(found) == {"copy_gb_per_s", *(f"matmul_tflop_per_s_{d}" for d in bench.DTYPES)}
    assert all(value > 0 for value in found.values())

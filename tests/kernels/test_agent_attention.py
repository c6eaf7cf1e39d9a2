from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_agent_attention import inputs, run
from visionattn.ops import AgentBias, agent_attention
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): heads of 32 to 128 channels, few and many agents."""
    from visionattn.kernels import agent_attention as kernels

    wide = ((128, 49, 14),) if dtype == torch.float32 else ()
    for d, a, side in ((64, 49, 14), (64, 9, 56), (32, 49, 28), *wide):
        x = torch.empty(2, 6, side**2 + 1, d, dtype=dtype, device="meta")
        agents, held = x[:, :, :a].clone(), x.new_empty(2, 6, a, d, dtype=torch.float32)
        bias = tuple(torch.empty(6, a, *n, device="meta") for n in ((7, 7), (side,), (side,), (1,)))
        args = (x, x, x, agents, bias, bias, (side, side), d**-0.5)
        saved = (held, held[..., :2].clone(), x.new_empty(*x.shape[:3], 2, dtype=torch.float32))
        yield f"d={d}, a={a}", lambda args=args: kernels.forward(*args)
        yield f"d={d}, a={a}", lambda x=x, args=args, saved=saved: kernels.backward(x, *args, *saved)


def test_is_right_with_bias() -> None:
    size = (3, 4)
    tensors = inputs(2, 1, size, 1, 3, 8)
    batched = [True] * 4 + [False] * 8
    check_kernel(run("triton", size), run("reference", size), tensors, batched=batched)


def test_is_right_without_bias() -> None:
    tensors = inputs(1, 2, (1, 1), 10, 17, 12)[:4]
    check_budget(run("triton", (1, 1)), run("reference", (1, 1)), tensors)


def test_wide_heads_are_multiplied_in_parts() -> None:
    size = (3, 6)
    check_budget(run("triton", size), run("reference", size), inputs(1, 1, size, 1, 17, 128))


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tables=st.tuples(*[st.integers(1, 9)] * 4),
    prefix=st.integers(0, 2),
    agents=st.integers(1, 40),
    d=st.integers(1, 40),
    dv=st.integers(1, 40),
)
@settings(max_examples=5, deadline=None)
def test_any_shape(size, tables, prefix: int, agents: int, d: int, dv: int) -> None:
    heads, N = copies(agents), prefix + size[0] * size[1]
    shapes = [tables[:2], tables[2:3], tables[3:], *([(prefix,)] if prefix else [])]
    bias = [randn(heads, agents, *s, seed=4 + i) for i, s in enumerate(shapes * 2)]
    tokens = [randn(1, heads, *s, seed=i) for i, s in enumerate(((N, d), (N, d), (N, dv), (agents, d)))]

    def attend(impl: str) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *x: Tensor) -> Tensor:
            key_bias, query_bias = AgentBias(*x[: len(shapes)]), AgentBias(*x[len(shapes) :])
            return agent_attention(q, k, v, a, size=size, key_bias=key_bias, query_bias=query_bias, impl=impl)

        return call

    check_budget(attend("triton"), attend("reference"), [*tokens, *bias])


def test_one_bias_alone() -> None:
    q, k, v, agents, *bias = inputs(1, 1, (2, 3), 0, 2, 4)

    for name in ("key_bias", "query_bias"):

        def attend(impl: str, name: str = name) -> Callable[..., Tensor]:
            return lambda q, k, v, a, *x: agent_attention(q, k, v, a, size=(2, 3), impl=impl, **{name: AgentBias(*x)})

        check_budget(attend("triton"), attend("reference"), [q, k, v, agents, *bias[:3]])


def test_runs_of_tokens_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    from visionattn.kernels import agent_attention as kernels

    monkeypatch.setattr(kernels, "RUN", 64)
    tensors = inputs(1, 1, (10, 13), 1, 4, 8)
    check_budget(run("triton", (10, 13)), run("reference", (10, 13)), tensors)


def test_empty_batch_has_no_gradient_of_tables() -> None:
    tensors = inputs(1, 1, (2, 3), 0, 2, 4)
    bias = [x.requires_grad_() for x in tensors[4:]]
    out = run("triton", (2, 3))(*(x[:0] for x in tensors[:4]), *bias)
    for grad in torch.autograd.grad(out.sum(), bias):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_transforms() -> None:
    check_transforms(run("triton", (2, 2)), inputs(1, 1, (2, 2), 1, 2, 4))


def test_opcheck() -> None:
    q, k, v, agents, *bias = inputs(1, 1, (2, 3), 0, 2, 4)
    tables = (*bias[:3], None, *bias[4:7], None, 2, 3, 0.5)
    op = torch.ops.visionattn.agent_attention_triton
    torch.library.opcheck(op.default, (q, k, v, agents, *tables))
    saved = op(q, k, v, agents, *tables)
    backward = torch.ops.visionattn.agent_attention_triton_backward.default
    torch.library.opcheck(backward, (torch.ones_like(v), q, k, v, agents, *tables, *saved[1:]))


def test_offsets_exceed_32_bits() -> None:
    q, k, v, agents = (x.bfloat16() for x in inputs(1, 1, (1, 3), 0, 2, 16)[:4])
    far = run("triton", (1, 3))(*(far_apart(x, dim=2) for x in (q, k, v)), agents)
    assert torch.equal(far, run("triton", (1, 3))(q, k, v, agents))

"""Comparisons that papers make: the same kind of layer or model, each as a user would run it.

Unlike the contestants of `visionattn.analysis.bench`, these do not compute the same thing: rows tell time alone.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from timm.models.pvt_v2 import Attention as SpatialReduction
from torch import Tensor, nn

from visionattn import fuse
from visionattn.analysis.bench import DTYPES, Row, check_close, fits, race
from visionattn.layers.attention.agent import AgentAttention
from visionattn.layers.attention.hilo import HiLoAttention
from visionattn.layers.attention.softmax import SoftmaxAttention
from visionattn.layers.attention.window import WindowAttention
from visionattn.testing import randn

WIDTH, HEADS = 384, 12  # of the layers that HiLo is compared with
AGENT_WIDTH, AGENT_HEADS, AGENTS = 384, 6, 7  # DeiT-S, 7 x 7 agents


def hilo(sides: Sequence[int] = (14, 28, 56), *, rounds: int = 7) -> Iterator[Row]:
    """Race HiLo (2x2 windows, nine tenths of the heads on means) against attention of equal width, on square maps.

    Rivals are spatial-reduction attention (PVTv2's, on means of 2x2 tokens), attention in 7x7 windows (Swin's) and
    softmax attention over all tokens.

    Args:
        sides: Of the maps.
        rounds: Times that each contestant is measured, in turn.
    """
    ours = HiLoAttention(WIDTH, num_heads=HEADS, window=2, alpha=0.9).eval()
    reduction = SpatialReduction(WIDTH, num_heads=HEADS, sr_ratio=2, qkv_bias=True).eval()
    rivals: dict[str, Callable[[Tensor], Tensor]] = {
        "spatial reduction by 2": lambda x: reduction(x.flatten(1, 2), x.shape[1:3]),
        "windows of 7": WindowAttention(WIDTH, num_heads=HEADS, window=7).eval(),
        "softmax": SoftmaxAttention(WIDTH, num_heads=HEADS).eval(),
    }
    for side in sides:
        x = randn(1, side, side, WIDTH)
        for name, rival in rivals.items():
            yield from _race({name: rival, "HiLo": ours}, x, f"HiLo against {name}", f"{side}x{side} tokens", rounds)


def agent(sides: Sequence[int] = (7, 14, 20, 28, 40, 56, 80), *, rounds: int = 7) -> Iterator[Row]:
    """Race agent attention (49 agents) against softmax attention at DeiT-S's width, on maps of growing size.

    Args:
        sides: Of the maps.
        rounds: Times that each contestant is measured, in turn.
    """
    softmax = SoftmaxAttention(AGENT_WIDTH, num_heads=AGENT_HEADS).eval()
    for side in sides:
        ours = AgentAttention(AGENT_WIDTH, num_heads=AGENT_HEADS, agents=AGENTS, size=(side, side)).eval()
        x = randn(1, side, side, AGENT_WIDTH)
        yield from _race({"softmax": softmax, "agent": ours}, x, "Agent against softmax", f"{side**2} tokens", rounds)


def crossover(rows: Sequence[Row]) -> int | None:
    """Return the smallest measured number of tokens from which on Agent is never slower, or None.

    Args:
        rows: What `agent` yields, in its order.
    """
    first = None
    for row in rows:
        if row.contestant != "agent":
            continue
        if row.speedup < 1:
            first = None
        elif first is None:
            first = int(row.shape.split()[0])
    return first


def shvit(
    name: str = "shvit_s4",
    rival: str = "mobilevitv2_100",
    *,
    size: int = 256,
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
) -> Iterator[Row]:
    """Race two of timm's models, eager and through ONNX Runtime; ours fused, its batch norms folded.

    Args:
        name: A model that `visionattn.fuse` knows.
        rival: Any model of timm.
        size: Side of the images.
        batches: Batch sizes; each is exported by itself.
        rounds: Times that each contestant is measured, in turn.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing; the message names the extra to install.
        AssertionError: a runtime computes something else than PyTorch; nothing is timed then.
    """
    models = {rival: timm.create_model(rival).eval(), name: fuse(timm.create_model(name), fold_batchnorm=True).eval()}
    for batch in batches:
        x = randn(batch, 3, size, size)
        exported = {key: _onnx_session(model, x) for key, model in models.items()}
        where = f"{size}x{size}, batch {batch}"
        yield from _race(models, x, f"{name} against {rival}", f"{where}, eager", rounds)
        yield from _race(exported, x, f"{name} against {rival}", f"{where}, ONNX Runtime", rounds)


def infvit(
    sides: Sequence[int] = (1024,), *, device: str = "cpu", dtype: str = "fp32", rounds: int = 3, **arch: Any
) -> Iterator[Row]:
    """Race InfViT-4L, linear and pure, against the softmax ViT of equal depth and width, on images of growing size.

    The paper's baseline holds the N x N matrix, here ``"softmax, unfused"``; ``"softmax, fused"`` is what PyTorch does
    today. Contestants that the device's memory is too small for are left out of a race.

    Args:
        sides: Of the images, multiples of 16.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `visionattn.analysis.bench.DTYPES`.
        rounds: Times that each contestant is measured, in turn.
        **arch: ``dim``, ``depth`` and ``num_heads``, if they are not InfViT-4L's.
    """
    arch = {"dim": 1024, "depth": 4, "num_heads": 16} | arch
    for side in sides:
        softmax = VisionTransformer(
            img_size=side, embed_dim=arch["dim"], depth=arch["depth"], num_heads=arch["num_heads"]
        )
        unfused = copy.deepcopy(softmax)
        for block in unfused.blocks:
            block.attn.fused_attn = False
        contestants: dict[str, nn.Module] = {"softmax, unfused": unfused, "softmax, fused": softmax}
        for form in ("linear", "pure"):
            contestants[f"InfViT, {form}"] = timm.create_model(f"infvit_4l_{form}", img_size=side, **arch)
        x = randn(1, 3, side, side).to(device, DTYPES[dtype])
        able = {key: model.eval().to(device, DTYPES[dtype]) for key, model in contestants.items()}
        able = {key: model for key, model in able.items() if fits(model, x)}
        subject, shape = "InfViT-4L against softmax", f"{side}x{side}, batch 1"
        yield from _race(able, x, subject, shape, rounds, device=device, dtype=dtype)


def _onnx_session(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Export a model for inputs like ``x`` and load it with ONNX Runtime's defaults but for the number of threads."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise ImportError("ONNX export needs onnx, onnxscript and onnxruntime: pip install visionattn[export]") from e
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    with torch.no_grad():
        check_close(f"{type(model).__name__} in ONNX Runtime", run(x), model(x), 1e-3)
    return run


def _race(
    contestants: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    subject: str,
    shape: str,
    rounds: int,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
) -> list[Row]:
    def call(run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return run(x)

        return forward

    what: dict[str, Any] = {"subject": subject, "shape": shape, "direction": "forward", "dtype": dtype}
    return race({name: call(run) for name, run in contestants.items()}, what, device, rounds)


COMPARISONS: dict[str, Callable[..., Iterator[Row]]] = {"hilo": hilo, "shvit": shvit, "agent": agent, "infvit": infvit}

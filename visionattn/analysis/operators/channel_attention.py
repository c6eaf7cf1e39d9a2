"""DaViT-T's channel attention at its stage shapes, at 224 and at 800 x 1344."""

from torch import Tensor

from visionattn.analysis.bench import Case
from visionattn.ops import channel_attention
from visionattn.testing import randn

DIM = 32  # of a group
SHAPES = {  # groups, tokens
    "stage 1 at 224": (3, 56 * 56),
    "stage 3 at 224": (12, 14 * 14),
    "stage 1 at 800x1344": (3, 200 * 336),
    "stage 3 at 800x1344": (12, 50 * 84),
}


def cases() -> list[Case]:
    """Return one case a shape."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, groups: int, tokens: int) -> Case:
    def inputs() -> list[Tensor]:
        return [randn(1, tokens, 3, groups, DIM)]  # as the projection leaves them

    def run(qkv: Tensor) -> Tensor:
        return channel_attention(*_split(qkv))

    def authors(qkv: Tensor) -> Tensor:
        return published(*_split(qkv))

    return Case("channel_attention", f"DaViT-T {shape}", inputs, run, authors)


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    content, q, k = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, g, N, d)
    return q, k, content


def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The authors' order: scale the tokens, score, mix transposed tokens, transpose back."""
    attn = ((q * q.shape[-1] ** -0.5).transpose(-1, -2) @ k).softmax(dim=-1)
    return (attn @ v.transpose(-1, -2)).transpose(-1, -2).contiguous()

"""ViT-S/16's output gates: 196 patches and a class token at 224, 4200 and one at 800 x 1344."""

import torch
from torch import Tensor

from visionattn.analysis.bench import Case
from visionattn.ops import sigmoid_gate
from visionattn.testing import randn

HEADS, DIM = 6, 64  # of the model, of a head
SIZES = {"224": (4, 197), "800x1344": (1, 4201)}  # batch, tokens
INIT = 0.25  # the gate's value at the start, which fine-tuning divides by


def cases() -> list[Case]:
    """Return one case an image size and grain of the gates."""
    return [_case(side, *numbers, grain) for side, numbers in SIZES.items() for grain in ("head", "channel", "image")]


def _case(side: str, batch: int, tokens: int, grain: str) -> Case:
    shape = (batch, 1 if grain == "image" else tokens, HEADS, DIM if grain == "channel" else 1)

    def inputs() -> list[Tensor]:
        return [randn(batch, tokens, HEADS, DIM), randn(*shape, seed=1)]

    def run(y: Tensor, logits: Tensor) -> Tensor:
        return sigmoid_gate(y, logits, scale=1 / INIT)

    return Case("sigmoid_gate", f"ViT-S/16 at {side}, a gate a head and {grain}", inputs, run, published)


def published(y: Tensor, logits: Tensor) -> Tensor:
    """The authors' order: the gates, scaled, then heads before tokens, and back."""
    gate = torch.sigmoid(logits).transpose(1, 2) * (1 / INIT)
    return (y.transpose(1, 2) * gate).transpose(1, 2)

"""Distillation: a trained teacher's answers beside the labels (DeiT, arXiv:2012.12877)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation(nn.Module):
    """``(1 - alpha) * loss of the labels + alpha * loss of the teacher``, equations 2 and 3 of the paper.

    Args:
        teacher: takes images, returns logits; is frozen.
        kind: ``"soft"`` compares with the teacher's probabilities at temperature ``tau``, by the Kullback-Leibler
            divergence times ``tau**2``; ``"hard"`` takes the teacher's first guess as the label.
        alpha: the teacher's share.
        tau: temperature.
        mean: by which the student's images are normalised, a number a channel.
        std: likewise.
        teacher_mean: by which the teacher wants them normalised.
        teacher_std: likewise.
    """

    def __init__(
        self, teacher: nn.Module, *, kind: Literal["soft", "hard"], alpha: float, tau: float, mean: Sequence[float],
        std: Sequence[float], teacher_mean: Sequence[float], teacher_std: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind, self.alpha, self.tau = kind, alpha, tau
        mine, my_std, wanted, wanted_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, teacher_mean, teacher_std)
        )
        self.register_buffer("scale", my_std / wanted_std)
        self.register_buffer("shift", (mine - wanted) / wanted_std)

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """The teacher's logits for images ``(B, C, H, W)`` normalised for the student."""
        return self.teacher(images * self.scale + self.shift).float()

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, loss: nn.Module
    ) -> Tensor:
        """Return the loss.

        Args:
            images: as the student got them.
            outputs: the student's logits ``(B, classes)``, or a pair with those of its distillation token, which alone
                listen to the teacher then.
            targets: what ``loss`` takes.
            loss: of the labels.
        """
        first, second = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        wanted = self.answers(images)
        if self.kind == "hard":
            taught = F.cross_entropy(second.float(), wanted.argmax(1))
        else:
            mine, theirs = ((logits.float() / self.tau).log_softmax(1) for logits in (second, wanted))
            taught = F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * self.tau**2
        return (1 - self.alpha) * loss(first.float(), targets) + self.alpha * taught

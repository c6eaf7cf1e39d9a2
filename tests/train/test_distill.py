"""Distillation: its formulas, its token, a run with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.train.test_engine import losses
from visionattn.train import ConfigError, TrainConfig, train
from visionattn.train.distill import Distillation

Tiny = Callable[..., TrainConfig]


class Teacher(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] * 10


def distillation(**changes: Any) -> Distillation:
    common: dict[str, Any] = {"kind": "soft", "alpha": 0.3, "tau": 2.0, "mean": (0.5,), "std": (0.25,)}
    return Distillation(Teacher(), **{**common, "teacher_mean": (0.0,), "teacher_std": (1.0,), **changes})


def test_the_formulas() -> None:
    torch.manual_seed(0)
    images, outputs, token = torch.randn(4, 1, 2, 2), torch.randn(4, 3), torch.randn(4, 3)
    targets = torch.tensor([0, 1, 2, 0])
    answers = (images * 0.25 + 0.5).flatten(1)[:, :3] * 10  # as the teacher normalises: not at all
    labels = F.cross_entropy(outputs, targets)
    p, q = (answers / 2).softmax(1), (outputs / 2).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean() * 4
    loss = nn.CrossEntropyLoss()
    torch.testing.assert_close(distillation()(images, outputs, targets, loss), 0.7 * labels + 0.3 * soft)
    hard = F.cross_entropy(token, answers.argmax(1))
    found = distillation(kind="hard")(images, (outputs, token), targets, loss)
    torch.testing.assert_close(found, 0.7 * labels + 0.3 * hard)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_listens_to_its_teacher(kind: Any, tiny: Tiny) -> None:
    path = str(train(tiny(experiment="teacher", lr=3e-3)).folder / "last.safetensors")
    common: dict[str, Any] = {"teacher_model": "test_resnet", "teacher_path": path, "distillation_type": kind}
    alone = train(tiny(**common, distillation_alpha=0.0, experiment="alone"))
    assert losses(alone.history) == losses(train(tiny(experiment="plain")).history)
    whole = train(tiny(**common, experiment="whole", mixup=0.2))
    assert losses(whole.history) != losses(alone.history)


def test_a_token_listens_to_the_teacher(tiny: Tiny) -> None:
    path = str(train(tiny(experiment="teacher", epochs=1)).folder / "last.safetensors")
    result = train(
        tiny(
            model="deit_tiny_distilled_patch16_224",
            model_kwargs={"img_size": 32, "embed_dim": 48, "depth": 1},
            teacher_model="test_resnet",
            teacher_path=path,
            epochs=1,
            experiment="token",
        )
    )
    assert result.history[0]["train_loss"] > 0


def test_a_teachers_weights_need_its_name(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="teacher_path needs teacher_model"):
        tiny(teacher_path="teacher.safetensors")

"""`--dry-run`, what it prints, and recipes for all that was published."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml

import visionattn
from tests.models.variants import TINY
from visionattn.analysis import flops
from visionattn.train import ConfigError, DataError, TrainConfig, build_config, dry_run
from visionattn.train.build import build_model, build_optimizer, build_scheduler, learning_rate
from visionattn.train.cli import read_yaml
from visionattn.train.cost import count_macs, measure_memory

IMAGENET = Path(__file__).parents[2] / "configs" / "imagenet"
Tiny = Callable[..., TrainConfig]

# No accuracy on ImageNet-1K alone was published for these.
UNPUBLISHED = {
    "infvit_24l_linear", "infvit_b16_linear", "infvit_b16_pure", "infvit_s6_linear", "infvit_s6_pure",
    "inline_swin_b_384",
    "davit_base_fl", "davit_huge_fl", "davit_large", "davit_huge", "davit_giant",
    "maxvit_xlarge_tf_224", "maxvit_xlarge_tf_384", "maxvit_xlarge_tf_512",
}  # fmt: skip
TIMMS_OWN = ["convit_*", "davit_*", "maxvit_*_tf_*", "shvit_*"]  # which our operators are fused into


def test_every_published_variant_has_a_recipe() -> None:
    models = {read_yaml(path)["model"] for path in IMAGENET.glob("*.yaml") if path.stem != "_base"}
    assert models == {*visionattn.list_models(), *timm.list_models(TIMMS_OWN)} - UNPUBLISHED


@pytest.mark.parametrize("name", sorted(path.stem for path in IMAGENET.glob("*.yaml") if path.stem != "_base"))
def test_a_recipe_resolves(name: str) -> None:
    """Model, batches, optimiser and schedule can be made; the layers of a decaying rate are there."""
    cfg = build_config(TrainConfig, read_yaml(IMAGENET / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(
            cfg.model, num_classes=cfg.num_classes, drop_rate=cfg.drop, drop_path_rate=cfg.drop_path, **cfg.model_kwargs
        )
    assert cfg.num_classes == 1000
    assert cfg.global_batch_size
    assert cfg.global_batch_size % 8 == 0
    lr = learning_rate(cfg, cfg.global_batch_size)
    optimizer = build_optimizer(model, cfg, lr)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    _, epochs = build_scheduler(optimizer, cfg, 1_281_167 // cfg.global_batch_size)
    assert epochs == cfg.epochs + cfg.cooldown_epochs


def test_offsets_of_deformable_convolutions_learn_slowly() -> None:
    cfg = build_config(TrainConfig, read_yaml(IMAGENET / "litv2_s.yaml"))
    model = timm.create_model("litv2_s", dims=(16, 32, 48, 64), num_heads=(1, 2, 4, 4))
    optimizer = build_optimizer(model, cfg, 1e-3)
    scheduler, _ = build_scheduler(optimizer, cfg, 10)
    assert scheduler is not None
    scheduler.step_update(10 * 20)  # the warm-up is over
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    fast = rates[id(model.get_classifier().weight)]
    offsets = {name: p for name, p in model.named_parameters() if "downsample.offset" in name}
    assert len(offsets) == 6
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(fast * (0.01 if name in offsets else 1))
        assert decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0)


def test_scaled_rates_without_a_schedule_and_wrong_ones(tiny: Tiny) -> None:
    model = timm.create_model("test_vit")
    cfg = tiny(sched="none", lr_scale={"patch_embed": 0.5, "patch_embed.proj.bias": 0.5}, layer_decay=0.5)
    rates = {id(p): g["lr"] for g in build_optimizer(model, cfg, 1.0).param_groups for p in g["params"]}
    plain = build_optimizer(model, tiny(sched="none", layer_decay=0.5), 1.0)
    before = {id(p): g["lr"] for g in plain.param_groups for p in g["params"]}
    assert before[id(model.head.weight)] == 1.0 > before[id(model.patch_embed.proj.weight)]
    for parameter, factor in ((model.patch_embed.proj.weight, 0.5), (model.patch_embed.proj.bias, 0.25)):
        assert rates[id(parameter)] == pytest.approx(factor * before[id(parameter)])
    with pytest.raises(ConfigError, match="no parameter of the model has 'offset'"):
        build_optimizer(model, tiny(lr_scale={"offset": 0.1}), 1.0)
    with pytest.raises(ConfigError, match="lr_scale takes factors of 0 or more"):
        tiny(lr_scale={"offset": "slow"})


def test_it_prints_and_writes_nothing(tiny: Tiny, tmp_path: Path, images: Path) -> None:
    (images / "train" / "dark" / "3.png").write_text("not an image")
    cfg = tiny(model_ema=True, cooldown_epochs=1, grad_accum_steps=2, batch_size=4)
    text = dry_run(cfg)
    assert not (tmp_path / "out").exists()
    recipe, _, report = text.partition("\n\n")
    assert build_config(TrainConfig, yaml.safe_load(recipe)).num_classes == 2
    lines = dict(line.split(": ", 1) for line in report.splitlines())
    assert lines["model"].startswith("0.37 M parameters, ")
    assert lines["steps"] == "3 updates an epoch, 3 epochs with the cool-down, 9 in all"
    assert lines["batches"] == "4 images x 1 processes x 2 accumulated = 8"
    assert "average 1 MB" in lines["memory of a process"]
    assert lines["training data"].startswith("24 images, 2 classes; read 24, 1 of them unreadable: ")
    assert lines["validation data"] == "8 images, 2 classes; read 8, 0 of them unreadable"
    with pytest.raises(DataError, match="more than max_bad_images"):
        dry_run(tiny(max_bad_images=0))


def test_multiply_adds_are_counted_by_hand() -> None:
    """One convolution, one deformable one's shape, one attention."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10, img_size=32)
    tokens, dim = 5, 192
    wanted = 4 * dim * 3 * 256 + tokens * dim * (3 * dim + dim + 8 * dim) + 2 * tokens * tokens * dim + dim * 10
    assert count_macs(model, (3, 32, 32)) == wanted


def test_operations_are_those_of_the_model_cards() -> None:
    """Also where the reference implementation of an operator multiplies without a matrix product."""
    name, arch = TINY["transnext"]
    model = timm.create_model(name, **arch).train()
    assert count_macs(model, (3, 64, 96)) == flops.count(name, (64, 96), **arch).macs
    assert model.training
    assert not next(model.parameters()).is_meta


def test_memory_is_what_tensors_hold() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 100), torch.nn.ReLU(), torch.nn.Linear(100, 5))
    count = sum(parameter.numel() for parameter in model.parameters())
    memory = measure_memory(
        model, torch.optim.AdamW(model.parameters()), input_size=(3, 4, 4), num_classes=5, batch=10, average=True,
        autocast=contextlib.nullcontext(),
    )  # fmt: skip
    assert memory.weights == memory.gradients == memory.average == 4 * count
    assert memory.optimizer == 8 * count + 4 * len(list(model.parameters()))  # AdamW's two sums, and a step each
    inside = {"flattened image": 48, "hidden layer": 100}
    assert memory.activations == pytest.approx(4 * sum(inside.values()), abs=4 * 20)
    assert memory.total == 4 * 3 * count + memory.optimizer + 10 * memory.activations

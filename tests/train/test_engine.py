"""The loop: it learns, resumes to the bit, stops in order, accumulates, averages."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from visionattn.train import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainConfig,
    ValidateConfig,
    build_config,
    load_model,
    train,
    validate,
)
from visionattn.train import engine as engine_module
from visionattn.train.setup import assemble

REPOSITORY = Path(__file__).parents[2]
Tiny = Callable[..., TrainConfig]
HARD: dict[str, Any] = {  # everything random at once
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop": 0.2, "model_ema": True,
    "model_ema_decay": 0.9, "clip_grad": 1.0, "grad_accum_steps": 2, "batch_size": 4, "epochs": 3,
}  # fmt: skip


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(history: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    timing = ("images_per_second", "input_images_per_second", "data_wait", "peak_memory_mb", "seconds")
    return [tuple(value for key, value in row.items() if key not in timing) for row in history]


def command_line(cfg: TrainConfig) -> list[str]:
    """What to hand to Python for the same run by `tools/train.py`."""
    names = ("model", "data_dir", "img_size", "batch_size", "epochs", "warmup_epochs", "lr", "output", "experiment")
    values = [text for name in names for text in (f"--{name}", str(getattr(cfg, name)))]
    return [str(REPOSITORY / "tools" / "train.py"), *values, "--workers", "0", "--no-tensorboard", "--no-progress"]


def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a SIGTERM at the end of an update."""
    step = engine_module._Run._step

    def stepping(run: Any, batch: Any, number: int) -> torch.Tensor:
        loss = step(run, batch, number)
        if run.at.update == updates and run.accelerator.sync_gradients:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(engine_module._Run, "_step", stepping)


def test_it_learns_and_leaves_the_files(tiny: Tiny) -> None:
    result = train(tiny(epochs=6, checkpoint_hist=2, tensorboard=True, smoothing=0.0))
    assert result.stopped_by is None
    assert result.history[-1]["train_loss"] < 0.5 < result.history[0]["train_loss"]
    assert result.best is not None
    assert result.best["eval_top1"] >= 75
    names = {path.name for path in result.folder.iterdir()}
    assert {"args.yaml", "summary.csv", "last.safetensors", "model_best.safetensors", "state", "tb"} <= names
    assert len(list(result.folder.glob("checkpoint-*.safetensors"))) == 2
    assert any((result.folder / "tb").iterdir())
    assert not list(result.folder.rglob("*.part"))
    rows = list(csv.DictReader((result.folder / "summary.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    assert float(rows[-1]["train_loss"]) == result.history[-1]["train_loss"]
    again = build_config(TrainConfig, yaml.safe_load((result.folder / "args.yaml").read_text()))
    assert (again.epochs, again.num_classes) == (6, 2)


def test_a_resumed_run_is_the_same_to_the_bit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first update, between the third, the last of its epoch, and its validation, and later."""
    whole = train(tiny(**HARD, experiment="whole"))
    for updates, epochs in ((1, 0), (3, 0), (5, 1)):
        with monkeypatch.context() as patch:
            stop_after(updates, patch)
            part = train(tiny(**HARD, experiment=f"part-{updates}"))
        assert (part.stopped_by, len(part.history)) == (signal.SIGTERM, epochs)
        rest = train(tiny(**HARD, experiment=f"part-{updates}", resume="auto"))
        assert losses(rest.history) == losses(whole.history)
        for name in ("last", "last_ema", "model_best"):
            assert same(weights(rest.folder, name), weights(whole.folder, name))


def test_timms_models_train_fused(tiny: Tiny) -> None:
    """The losses are those of timm's own operators, and the weights fit timm's class."""
    kwargs = {"embed_dim": [16, 32, 48], "partial_dim": [8, 16, 16], "depth": [1, 1, 1]}
    common: dict[str, Any] = {"model": "shvit_s1", "model_kwargs": kwargs, "img_size": 64}
    plain, fused = (train(tiny(**common, fuse=on, experiment=str(on))) for on in (False, True))
    for mine, theirs in zip(fused.history, plain.history, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    assert weights(fused.folder).keys() == weights(plain.folder).keys()
    assert load_model(fused.folder / "last.safetensors")[1].model == "shvit_s1"
    with pytest.raises(ConfigError, match="test_resnet is none of them"):
        train(tiny(fuse=True, experiment="none"))


def test_two_epochs_and_two_more_are_four(tiny: Tiny, tmp_path: Path) -> None:
    """With a constant schedule more epochs may follow a finished run."""
    whole = train(tiny(epochs=4, sched="constant", experiment="whole"))
    train(tiny(epochs=2, sched="constant", experiment="part"))
    rest = train(tiny(epochs=4, sched="constant", experiment=None, resume=str(tmp_path / "out" / "part")))
    assert rest.folder == tmp_path / "out" / "part"
    assert losses(rest.history) == losses(whole.history)
    assert same(weights(rest.folder), weights(whole.folder))


def test_a_damaged_newest_state_costs_one_epoch(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tiny(epochs=3, experiment="whole"))
    newest = sorted((whole.folder / "state").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    rest = train(tiny(epochs=3, experiment="whole", resume="auto"))
    assert "cannot be read" in capsys.readouterr().out
    assert losses(rest.history) == losses(whole.history)


def test_resuming_wrongly(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        train(tiny())
    with pytest.raises(ConfigError, match="holds a run already"):
        train(tiny())
    with pytest.raises(ConfigError, match="middle of an epoch, so this cannot change now: batch_size 8 -> 4"):
        train(tiny(resume="auto", batch_size=4))
    with pytest.raises(CheckpointError, match=r"belongs to another model \(test_resnet\)"):
        train(tiny(resume="auto", model="test_vit", model_kwargs={"img_size": 32}))
    with pytest.raises(ConfigError, match="model_ema must stay"):
        train(tiny(resume="auto", model_ema=True))
    with pytest.raises(ConfigError, match="name it"):
        train(tiny(resume="auto", experiment=None))
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tiny(resume=str(tmp_path / "nowhere")))
    assert len(train(tiny(overwrite=True)).history) == 2


def test_a_changed_learning_rate_holds_after_resuming(tiny: Tiny) -> None:
    train(tiny(epochs=1, sched="constant"))
    result = train(tiny(epochs=2, sched="constant", resume="auto", lr=5e-4))
    assert [row["lr"] for row in result.history] == [1e-3, 5e-4]


def test_accumulated_batches_equal_one_large_batch(tiny: Tiny) -> None:
    """Without batch statistics and augmentation the gradients are the same sums."""
    common: dict[str, Any] = {
        "model": "test_vit", "model_kwargs": {"img_size": 32}, "no_aug": True, "opt": "sgd", "lr": 0.05, "epochs": 3
    }  # fmt: skip
    large = train(tiny(**common, batch_size=8, experiment="large"))
    small = train(tiny(**common, batch_size=2, grad_accum_steps=4, experiment="small"))
    fixed = train(tiny(**common, global_batch_size=8, grad_accum_steps=2, experiment="fixed"))
    for other in (small, fixed):
        for a, b in zip(large.history, other.history, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)


def test_the_average_is_kept_evaluated_and_chosen(tiny: Tiny) -> None:
    result = train(tiny(model_ema=True, model_ema_decay=0.5, experiment="ema"))
    assert {"eval_top1", "eval_ema_top1", "eval_ema_loss"} <= result.history[0].keys()
    raw, averaged = weights(result.folder), weights(result.folder, "last_ema")
    assert not same(raw, averaged)
    best = validate(ValidateConfig(checkpoint=str(result.folder / "model_best.safetensors"), workers=0, progress=False))
    assert result.best is not None
    assert best["top1"] == pytest.approx(result.best["eval_ema_top1"])
    assert best["loss"] == pytest.approx(result.best["eval_ema_loss"], rel=1e-5)
    result = train(tiny(model_ema=True, best_weights="raw", eval_metric="loss", experiment="raw"))
    best = validate(ValidateConfig(checkpoint=str(result.folder / "model_best.safetensors"), workers=0, progress=False))
    assert best["loss"] == pytest.approx(min(row["eval_loss"] for row in result.history), rel=1e-5)


def test_the_average_follows_its_formula(tiny: Tiny) -> None:
    parts = assemble(tiny(model_ema=True, model_ema_decay=0.9))
    assert parts.ema is not None
    model, average = parts.plain_model(), parts.ema.module
    parts.ema.update(model, step=1)
    before = [p.clone() for p in average.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    parts.ema.update(model, step=5)
    for old, new in zip(before, average.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * (old + 1.0))


def test_a_stop_for_bad_images_keeps_the_updates(tiny: Tiny, images: Path) -> None:
    cfg = tiny(epochs=1, batch_size=4, max_bad_images=0, seed=3)
    first = assemble(cfg).loader
    indices = [index for batch in first.epoch(0) for index in batch.indices]
    files = sorted((images / "train").glob("*/*.png"), key=lambda p: (p.parent.name, int(p.stem)))
    whole = files[indices[-1]].read_bytes()
    files[indices[-1]].write_bytes(b"")  # the last image of the epoch
    with pytest.raises(DataError, match="more than max_bad_images"):
        train(cfg)
    files[indices[-1]].write_bytes(whole)
    rest = train(tiny(epochs=1, batch_size=4, seed=3, resume="auto"))
    whole_run = train(tiny(epochs=1, batch_size=4, seed=3, experiment="whole"))
    assert losses(rest.history) == losses(whole_run.history)


def test_wrong_models(tiny: Tiny) -> None:
    for changes, message in (
        ({"model": "bifrmer_t"}, "unknown model 'bifrmer_t'; did you mean biformer_t"),
        ({"model_kwargs": {"colour": 3}}, "does not take its arguments"),
        ({"opt": "adamz"}, "cannot make the optimiser 'adamz'"),
        ({"sched": "sawtooth"}, "Unknown scheduler 'sawtooth'"),
        ({"global_batch_size": 9, "grad_accum_steps": 2}, "does not divide over 1 processes x 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            train(tiny(**changes))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16"},
        {"channels_last": True},
        {"grad_checkpointing": True},
        {"bce_loss": True, "clip_grad": 0.01, "clip_mode": "agc", "layer_decay": 0.8},
        {"sched": "step", "sched_on_updates": False, "cooldown_epochs": 1, "aug_repeats": 2, "batch_size": 4},
        {"initial_checkpoint": "last.safetensors", "opt": "sgd", "eval_metric": "loss", "mixup": 0.2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_run(changes: dict[str, Any], tiny: Tiny) -> None:
    if "initial_checkpoint" in changes:
        changes = {**changes, "initial_checkpoint": str(train(tiny(experiment="first")).folder / "last.safetensors")}
    result = train(tiny(**changes, epochs=1))
    assert result.history[0]["train_loss"] < 10
    assert result.history[0]["eval_loss"] > 0

"""Two real processes (gloo, on the CPU) train as one: DDP and FSDP2, families, accumulation, resuming, launching."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from tests.models.variants import TINY
from tests.models.variants import tiny as tiny_model
from tests.train import pair
from tests.train.conftest import make_images
from tests.train.test_engine import same, weights
from visionattn.train import CheckpointError, ConfigError, TrainConfig, load_model, train, zero
from visionattn.train.checkpoint import StateStore, read_state
from visionattn.train.cli import to_yaml
from visionattn.train.setup import assemble
from visionattn.train.sharding import block_classes

REPOSITORY = Path(__file__).parents[2]
Tiny = Callable[..., TrainConfig]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **more}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two processes did."""
    folder = tmp_path_factory.mktemp("pair")
    make_images(folder / "images")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(REPOSITORY / "tests" / "train" / "pair.py"), str(folder)], capture_output=True, text=True,
        env=environment(), timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(both: tuple[Path, dict[str, Any]]) -> None:
    folder, found = both
    for family in pair.FAMILIES:
        one = pair.losses(pair.recipe(family, folder, "one"))
        for kind in [kind for kind in pair.KINDS if kind != "zero" or family not in pair.SCALARS]:
            two = found[kind][family]
            assert len(two) == pair.STEPS
            assert two == pytest.approx(one, rel=0, abs=1e-5), (family, kind)
        assert max(one) - min(one) > 1e-2  # it trains


@pytest.mark.slow
def test_accumulation_keeps_the_global_batch_and_its_losses(both: tuple[Path, dict[str, Any]]) -> None:
    folder, found = both
    cfg = pair.recipe("mala", folder, "one")
    assert assemble(cfg).global_batch == 8
    one = pair.losses(cfg)
    for kind in pair.KINDS:
        assert found[kind]["accumulated"] == pytest.approx(one, rel=0, abs=1e-5), kind


@pytest.mark.slow
def test_sharding_changes_nothing_else(both: tuple[Path, dict[str, Any]]) -> None:
    """Mixed precision and checkpointing, with the same random numbers in the recomputation."""
    folder, found = both
    one = pair.losses(pair.recipe("mala", folder, "one", clip_grad=None))
    for kind in [kind for kind in pair.KINDS if kind != "ddp"]:
        for name in ("bf16", "checkpointed"):
            assert found[kind][name] == pytest.approx(found["ddp"][name], rel=0, abs=1e-5), (kind, name)
        assert found[kind]["bf16"] != pytest.approx(one, rel=0, abs=1e-5)
        assert found[kind]["bf16"] == pytest.approx(one, rel=0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", pair.KINDS)
def test_two_processes_resume_to_the_bit(kind: str, both: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = both
    whole, part = (folder / f"{kind}-{name}" for name in ("whole", "part"))
    for name in ("last", "last_ema", "model_best"):
        assert same(weights(whole, name), weights(part, name))
    states = [StateStore(run / "state").newest(print) for run in (whole, part)]
    assert states[0] is not None
    assert states[1] is not None
    for name in ("model", "ema"):
        assert same(states[0][name], states[1][name])
    optimizers = [
        [own["base_optimizer_state"] for own in state["own"]] if kind == "zero" else [state["optimizer"]]
        for state in states
    ]
    assert len(optimizers[0]) == (2 if kind == "zero" else 1)
    for mine, theirs in zip(*optimizers, strict=True):
        assert mine["state"].keys() == theirs["state"].keys() != set()
        assert all(same(value, theirs["state"][key]) for key, value in mine["state"].items())


@pytest.mark.slow
def test_shards_are_put_together(both: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """One process continues what two began in shards; the weights are whole files; a lost part is noticed."""
    folder, _ = both
    run = folder / "fsdp-whole"
    newest = StateStore(run / "state").files()[0]
    assert sorted(file.name for file in newest.iterdir()) == ["process-0000.pt", "process-0001.pt"]
    sizes = [file.stat().st_size for file in newest.iterdir()]
    assert min(sizes) > 0.7 * max(sizes)  # each holds its half
    whole = read_state(newest)
    model, info = load_model(run / "last.safetensors")
    assert info.metrics["loss"] == whole["history"][-1]["eval_loss"]
    assert same(model.state_dict(), whole["model"])
    assert same(load_model(run / "last_ema.safetensors")[0].state_dict(), whole["ema"])

    more = pair.resumable(folder, "fsdp-whole", resume="auto")
    result = train(TrainConfig(**{**vars(more), "epochs": 3}))
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert "processes 2 -> 1" in capsys.readouterr().out

    part = folder / "fsdp-part" / "state"
    before = len(StateStore(part).files())
    (StateStore(part).files()[0] / "process-0001.pt").unlink()
    with pytest.raises(CheckpointError, match="has 1 of 2 processes' parts"):
        read_state(StateStore(part).files()[0])
    older = StateStore(part).newest(print)
    assert before == 2
    assert older is not None
    assert older["update"] < whole["update"]


@pytest.mark.slow
def test_accelerate_launches_sharded_training_on_two_machines(images: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Both are this machine, each with one process; they find each other at an address and share the output folder."""
    name, arch = TINY["biformer"]
    cfg = tiny(
        model=name, model_kwargs=arch, img_size=64, global_batch_size=8, batch_size=4, model_ema=True, clip_grad=1.0,
        drop_path=0.2, epochs=1, mixup=0.2,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
        "--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()),
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "--fsdp_activation_checkpointing", "true", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    ]  # fmt: skip
    script = [str(REPOSITORY / "tools" / "train.py"), str(tmp_path / "run.yaml")]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, *script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(ACCELERATE_USE_CPU="true"),
        )
        for rank in "01"
    ]  # fmt: skip
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 x cpu" in said[0][0]
    assert "epoch   1/1" in said[0][0]
    assert "epoch" not in said[1][0]  # one reports for all
    run = Path(cfg.output) / "run"
    assert yaml.safe_load((run / "args.yaml").read_text())["batch_size"] == 4
    (state,) = StateStore(run / "state").files()
    assert state.is_dir()
    model, _ = load_model(run / "model_best.safetensors")
    assert same(model.state_dict(), read_state(state)["ema"])


@pytest.mark.parametrize(
    ("changes", "variables", "message"),
    [
        ({}, {"FSDP_VERSION": "1"}, "fsdp_version 2"),
        ({"clip_grad": 1.0, "clip_mode": "agc"}, {}, "by their norm alone, clip_mode is 'agc'"),
    ],
)
def test_what_shards_cannot_do(
    changes: dict[str, Any], variables: dict[str, str], message: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**pair.FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(tiny(**changes))


def as_if_installed(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of DeepSpeed is looked at before DeepSpeed itself is needed."""
    for name in ("is_deepspeed_available", "is_transformers_available"):
        monkeypatch.setattr(zero, name, lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "variables", "message"),
    [
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "stages 1 and 2, not 3: .* --use_fsdp"),
        ({}, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "leave offload_optimizer out"),
        ({"amp": "fp16"}, {}, "give --amp bf16 or none"),
        ({"clip_grad": 1.0, "clip_mode": "agc"}, {}, "by their norm alone, clip_mode is 'agc'"),
        ({"opt": "lamb"}, {}, "opt 'lamb' looks at whole layers"),
    ],
)
def test_what_deepspeed_cannot_do(
    changes: dict[str, Any], variables: dict[str, str], message: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_installed({**pair.ZERO, **variables}, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        train(tiny(**changes))


def test_deepspeed_config_file_may_not_take_over(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    as_if_installed({**pair.ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}, monkeypatch)
    with pytest.raises(ConfigError, match="leave optimizer, mixed precision out of DeepSpeed's configuration"):
        train(tiny())


@pytest.mark.skipif("zero" in pair.KINDS, reason="deepspeed is installed")
def test_deepspeed_that_is_missing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in pair.ZERO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"pip install visionattn\[deepspeed\]"):
        train(tiny())


@pytest.mark.slow
@pytest.mark.skipif("zero" not in pair.KINDS, reason="deepspeed is not installed: pip install visionattn[deepspeed]")
def test_a_state_of_deepspeed_goes_on_as_it_was_launched(both: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = both
    with pytest.raises(CheckpointError, match="saved under DeepSpeed: continue it as it was launched"):
        train(pair.resumable(folder, "zero-whole", resume="auto"))


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_is_cut_into_its_blocks(family: str) -> None:
    model = tiny_model(family)
    classes = block_classes(model)
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    held = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    assert len(blocks) >= 2
    assert held > 0.5 * sum(parameter.numel() for parameter in model.parameters())
    assert not any(inner in blocks for block in blocks for inner in list(block.modules())[1:])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "davit_tiny", "shvit_s1"])
def test_timms_models_are_cut_into_their_blocks(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = [module for module in model.modules() if type(module).__name__ in block_classes(model)]
    assert len(blocks) > 5

"""Arguments: from YAML and the command line, and what happens to wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from visionattn.train import ConfigError, TrainConfig, ValidateConfig, build_config, parse_config
from visionattn.train.cli import read_yaml, to_yaml

REPOSITORY = Path(__file__).parents[2]


def parse(*argv: str) -> TrainConfig:
    return parse_config(TrainConfig, argv, "test")


def test_command_line_overrides_yaml_overrides_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 9\nlr: 1e-3\nmodel_kwargs: {n_win: 7, depths: [1, 1]}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nepochs: 8\nmodel_kwargs: {n_win: 4}\n")
    cfg = parse(
        str(tmp_path / "run.yaml"), "--batch_size=32", "--smoothing", "0", "--model-kwargs", "drop_path_rate=1e-1",
        "--no-pin-mem", "--model-ema", "--scale", "0.5", "1", "--aa", "none",
    )  # fmt: skip
    assert (cfg.epochs, cfg.lr, cfg.batch_size, cfg.smoothing) == (8, 1e-3, 32, 0.0)
    assert cfg.model_kwargs == {"n_win": 4, "depths": [1, 1], "drop_path_rate": 0.1}
    assert (cfg.pin_mem, cfg.model_ema, cfg.scale, cfg.aa) == (False, True, (0.5, 1.0), None)
    assert cfg.opt == "adamw"


def test_saved_arguments_are_a_configuration(tmp_path: Path) -> None:
    cfg = parse("--epochs", "3", "--warmup-epochs", "0.5", "--mean", "0.5", "--model-kwargs", "dims=[8,16]", "--amp")
    (tmp_path / "args.yaml").write_text(to_yaml(cfg, header=["a comment"]))
    assert parse(str(tmp_path / "args.yaml")) == cfg
    assert cfg.amp == "bf16"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eopchs", "3"], "unknown argument: 'eopchs'; did you mean epochs"),
        (["--qqqqqqq", "3"], "unknown argument: 'qqqqqqq'; --help"),
        (["--epochs", "three"], "epochs must be integer, got 'three'"),
        (["--epochs", "1.5"], "epochs must be integer, got '1.5'"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--amp", "int4"], "amp must be none|bf16|fp16, got 'int4'"),
        (["--model-ema", "maybe"], "model_ema must be true|false, got 'maybe'"),
        (["--model-kwargs", "n_win"], "model_kwargs takes key=value pairs, got 'n_win'"),
        (["--mixup", "0.8", "--batch-size", "7"], "batch_size must be even, got 7"),
        (["--epochs", "3", "--warmup-epochs", "5"], "warmup_epochs (5) is longer than epochs (3)"),
        (["--best-weights", "ema"], "model_ema is off"),
        (["--input-size", "3", "32"], "three numbers"),
        (["a.yaml", "b.yaml"], "unexpected 'b.yaml'"),
        (["nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", "unknown key in"),
        ("drop_pth: 0.1\n", "did you mean drop_path"),
        ("lr: fast\n", "lr must be number, got 'fast'"),
        ("batch_size: true\n", "batch_size must be integer, got True"),
        ("model_kwargs: 3\n", "model_kwargs must be key=value, got 3"),
        ("- lr\n", "must hold `key: value` lines, got a list"),
        ("lr: [\n", "is not valid YAML"),
        ("extends: one.yaml\n", "one level is allowed"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "one.yaml").write_text("extends: two.yaml\n")
    (tmp_path / "two.yaml").write_text("lr: 1\n")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml|must be|did you mean") as caught:
        parse(str(tmp_path / "run.yaml"))
    assert message in str(caught.value)


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in (TrainConfig, ValidateConfig):
        with pytest.raises(SystemExit) as caught:
            parse_config(cls, ["--help"], "what it does")
        shown = capsys.readouterr().out
        assert caught.value.code == 0
        assert "what it does" in shown
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')} " in shown
            assert field.metadata["help"][:20] in " ".join(shown.split())


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_recipe_is_a_configuration(path: Path) -> None:
    values = read_yaml(path)
    cfg = build_config(TrainConfig, values, source=str(path))
    if path.parent.name != "quantization":  # one model there, with attentions after which the files are named
        assert path.stem in ("_base", cfg.model, f"{cfg.model}_{cfg.img_size}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"model": "test_resnet"}, "would have random weights"),
        ({"checkpoint": "a.pth", "pretrained": True}, "both name weights"),
        ({"checkpoint": "a.pth", "results_file": "a.txt"}, "results_file must end in .json or .csv"),
    ],
)
def test_wrong_validation_arguments(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ValidateConfig, values)

"""From YAML files and command lines to the configuration dataclasses.

A value takes the same way wherever it was written: its name must be a field of the dataclass and its type must be
the field's, or one `ConfigError` says what was expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from visionattn.train.errors import ConfigError

C = TypeVar("C")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse(cls: type[C], argv: Sequence[str], description: str) -> C:
    """Build ``cls`` from a command line ``[config.yaml] [--key value ...]``; ``--help`` prints every argument.

    Args:
        cls: `TrainConfig` or `ValidateConfig`.
        argv: the arguments, without the program's name. Hyphens and underscores in names are the same;
            ``--key value`` and ``--key=value`` too; ``--no-key`` switches a yes-or-no argument off.
        description: first line of the help.

    Raises:
        ConfigError: an unknown name (the message names the closest ones), a wrong type, or an unreadable file.
    """
    values, source = parse_values(cls, argv, description)
    return build(cls, values, source=source)


def parse_values(cls: type[Any], argv: Sequence[str], description: str) -> tuple[dict[str, Any], str]:
    """Read a command line as `parse` does, and return what was given, unchecked, and where.

    Raises:
        ConfigError: an unknown name, or an unreadable file.
    """
    types_of = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = _Parser(
        description=description, usage="%(prog)s [config.yaml] [--key value ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118),
    )  # fmt: skip
    parser.add_argument("config", nargs="?", help="YAML file that sets any of the arguments below")
    for name, field in fields.items():
        kind = types_of[name]
        bare = True if _plain(kind) is bool else field.metadata["bare"]
        extra: dict[str, Any] = {} if bare is None else {"const": bare}
        parser.add_argument(
            "--" + name.replace("_", "-"), dest=name, metavar=_expected(kind).upper().replace(" ", "_"),
            nargs="*" if typing.get_origin(_plain(kind)) in (tuple, dict) else "?" if bare is not None else None,
            help=f"{field.metadata['help']}{_show(field)}".replace("%", "%%"),
            **extra,
        )  # fmt: skip
    known = list(fields)
    tokens = [_normalise(token, types_of) for token in argv]
    given, rest = parser.parse_known_args(tokens)
    if rest:
        stray = rest[0]
        raise ConfigError(
            _unknown(stray.lstrip("-").partition("=")[0].replace("-", "_"), known, "argument")
            if stray.startswith("--")
            else f"unexpected {stray!r} on the command line: arguments are written --key value"
        )
    overrides = vars(given)
    file = overrides.pop("config", None)
    values = read_yaml(file) if file is not None else {}
    for name, value in overrides.items():
        if typing.get_origin(_plain(types_of[name])) is dict:
            value = {**(values.get(name) or {}), **_pairs(name, value)}  # single keys are overridden
        values[name] = value
    return values, str(file) if file else "the command line"


def build(cls: type[C], values: Mapping[str, Any], source: str = "the configuration") -> C:
    """Build ``cls`` from plain values, checking names and types.

    Args:
        cls: `TrainConfig` or `ValidateConfig`.
        values: as read from YAML, or strings.
        source: where they were written, for the message.

    Raises:
        ConfigError: an unknown name or a wrong type.
    """
    types_of = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(str(name), known, f"key in {source}"))
    return cls(**{name: coerce(name, types_of[name], value) for name, value in values.items()})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat mapping; its key ``extends`` names one base file, relative to this one.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping, or the base extends another file.
    """
    values = _mapping(Path(path))
    base = values.pop("extends", None)
    if base is None:
        return values
    below = _mapping(Path(path).parent / str(base))
    if "extends" in below:
        raise ConfigError(f"{path} extends {base}, which extends {below['extends']}: one level is allowed")
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            below[name] = {**below[name], **value}
        else:
            below[name] = value
    return below


def to_yaml(cfg: Any, header: Sequence[str] = ()) -> str:
    """Write a configuration as YAML that `read_yaml` reads back, below comment lines."""
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(cfg).items()
    }
    return "".join(f"# {line}\n" for line in header) + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)


def coerce(name: str, kind: Any, value: Any) -> Any:
    """Return ``value`` as ``kind``, or raise a `ConfigError` that names both.

    Numbers may be written as text (YAML reads 1e-3 so), a single number stands for a list of one, and none, null or
    nothing stand for ``None`` where the field allows it.
    """
    plain = _plain(kind)
    optional = plain is not kind
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and optional):
        if optional:
            return None
        if typing.get_origin(plain) is dict:
            return {}
        raise _wrong(name, plain, value)
    if typing.get_origin(plain) is Literal:
        value = "none" if value is False and "none" in typing.get_args(plain) else value  # YAML reads `no` so
        if value not in typing.get_args(plain):
            raise _wrong(name, plain, value)
        return value
    if typing.get_origin(plain) is tuple:
        items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
        return tuple(coerce(name, typing.get_args(plain)[0], item) for item in items)
    if typing.get_origin(plain) is dict:
        if not isinstance(value, dict):
            raise _wrong(name, plain, value)
        return {str(key): _untuple(item) for key, item in value.items()}
    if plain is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise _wrong(name, plain, value)
    if plain is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise _wrong(name, plain, value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(name, plain, value)
    try:
        number = float(value)
    except ValueError:
        raise _wrong(name, plain, value) from None
    if plain is int:
        if number != int(number):
            raise _wrong(name, plain, value)
        return int(number)
    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return values


def _plain(kind: Any) -> Any:
    """The type without ``| None``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (item for item in typing.get_args(kind) if item is not type(None))
    return kind


def _expected(kind: Any) -> str:
    plain = _plain(kind)
    origin = typing.get_origin(plain)
    if origin is Literal:
        return "|".join(str(choice) for choice in typing.get_args(plain))
    if origin is tuple:
        return _expected(typing.get_args(plain)[0]) + "s"
    if origin is dict:
        return "key=value"
    return {int: "integer", float: "number", str: "text", bool: "true|false"}[plain]


def _show(field: dataclasses.Field[Any]) -> str:
    """The default, for the help."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value == "":
        return ""
    if isinstance(value, tuple):
        return f" [{' '.join(f'{item:.4g}' for item in value)}]"
    return f" [{'on' if value else 'off'}]" if isinstance(value, bool) else f" [{value}]"


def _normalise(token: str, types_of: Mapping[str, Any]) -> str:
    """`--some_key` to `--some-key`, and `--no-key` of a yes-or-no argument to `--key=false`."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    field = name[2:].replace("-", "_")
    if not equals and field.startswith("no_") and field not in types_of and _plain(types_of.get(field[3:])) is bool:
        return f"--{field[3:].replace('_', '-')}=false"
    return f"--{field.replace('_', '-')}{equals}{value}"


def _pairs(name: str, items: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"{name} takes key=value pairs, got {item!r}")
        pairs[key] = _number(yaml.safe_load(text))
    return pairs


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text; nobody means that."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _untuple(value: Any) -> Any:
    return [_untuple(item) for item in value] if isinstance(value, list | tuple) else _number(value)


def _wrong(name: str, kind: Any, value: Any) -> ConfigError:
    return ConfigError(f"{name} must be {_expected(kind)}, got {value!r}")


def _unknown(name: str, known: Sequence[str], what: str) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; --help lists all of them"
    return ConfigError(f"unknown {what}: {name!r}{hint}")

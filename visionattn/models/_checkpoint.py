"""Read the authors' weight files safely, bring their keys to ours, load them strictly."""

import argparse
import collections
import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from visionattn.models import _timm

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
Rules = Sequence[tuple[str, str | None]]

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema")
HEADER = "visionattn"  # the entry of a safetensors header in which training describes the model
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


class CheckpointError(ValueError):
    """A weight file cannot be read or does not fit the model; the message says what to do."""


class OfficialWeights:
    """Mixin of every model here: knows how the authors' keys map to its own."""

    official_rules: Rules = ()  # (pattern, replacement) on the authors' keys in order; None drops the key
    official_ema: bool = False  # the authors' results are those of the averaged weights in their files

    def from_official(self, state: StateDict) -> StateDict:
        """Return a state dict in the authors' naming under our names; one in our naming passes unchanged."""
        own: StateDict = self.state_dict()  # type: ignore[attr-defined]
        if set(state) <= set(own):
            return state
        state = rename(state, self.official_rules)
        # A 1x1 convolution there may be a linear layer here.
        one_by_one = {k for k, v in state.items() if k in own and v.ndim == 4 != own[k].ndim and v.shape[2:] == (1, 1)}
        return {k: v.flatten(1) if k in one_by_one else v for k, v in state.items()}

    def settle(self, state: StateDict) -> None:
        """Settle by a weight file, under our names, what the constructor's arguments left open; here nothing is."""

    def load_pretrained(self, path: str, prefix: str = "") -> None:
        """Load a weight file for timm's ``create_model(pretrained=True)``; another class count keeps the new head."""
        load_checkpoint(
            self,  # type: ignore[arg-type]
            path,
            use_ema=self.official_ema,
            keep_classifier="if_classes_differ",
        )


class _Config:
    """Stands in for a configuration class in a weight file: an ordered dictionary of what the file says, no code."""

    def __new__(cls, *_: Any) -> collections.OrderedDict:  # type: ignore[misc]
        return collections.OrderedDict()


class _Ignored:
    """Stands in for what a weight file holds besides weights and is of no use here: logged values, scores."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts keep beside the weights: arguments, configurations, mmengine's logs, numpy's numbers.
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    (_Config, "yacs.config.CfgNode"),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Ignored, "builtins.getattr"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "numpy.dtype"),
    *(
        (_Ignored, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
)


def rename(state: StateDict, rules: Rules) -> StateDict:
    """Apply regular-expression rules to every key, in order; a rule whose replacement is None drops the key."""
    out: StateDict = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            if replacement is not None:
                new = re.sub(pattern, replacement, new)
            elif re.search(pattern, new):
                break
        else:
            out[new] = value
    return out


def fuse_qkv(state: StateDict) -> StateDict:
    """Join separate ``q_proj``, ``k_proj`` and ``v_proj`` into ``qkv``; other keys pass unchanged."""
    state = dict(state)
    for key in [k for k in state if "q_proj." in k]:
        parts = [key.replace("q_proj.", f"{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[key.replace("q_proj.", "qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def load_checkpoint(
    model: nn.Module, path: str | Path, *, use_ema: bool = False, keep_classifier: bool | str = False
) -> nn.Module:
    """Load a weight file into a model: the authors' as published, timm's, or one that training here wrote.

    Reads ``.safetensors`` and PyTorch files; a PyTorch file is read without running any code that it holds. Wrappers
    (``model``, ``state_dict``, ``model_ema``) and prefixes (``module.``, ``backbone.``) are taken off. Every key must
    fit: nothing is skipped silently, and the model is changed only if all fits.

    Args:
        model: A model of this library, timm's DaViT, SHViT or ConViT, or any module whose own keys the file has.
        path: The file.
        use_ema: Take the averaged weights where the file holds both.
        keep_classifier: True keeps the model's own classifier and loads the rest; ``"if_classes_differ"`` does so
            only where the class counts differ.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is unreadable, holds code, is of another architecture, size or class count.
    """
    path = Path(path)
    state = unwrap(read_checkpoint(path), use_ema=use_ema, name=str(path))
    if isinstance(model, OfficialWeights):
        state = model.from_official(state)
        model.settle(state)
    else:
        state = _timm.from_official(model, state)
    adapt_first_conv(model, state)
    _handle_classifier(model, state, keep_classifier, path)
    own = model.state_dict()
    if parts := misfits(state, own):
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}; nothing was loaded. {' '.join(parts)} Create the variant "
            "(and arguments) that the file was made for."
        )
    model.load_state_dict({**own, **state})
    return model


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Say in sentences which tensors of a file do not fit a model's ``own``, and which of those it lacks."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the model"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    return [
        *([f"{len(shapes)} of another shape: {_few(shapes)}."] if shapes else []),
        *([f"{len(missing)} missing from the file: {_few(missing)}."] if missing else []),
        *([f"{len(unexpected)} that the model does not have: {_few(unexpected)}."] if unexpected else []),
    ]


def read_checkpoint(path: str | Path) -> Any:
    """Read what a weight file holds, on the CPU, without executing anything in it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or holds objects other than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise CheckpointError(f"{path} is not a valid safetensors file: {e}") from e
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.findall(r"(?:GLOBAL|global) ([\w.]+)", str(e))
        what = f"holds {found[0]}, which is not a tensor or plain data" if found else "is not a plain weight file"
        raise CheckpointError(
            f"{path} {what}. Loading it could run code, so it was not loaded. If you trust its source, load it with "
            "torch.load(path, weights_only=False) in a process of its own and save its tensors as safetensors."
        ) from e
    except (RuntimeError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} cannot be read as a PyTorch weight file (damaged or cut short?): {e}") from e


def read_header(path: str | Path) -> dict[str, Any] | None:
    """Return what training here wrote about the model into a weight file's header; None for any other file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is not a readable safetensors file: {e}") from e
    return json.loads(header[HEADER]) if HEADER in header else None


def unwrap(data: Any, *, use_ema: bool = False, name: str = "checkpoint") -> StateDict:
    """Find the state dict in what a training script saved, and take off what wrappers prefixed to its keys.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    order = (*EMA_WRAPPERS, *WRAPPERS) if use_ema else (*WRAPPERS, *EMA_WRAPPERS)
    while isinstance(data, Mapping):
        inner = next((data[k] for k in order if isinstance(data.get(k), Mapping)), None)
        if inner is None:
            break
        data = inner
    tensors = {k: v for k, v in data.items() if isinstance(v, Tensor)} if isinstance(data, Mapping) else {}
    if not tensors:
        held = f"the entries {_few([str(k) for k in data])}" if isinstance(data, Mapping) else type(data).__name__
        raise CheckpointError(f"{name} holds no weights: found {held}, expected a state dict")
    if any(k.startswith("backbone.") for k in tensors):  # a detector or segmenter: its necks and heads stay behind
        tensors = {k: v for k, v in tensors.items() if k.startswith("backbone.")}
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in tensors):
                tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
                stripped = True
    return tensors


def _classifiers(model: nn.Module) -> list[str]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _handle_classifier(model: nn.Module, state: StateDict, keep: bool | str, path: Path) -> None:
    """Give ``state`` the model's own classifier where asked, or explain a difference in class counts."""
    own = model.state_dict()
    for name in _classifiers(model):
        weight = f"{name}.weight"
        in_file = state[weight].shape[0] if weight in state else 0
        in_model = own[weight].shape[0] if weight in own else 0
        if in_file == in_model and keep is not True:
            continue
        if not keep and in_file and in_model:
            raise CheckpointError(
                f"{path} classifies {in_file} classes, the model {in_model}; nothing was loaded. Pass "
                f"keep_classifier=True to load all but the classifier, or create the model with num_classes={in_file}."
            )
        if in_file and in_model:
            _logger.warning(
                "%s: classifier of %d classes left out, the model keeps its own of %d", path, in_file, in_model
            )
        if keep or not in_model:  # a model without a classifier has no use for one
            for key in (weight, f"{name}.bias"):
                state.pop(key, None)
                if key in own:
                    state[key] = own[key]


def adapt_first_conv(model: nn.Module, state: StateDict) -> None:
    """Bring the first convolution of weights for colour images to the model's channels."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("first_conv") or ()
    own = model.state_dict()
    for name in [names] if isinstance(names, str) else names:
        key = f"{name}.weight"
        if key in state and key in own and state[key].ndim == 4 and state[key].shape[1] == 3 != own[key].shape[1]:
            state[key] = adapt_input_conv(own[key].shape[1], state[key])


def _few(items: Sequence[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

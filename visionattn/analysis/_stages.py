"""Outputs of modules as maps, whatever layout a model keeps them in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.analysis._geometry import Grid, Size, shrunk, token_grid

SHOWN = 4  # stages at most, of models that have more


class UnknownLayerError(ValueError):
    """A model has no module of a name, or its output is no map; the message says what there is."""


def stage_names(model: nn.Module) -> list[str]:
    """Names of the modules that end the stages: four of the blocks, evenly spaced, where every block is a stage.

    Raises:
        UnknownLayerError: the model does not say which they are.
    """
    info: Any = getattr(model, "feature_info", None) or ()
    modules = dict(model.named_modules())
    names = [str(entry["module"]) for entry in info if entry.get("module") in modules]
    if not names and isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList)):
        names = [f"blocks.{i}" for i in range(len(model.blocks))]  # type: ignore[arg-type]
    if not names:
        raise UnknownLayerError(f"{type(model).__name__} does not say where its stages end: name a layer")
    count = min(SHOWN, len(names)) if len(names) > SHOWN + 1 else len(names)
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what modules return while the model runs.

    Raises:
        UnknownLayerError: a name is none of the model's.
    """
    modules, found, hooks = dict(model.named_modules()), {}, []
    for name in names:
        if name not in modules or not name:
            near = [n for n in modules if n and n.count(".") <= 2][:12]
            raise UnknownLayerError(
                f"{type(model).__name__} has no layer {name!r}; it has {', '.join(near)} and modules in them"
            )

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name] = output

        hooks.append(modules[name].register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def as_map(model: nn.Module, name: str, x: Any, image: Size) -> Tensor:
    """Return a module's output as ``(B, C, H, W)``: tokens without those before the map, channels in front.

    Raises:
        UnknownLayerError: it is no map.
    """
    if isinstance(x, Tensor) and x.ndim == 3:
        grid = tokens_of(model, x.shape[1], image)
        if grid is not None:
            return x[:, grid.prefix :].transpose(1, 2).unflatten(2, grid.size)
    if isinstance(x, Tensor) and x.ndim == 4:
        last = (x.shape[1], x.shape[2]) == shrunk(image, x.shape[1] * x.shape[2])
        first = (x.shape[2], x.shape[3]) == shrunk(image, x.shape[2] * x.shape[3])
        own = getattr(model, "layout", getattr(model, "output_fmt", "NCHW")) == "NHWC"
        return x.permute(0, 3, 1, 2) if last and (own or not first) else x
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise UnknownLayerError(f"the output of layer {name!r} is no map of the image: {shape}; name a block or a stage")


def tokens_of(model: nn.Module, tokens: int, image: Size) -> Grid | None:
    """How tokens of an image lie, by their number alone."""
    prefixes = dict.fromkeys((int(getattr(model, "num_prefix_tokens", 0)), 0, 1))
    return token_grid(tokens, (), image, tuple(prefixes))


def one_image(x: Tensor) -> Size:
    """``(H, W)`` of one image ``(1, C, H, W)``.

    Raises:
        ValueError: it is anything else.
    """
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"one image (1, C, H, W) expected, got {tuple(x.shape)}")
    return (x.shape[2], x.shape[3])


@contextmanager
def differentiating() -> Iterator[None]:
    """Take derivatives, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield

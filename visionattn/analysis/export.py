"""Export a model to a file, then run the file on other inputs and compare it with the model."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame, to_2tuple
from torch import Tensor, nn

from visionattn.analysis.folder import FolderError, replace_folder, write_folder
from visionattn.analysis.quantize import INSTALL, Run, session
from visionattn.analysis.subject import Size
from visionattn.extras import MissingExtraError, require
from visionattn.testing import randn

Format = Literal["onnx", "torchscript", "pt2", "safetensors"]
FORMATS: tuple[str, ...] = get_args(Format)
OPEN_SIZE = ("onnx", "pt2")  # formats that may leave H and W open, not the batch alone
STEP = 32  # a size that is left open takes multiples of this
TOLERANCE = 1e-4  # of the largest value
DRAWS = 4  # images of a shape, of which one has to be compared
ROUNDING = 2e-6  # relative: what runtimes may differ by


class ExportError(RuntimeError):
    """A model could not be exported, or what was exported does not compute what the model does."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        path: The file, or the folder.
        format: Its kind.
        megabytes: Its size.
        shapes: Of the images that the file and the model were both run on.
        largest_error: Between their results, over the largest value.
        smallest: Where H and W are open, the least that both may be, in steps of 32; else None.
    """

    path: Path
    format: str
    megabytes: float
    shapes: list[tuple[int, ...]]
    largest_error: float
    smallest: int | None = None


def export(
    model: nn.Module, path: str | Path, *, format: Format, size: Size, dynamic_size: bool = False,
    card: Mapping[str, Any] | None = None,
) -> Exported:  # fmt: skip
    """Write a model to a file, with a batch of any size, and check the file by running it on other inputs.

    Nothing is left at ``path`` unless the check passed.

    Args:
        model: In eval mode, on the CPU, in fp32.
        path: The file; for ``"safetensors"`` a folder, see `visionattn.analysis.folder`.
        format: ``"onnx"`` (checked in ONNX Runtime), ``"torchscript"`` (a trace), ``"pt2"`` (`torch.export`) or
            ``"safetensors"`` (weights and configuration, from which timm makes the model).
        size: ``(H, W)`` of the images.
        dynamic_size: Leave H and W open too: multiples of 32 from 64 up. For ``"onnx"`` and ``"pt2"``; not every
            architecture allows it.
        card: For ``"safetensors"``: arguments of `visionattn.analysis.folder.write_folder`.

    Raises:
        ExportError: the model cannot be exported so, or the file computes something else.
        ValueError: unknown format, one that has no open size, or a model that is not in fp32 on the CPU.
        FolderError: a folder cannot be written or cannot say what the model is.
        MissingExtraError: a package that the format needs is not installed.
    """
    _check(model, format, size, dynamic_size)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder) / path.name
        try:
            with torch.no_grad():
                run = (
                    write_folder(model, written, **(card or {}))
                    if format == "safetensors"
                    else _WRITERS[format](model, written, size, dynamic_size)
                )
        except (MissingExtraError, FolderError):
            raise
        except Exception as e:  # exporters raise what they like; the cause stays attached
            raise ExportError(f"the model cannot be exported to {format}{_with(dynamic_size)}: {_first_line(e)}") from e
        wider = [(size[0] + STEP, size[1] + 3 * STEP)] if dynamic_size else []
        shapes, error = _compare(model, run, [size, *wider], format, dynamic_size)
        smallest = None
        if dynamic_size:
            smallest, more = _smallest(model, run, size, format)
            shapes += more
        if written.is_dir():
            replace_folder(written, path)
        else:
            written.replace(path)
    files = [path] if path.is_file() else list(path.iterdir())
    return Exported(path, format, round(sum(f.stat().st_size for f in files) / 2**20, 2), shapes, error, smallest)


def _check(model: nn.Module, format: str, size: Size, dynamic_size: bool) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if dynamic_size and format not in OPEN_SIZE:
        raise ValueError(f"{format} leaves no H and W open: export to {' or '.join(OPEN_SIZE)}")
    if dynamic_size and (size[0] % STEP or size[1] % STEP or min(size) < 2 * STEP):
        raise ValueError(
            f"an open H and W takes multiples of {STEP} from {2 * STEP} up, the images are {size[0]} x {size[1]}; "
            "name such a size (--img-size), or leave only the batch open (--dynamic batch)"
        )
    odd = next((n for n, p in model.named_parameters() if p.dtype != torch.float32 or p.device.type != "cpu"), None)
    if odd is not None or model.training:
        what = f"its parameter {odd} is elsewhere" if odd is not None else "it is in training mode"
        raise ValueError(f"a model is exported in fp32, on the CPU and in eval mode; {what}")


def _compare(
    model: nn.Module, run: Run, sizes: Sequence[Size], format: str, dynamic_size: bool
) -> tuple[list[tuple[int, ...]], float]:
    """Run both on images of these sizes, alone and in threes; return the shapes and the largest error."""
    shapes: list[tuple[int, ...]] = [
        (batch, int(getattr(model, "in_chans", 3)), *size) for size in sizes for batch in (1, 3)
    ]
    return shapes, max(_error(model, run, shape, format, dynamic_size) for shape in shapes)


def _error(model: nn.Module, run: Run, shape: tuple[int, ...], format: str, dynamic_size: bool) -> float:
    for seed in range(1, DRAWS + 1):
        x = randn(*shape, seed=seed)
        with torch.no_grad():
            expected = model(x)
            try:
                actual = run(x)
            except Exception as e:  # runtimes raise what they like, too
                raise ExportError(
                    f"the {format} file does not run on images {shape}{_hint(dynamic_size)}: {_first_line(e)}"
                ) from e
        error = _off(actual, expected)
        if error <= TOLERANCE:
            return error
        if not _jumps(model, x, expected):
            raise ExportError(
                f"the {format} file is off by {error:.1e} of the largest value on images {shape}, allowed are "
                f"{TOLERANCE:.0e}{_hint(dynamic_size)}; nothing was written"
            )
    raise ExportError(
        f"the {format} file cannot be checked: noise of {ROUNDING:.0e} in images {shape} moves what the model itself "
        f"returns by more than the {TOLERANCE:.0e} of the largest value that are allowed; nothing was written"
    )


def _off(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def _jumps(model: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether the model itself makes more of rounding than is allowed, as where it must choose between equal regions.

    Nothing can be said of a file by such images.
    """
    near = (x * (1 + ROUNDING * randn(*x.shape, seed=seed)) for seed in range(8))
    return any(_off(model(images), expected) > TOLERANCE for images in near)


def _smallest(model: nn.Module, run: Run, size: Size, format: str) -> tuple[int, list[tuple[int, ...]]]:
    """Find the least H and W at which the file is right, and the shapes that show it."""

    def shown(side: int) -> list[tuple[int, ...]]:
        return _compare(model, run, [(side, side), (side, max(size) + STEP)], format, True)[0]

    for side in range(2 * STEP, min(size), STEP):
        with suppress(ExportError):  # maps that are smaller than a window are computed in another way
            return side, shown(side)
    return min(size), shown(min(size))


def _with(dynamic_size: bool) -> str:
    return " with an open H and W" if dynamic_size else ""


def _hint(dynamic_size: bool) -> str:
    if not dynamic_size:
        return ""
    return " (how it computes depends on H and W: start from larger images, --img-size, or leave only the batch open)"


def _first_line(e: Exception) -> str:
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def _program(model: nn.Module, size: Size, dynamic_size: bool) -> torch.export.ExportedProgram:
    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        axes |= {2: STEP * torch.export.Dim("rows", min=2), 3: STEP * torch.export.Dim("columns", min=2)}
        # Traced at a size that no table of the model is for, so that the general way is recorded.
        size = (size[0] + 2 * STEP, size[1] + 5 * STEP)
    example = randn(2, int(getattr(model, "in_chans", 3)), *size)  # tracers take a size of one for a constant
    with _short_sizes(model) if dynamic_size else nullcontext():
        return torch.export.export(model, (example,), dynamic_shapes=(axes,))


@contextmanager
def _short_sizes(model: nn.Module) -> Iterator[None]:
    """Write H and W of maps as parts of a multiple of a step: what is computed from them later stays short.

    Layers with TensorFlow's padding round quotients of sizes up to find out how wide it is, in ways that cannot be
    written to files. Strides divide multiples of a step, so that here it is as wide at any size.
    """
    with ExitStack() as undo:
        undo.enter_context(model.register_forward_pre_hook(_in_steps))
        for module in model.modules():
            for same, plain in _SAME.items():
                if isinstance(module, same):
                    module.forward = partial(_divided, plain, module)
                    undo.callback(delattr, module, "forward")
        yield


def _in_steps(_: nn.Module, images: tuple[Tensor]) -> Tensor:
    (x,) = images
    return x.narrow(2, 0, x.shape[2] // STEP * STEP).narrow(3, 0, x.shape[3] // STEP * STEP)


# Layers that pad as TensorFlow does, and what they are but for that.
_SAME: dict[type[nn.Module], type[nn.Module]] = {Conv2dSame: nn.Conv2d, AvgPool2dSame: nn.AvgPool2d}


def _divided(plain: type[nn.Module], same: Any, x: Tensor) -> Tensor:
    """Run a layer of `_SAME` on a map that its stride divides."""
    dilations = to_2tuple(getattr(same, "dilation", 1))
    sides = zip(to_2tuple(same.kernel_size), dilations, to_2tuple(same.stride), strict=True)
    height, width = (max(0, (kernel - 1) * dilation + 1 - stride) for kernel, dilation, stride in sides)
    return plain.forward(same, F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _onnx(model: nn.Module, path: Path, size: Size, dynamic_size: bool) -> Run:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "exporting to ONNX", INSTALL)
    torch.onnx.export(
        _program(model, size, dynamic_size), (), path, dynamo=True, input_names=["images"], output_names=["logits"],
        external_data=False, verbose=False,
    )  # fmt: skip
    return session(path)


def _torchscript(model: nn.Module, path: Path, size: Size, dynamic_size: bool) -> Run:
    example = randn(2, int(getattr(model, "in_chans", 3)), *size)
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), path)  # checked here, on other batches
    return torch.jit.load(path)


def _pt2(model: nn.Module, path: Path, size: Size, dynamic_size: bool) -> Run:
    torch.export.save(_program(model, size, dynamic_size), path)
    loaded: Any = torch.export.load(path).module(check_guards=not dynamic_size)
    return loaded


_WRITERS: dict[str, Callable[[nn.Module, Path, Size, bool], Run]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
}

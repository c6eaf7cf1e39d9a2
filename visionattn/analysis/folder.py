"""Folders from which timm makes a model: ``config.json``, ``model.safetensors`` and a card, as its hub has them.

`timm.create_model("local-dir:<folder>", pretrained=True)` reads one, after ``import visionattn``;
`timm.models.push_to_hf_hub` uploads the same files.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from visionattn.fuse import fuse, fuse_report
from visionattn.models._backbone import generate_readme
from visionattn.models._checkpoint import OfficialWeights, read_checkpoint, unwrap
from visionattn.models._timm import from_official

FILES = {"config.json", "model.safetensors", "README.md"}


class FolderError(RuntimeError):
    """A model cannot be kept as a folder; the message says why."""


@dataclass(frozen=True)
class Remapped:
    """Which of a file's tensors each of a model's tensors was made from.

    Attributes:
        sources: The file's keys by the model's; those that came unchanged in name are among them.
        dropped: Keys of the file that the model has no use for.
    """

    sources: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """The model's keys that stand for one key of another name."""
        return {ours: theirs[0] for ours, theirs in self.sources.items() if len(theirs) == 1 and theirs[0] != ours}

    @property
    def joined(self) -> dict[str, tuple[str, ...]]:
        """The model's keys that were put together from several."""
        return {ours: theirs for ours, theirs in self.sources.items() if len(theirs) > 1}

    def __str__(self) -> str:
        kept = len(self.sources) - len(self.renamed) - len(self.joined)
        lines = [
            f"{len(self.sources)} tensors: {kept} under their own names, {len(self.renamed)} renamed, "
            f"{len(self.joined)} joined of several; {len(self.dropped)} of the file's have no use"
        ]
        lines += [f"  {theirs} -> {ours}" for ours, theirs in self.renamed.items()]
        lines += [f"  {' + '.join(theirs)} -> {ours}" for ours, theirs in self.joined.items()]
        lines += [f"  {name}: not used" for name in self.dropped]
        return "\n".join(lines)


def remapped(model: nn.Module, path: str | Path, *, use_ema: bool = False) -> Remapped:
    """Tell how `visionattn.load_checkpoint` brings a file's keys to a model's.

    Args:
        model: The model that the file was loaded into.
        path: The file.
        use_ema: As for `load_checkpoint`.

    Raises:
        CheckpointError: the file cannot be read.
    """
    state = unwrap(read_checkpoint(path), use_ema=use_ema, name=str(path))
    keys = list(state)
    # Which elements come from where is seen by converting tensors that hold the number of their key.
    numbered = {key: torch.full(tuple(state[key].shape), float(i)) for i, key in enumerate(keys)}
    own = set(model.state_dict())
    converted = model.from_official(numbered) if isinstance(model, OfficialWeights) else from_official(model, numbered)
    sources = {
        ours: tuple(keys[int(i)] for i in numbers.round().unique().tolist())
        for ours, numbers in converted.items()
        if ours in own
    }
    used = {key for theirs in sources.values() for key in theirs}
    return Remapped(sources, tuple(key for key in keys if key not in used))


def write_folder(
    model: nn.Module, path: Path, *, description: str = "", data_config: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> nn.Module:  # fmt: skip
    """Write a model's folder, and return the model that timm makes of it.

    Args:
        model: Made by `timm.create_model`, in eval mode.
        path: A folder that does not exist yet.
        description: The first sentence of the card.
        data_config: ``input_size``, ``mean``, ``std``, ``crop_pct``, ... where they differ from the model's own.
        label_names: Names of the classes.

    Raises:
        FolderError: the model holds what timm's configuration cannot say, such as another attention.
    """
    names = {"label_names": list(label_names)} if label_names is not None else {}
    try:
        save_for_hf(model, str(path), model_config=names, safe_serialization=True, data_config=dict(data_config or {}))
    except ValueError as e:
        raise FolderError(f"{type(model).__name__} cannot be kept as a folder: {e}") from e
    (path / "README.md").write_text(generate_readme(_card(model, description), _name(model)))
    return read_folder(path, like=model)


def read_folder(path: str | Path, *, like: nn.Module) -> nn.Module:
    """Make the model of a folder through timm, in eval mode, fused if ``like`` is.

    Raises:
        FolderError: what it says is not the class or the parameters of ``like``.
    """
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it reports at length on parameters that a model keeps for itself
    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError) as e:
        raise FolderError(
            f"timm cannot make {type(like).__name__} from its arguments and weights alone (was something replaced in "
            f"it after it was created?): {str(e).strip().splitlines()[0]}"
        ) from e
    finally:
        logger.setLevel(before)
    return fuse(model) if fuse_report(like).replaced else model


def replace_folder(written: Path, path: Path) -> None:
    """Move a folder to ``path``, in place of one that holds nothing but such files.

    Raises:
        FolderError: ``path`` is something else.
    """
    if path.is_dir():
        others = sorted(p.name for p in path.iterdir() if p.name not in FILES)
        if others:
            raise FolderError(f"{path} holds {', '.join(others[:3])}: name a folder that is new or of an export")
        shutil.rmtree(path)
    elif path.exists():
        raise FolderError(f"{path} is a file; the weights and the configuration go to a folder")
    written.replace(path)


def _name(model: nn.Module) -> str:
    return str(model.pretrained_cfg.get("architecture", type(model).__name__))


def _card(model: nn.Module, description: str) -> dict[str, Any]:
    """What `timm.models._hub.generate_readme` makes a card of."""
    cfg: Any = model.pretrained_cfg
    papers = cfg.get("paper_ids") or ()
    papers = [papers] if isinstance(papers, str) else papers
    name, fused = _name(model), bool(fuse_report(model).replaced)
    details: dict[str, Any] = {
        "Model": f"`{name}`",
        "Parameters (M)": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "Classes": model.num_classes,
    }
    if papers:
        details["Papers"] = [f"https://arxiv.org/abs/{p.removeprefix('arXiv:')}" for p in papers]
    if cfg.get("origin_url"):
        details["Original"] = cfg["origin_url"]
    call = 'timm.create_model("hf-hub:USER/REPOSITORY", pretrained=True)'
    usage = [
        "```python",
        "import timm, visionattn  # visionattn registers the model",
        "",
        f"model = {f'visionattn.fuse({call})' if fused else call}.eval()",
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        "```",
    ]
    return {
        "tags": ["image-classification", "timm", "visionattn"],
        "license": cfg.get("license") or "other",
        "description": description or f"`{name}`, an image classifier of visionattn and timm.",
        "details": details,
        "usage": "\n".join(usage),
    }


def same_logits(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    """Whether two models give bitwise equal results on a batch."""
    with torch.no_grad():
        return torch.equal(a(x), b(x))

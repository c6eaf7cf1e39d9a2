"""What the hosts share."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.layers import DropPath, LayerNorm, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from visionattn.layers.sized import SizedTables, fit_tables
from visionattn.models._backbone import Backbone, update_model_input_size
from visionattn.models._checkpoint import StateDict

Size = tuple[int, int]
Mixer = Callable[[int, int], nn.Module | None]  # of a stage's number and of a block's number in it


class MapBlock(nn.Module):
    """Mixer and MLP, each after a norm and in a residual. ``(B, H, W, C)`` to the same shape.

    Args:
        dim: Channels.
        mixer: Map to map.
        mlp_ratio: Hidden width of the MLP over the channels.
        drop_path: Rate of stochastic depth.
        eps: Of the norms.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mix(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor) -> Tensor:
        """Norm and mixer."""
        return self.attn(self.norm1(x))


class Host(Backbone):
    """A backbone of four stages whose mixers may hold tables for one size of map."""

    @staticmethod
    def map_sizes(img_size: int | Size) -> list[Size]:
        """Return the size of each stage's map for images of ``img_size``."""
        raise NotImplementedError

    def fixed_by_size(self) -> dict[str, Any]:
        """Arguments that follow from ``img_size`` at construction and not when it changes later; here none."""
        return {}

    def set_input_size(self, img_size: int | Size) -> None:
        """Make the learned tables, resized, those of images of ``img_size``, for fine-tuning at that size.

        Any size runs without this: tables are then resized in every forward pass.
        """
        for i, size in enumerate(self.map_sizes(img_size)[: len(self.stages)]):
            for part in (self.stages[i], *([self.stem] if i == 0 else [])):
                for module in part.modules():
                    if isinstance(module, SizedTables):
                        module.set_size(size)
        update_model_input_size(self, pair(img_size), **self.fixed_by_size())

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys; resize tables that are for images of another size."""
        return fit_tables(self, self.reshape_official(super().from_official(state)))

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring renamed tensors to our shapes; those that have them already pass unchanged."""
        return state


def pair(img_size: int | Size) -> Size:
    """``(H, W)`` of a side or of both."""
    return (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as vision transformers do; leave other modules alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stage_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth by stage and block, rising linearly from 0 to ``last``."""
    return cast("list[list[float]]", calculate_drop_path_rates(last, list(depths), stagewise=True))

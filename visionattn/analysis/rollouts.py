"""Attention rollout: what the layers of a model attend to, multiplied up to the image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.analysis._geometry import Grid
from visionattn.analysis.attention import AttentionLayer, Recording


class UndefinedError(ValueError):
    """A method is not defined for a model; the message says why."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """Share of every token of the image in every token behind the last layer.

    Attributes:
        matrix: ``(tokens, tokens)``, rows sum to one.
        grid: Places of the tokens.
        start: Row that classifies: the class token's, or None where the patches are averaged.
    """

    matrix: Tensor
    grid: Grid
    start: int | None

    def map(self) -> Tensor:
        """Share of the image's places in what is classified: ``(H, W)``."""
        patches = self.grid.numbers()
        row = self.matrix[patches].mean(dim=0) if self.start is None else self.matrix[self.start]
        return row[patches].unflatten(0, self.grid.valid)


def rollout(model: nn.Module, recording: Recording) -> Rollout:
    """Multiply ``mean over heads + identity``, rows normalised, over all layers (arXiv:2005.00928).

    Gates behind the attention are left out. Where rows of attention do not sum to one (clipped softmax, infinite
    attention) they weigh less, or more, against the identity.

    Args:
        model: The model that was recorded; ``global_pool`` says whether it classifies by its class token.
        recording: What `record_attention` returned.

    Raises:
        UndefinedError: layers attend to different maps, to channels, to pooled keys, or with negative weights.
    """
    layers = recording.layers
    grids = [_usable(layer) for layer in layers]
    grid = max(grids, key=lambda g: g.prefix)
    if any(g.size != grid.size for g in grids):
        sizes = dict.fromkeys(f"{g.valid[0]} x {g.valid[1]}" for g in grids)
        raise UndefinedError(f"rollout needs the same tokens in all layers; here maps have {', '.join(sizes)} of them")
    total = torch.eye(grid.tokens, dtype=torch.float64)
    for layer, own in zip(layers, grids, strict=True):
        late = grid.prefix - own.prefix  # tokens that this layer does not see yet
        step = torch.eye(grid.tokens, dtype=torch.float64)
        weights = layer.rows(range(own.tokens)).double().mean(dim=0).cpu()
        if weights.min() < 0:
            raise UndefinedError(
                f"rollout needs weights that are shares; {layer.name} ({layer.kind}) has negative ones"
            )
        step[late:, late:] += weights
        total = step / step.sum(dim=-1, keepdim=True) @ total
    by_token = grid.prefix > 0 and getattr(model, "global_pool", "token") == "token"
    return Rollout(total, grid, 0 if by_token else None)


def _usable(layer: AttentionLayer) -> Grid:
    if layer.operator == "channel_attention":
        raise UndefinedError(f"rollout needs attention among tokens; {layer.name} attends among channels")
    if layer.grid is None or layer.pooled is not None:
        raise UndefinedError(f"rollout needs keys that are the queries' own tokens; {layer.name} has pooled ones")
    return layer.grid

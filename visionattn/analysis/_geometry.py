"""Where on the image the tokens of an attention operator lie."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The tokens of a map as an operator sees them: prefix tokens, then a map, row by row, of which a part is real.

    Attributes:
        prefix: Tokens before the map, such as a class token.
        size: ``(H, W)`` of the operator's map, padding included.
        valid: ``(H, W)`` of the part that stands for the image.
        offset: Rows above and columns left of that part.
    """

    prefix: int
    size: Size
    valid: Size
    offset: Size = (0, 0)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prefix + self.size[0] * self.size[1]

    def token(self, row: int, column: int) -> int:
        """Number of the token at a place of the valid part."""
        return self.prefix + (self.offset[0] + row) * self.size[1] + self.offset[1] + column

    def numbers(self) -> Tensor:
        """Numbers of all tokens of the valid part, row by row: ``(H * W,)``."""
        rows, columns = torch.arange(self.valid[0]), torch.arange(self.valid[1])
        return self.prefix + ((self.offset[0] + rows)[:, None] * self.size[1] + self.offset[1] + columns).flatten()

    def whole(self) -> Tensor:
        """Matrix that spreads weights of the tokens behind the prefix over the valid map: a choice of columns."""
        return F.one_hot(self.numbers() - self.prefix, self.size[0] * self.size[1]).T.float()


@dataclass(frozen=True)
class Seen:
    """The argument of a module that is running: maps and sizes among them tell how tokens are arranged."""

    name: str
    module: Any
    arguments: tuple[Any, ...]

    def sizes(self) -> Iterator[Size]:
        """Maps' sizes that the arguments speak of: given as a pair, or as the sides of ``(B, H, W, C)`` and NCHW."""
        for x in self.arguments:
            if isinstance(x, (tuple, list, torch.Size)) and len(x) == 2 and all(isinstance(n, int) for n in x):
                yield (x[0], x[1])
        for x in self.arguments:
            if isinstance(x, Tensor) and x.ndim == 4:
                yield from ((x.shape[1], x.shape[2]), (x.shape[2], x.shape[3]))


def map_grid(size: Size, running: Sequence[Seen], centred: bool) -> Grid:
    """Grid of an operator on a map of ``size``: what the module around it was given is real, the rest is padding.

    Args:
        size: ``(H, W)`` that the operator works on.
        running: Modules that are running, the outermost first.
        centred: Padding lies on all sides; at the bottom and right otherwise.
    """
    fitting = [s for s in (running[-1].sizes() if running else ()) if s[0] <= size[0] and s[1] <= size[1]]
    valid = max(fitting, key=lambda s: s[0] * s[1], default=size)
    offset = ((size[0] - valid[0]) // 2, (size[1] - valid[1]) // 2) if centred else (0, 0)
    return Grid(0, size, valid, offset)


def token_grid(tokens: int, running: Sequence[Seen], image: Size, prefixes: Sequence[int]) -> Grid | None:
    """Grid of an operator on ``tokens``, or None where nothing says how they are arranged.

    What modules around the operator were given decides, the innermost first; then the image's shape.

    Args:
        tokens: All of them.
        running: Modules that are running, the outermost first.
        image: ``(H, W)`` of the image.
        prefixes: Numbers of tokens before the map to try, the likeliest first.
    """
    for seen in reversed(running):
        aspect = [s for s in seen.sizes() if s != image]
        aspect.sort(key=lambda s: abs(math.log(s[0] * image[1] / (s[1] * image[0]))))  # like the image's first
        for prefix in dict.fromkeys((0, *prefixes)):
            for size in aspect:
                if size[0] * size[1] + prefix == tokens:
                    return Grid(prefix, size, size)
    for prefix in prefixes:
        fitting = shrunk(image, tokens - prefix)
        if fitting is not None:
            return Grid(prefix, fitting, fitting)
    return None


def shrunk(size: Size, tokens: int) -> Size | None:
    """``size`` over a whole number, rounded up or down, that has ``tokens`` cells; None if there is none."""
    for ratio in range(1, max(size) + 1):
        up, down = (-(-size[0] // ratio), -(-size[1] // ratio)), (size[0] // ratio, size[1] // ratio)
        for candidate in (up, down):
            if candidate[0] * candidate[1] == tokens:
                return candidate
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens and size[0] == size[1] else None


def pooled_bins(size: Size, pooled: Size) -> Tensor:
    """How much of a pooled token each token of the map is: ``(pooled tokens, H * W)``, rows sum to one.

    Windows of equal size where those give ``pooled``, with the last ones cut off by the border, and the spans of
    adaptive average pooling otherwise.
    """
    return torch.kron(_bins(size[0], pooled[0]), _bins(size[1], pooled[1]))


def _bins(size: int, bins: int) -> Tensor:
    i, j, span = torch.arange(bins)[:, None], torch.arange(size), -(-size // bins)
    whole = -(-size // span) == bins
    inside = j // span == i if whole else (j >= i * size // bins) & (j * bins < (i + 1) * size)
    return inside.float() / inside.sum(dim=1, keepdim=True)

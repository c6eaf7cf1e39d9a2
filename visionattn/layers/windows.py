"""Windows of NHWC maps, gathered before a layer makes queries, keys and values of them."""

from collections.abc import Callable

from torch import Tensor

from visionattn.ops import get_impl


def by_windows(
    mix: Callable[[Tensor, bool], Tensor], x: Tensor, window: tuple[int, int], *, grid: bool = False
) -> Tensor:
    """Attend inside the windows of a map.

    On the CPU the windows are gathered here, when there is one tensor to copy and not three, and mixed as small maps of
    one window each. Elsewhere kernels read windows where they lie, and ``mix`` gets the whole map; so it does where an
    implementation is asked for by `visionattn.use_impl`.

    Args:
        mix: Attends inside the windows of a map ``(B, H, W, C)``, blocks or (if the second argument says so) a grid.
        x: The map ``(B, H, W, C)``.
        window: Tokens along each side of a window; they must divide ``H`` and ``W``.
        grid: Windows are spread evenly over the map.

    Returns:
        ``(B, H, W, C)``.
    """
    if x.device.type != "cpu" or get_impl() != "auto" or x.shape[1:3] == window:
        return mix(x, grid)
    height, width = window
    rows, columns = ((height, -1), (width, -1)) if grid else ((-1, height), (-1, width))
    to_windows, to_map = ((0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)) if grid else ((0, 1, 3, 2, 4, 5),) * 2
    x = x.unflatten(2, columns).unflatten(1, rows).permute(to_windows)  # (B, rows, columns, h, w, C)
    return mix(x.flatten(0, 2), False).view(x.shape).permute(to_map).flatten(3, 4).flatten(1, 2)

"""From measurements to `auto`: which implementation of an operator is tried first, by device, dtype and size."""

import importlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionattn.ops import IMPLS, _ranks
from visionattn.ops._ranks import Rank

MARGIN = 1.05  # times that another implementation must be faster before it is preferred to the first of IMPLS
YARDSTICK = "eager"  # an implementation that every case has: ratios to it are comparable between cases

Key = tuple[str, str, str]  # operator, device, dtype
Data = Mapping[str, Any]  # what `visionattn.analysis.bench.write` wrote


def ranks(files: Iterable[Data]) -> dict[Key, tuple[Rank, ...]]:
    """Rank the implementations that raced each other.

    Cases are pooled by size: all whose queries have more than ``2 ** (n - 1)`` elements, up to ``2 ** n``. There an
    implementation is as good as its mean speed against plain PyTorch, over cases and directions alike. The first of the
    operator's ``IMPLS`` stays first unless another one is faster by `MARGIN`. Sizes between two that were measured are
    taken for the larger of them, and sizes beyond the largest for that one.

    Args:
        files: Measurements by ``tools/benchmark.py ops``, of any devices.

    Returns:
        Rows by operator, device and dtype, for which they say anything that ``IMPLS`` does not.
    """
    speeds: dict[Key, dict[int, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for data in files:
        for (operator, _, _, dtype), rows in _races(data).items():
            times = {row["contestant"]: row["ms"] for row in rows if row["contestant"] in IMPLS}
            if YARDSTICK in times and len(times) > 1:
                pool = speeds[operator, data["machine"]["kind"], dtype][_pool(rows[0]["elements"])]
                for impl, ms in times.items():
                    pool[impl].append(math.log(times[YARDSTICK] / ms))
    found = {key: _merge({size: _order(key[0], pool) for size, pool in pools.items()}) for key, pools in speeds.items()}
    return {key: rows for key, rows in sorted(found.items()) if any(row.order != _known(key[0], row) for row in rows)}


def sources(files: Mapping[str, Data]) -> dict[str, tuple[str, ...]]:
    """Say where the rows of each device come from, out of measurements by the names of their files."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, data in files.items():
        m = data["machine"]
        found[m["kind"]].append(f"{m['device']}, torch {m['torch']}, {m['date']}: {name}")
    return {device: tuple(texts) for device, texts in found.items()}


def beaten(data: Data) -> Iterator[str]:
    """Yield a line for each race that something else won from every implementation, by `MARGIN`."""
    for (operator, shape, direction, dtype), rows in _races(data).items():
        ours = [row["ms"] for row in rows if row["contestant"] in IMPLS]
        best = min(rows, key=lambda row: row["ms"])
        if ours and min(ours) > best["ms"] * MARGIN:
            yield f"{operator}, {shape}, {direction}, {dtype}: {best['contestant']} by {min(ours) / best['ms']:.2f}"


def write(paths: Sequence[Path], path: Path | None = None) -> dict[Key, tuple[Rank, ...]]:
    """Rank what was measured and write it to the module that `auto` reads.

    Args:
        paths: Files of measurements, each of a GPU; all that have not to be forgotten.
        path: The module to write, the library's own by default.

    Raises:
        ValueError: a file was not measured on a GPU.
    """
    files = {item.name: json.loads(item.read_text()) for item in paths}
    for name, data in files.items():
        if "kind" not in data["machine"]:
            raise ValueError(f"{name} was not measured on a GPU, where the order of implementations is open")
    rows = ranks(files.values())
    used = {device for _, device, _ in rows}
    path = path or Path(_ranks.__file__)
    head = path.read_text().partition("SOURCES: ")[0]
    texts = {device: texts for device, texts in sources(files).items() if device in used}
    path.write_text(head + render(texts, rows))
    return rows


def render(texts: Mapping[str, Sequence[str]], rows: Mapping[Key, Sequence[Rank]]) -> str:
    """Return sources and rows as the lines of `visionattn.ops._ranks`."""
    where = [
        f"    {json.dumps(device)}: (\n{_lines(map(json.dumps, lines))}    ),\n" for device, lines in texts.items()
    ]
    what = [f"    {_tuple(key)}: (\n{_lines(map(_rank, lines))}    ),\n" for key, lines in rows.items()]
    return (
        f"SOURCES: dict[str, tuple[str, ...]] = {_braces(where)}\n"
        f"RANKS: dict[tuple[str, str, str], tuple[Rank, ...]] = {_braces(what)}\n"
    )


def _races(data: Data) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    races = defaultdict(list)
    for row in data["rows"]:
        races[row["subject"], row["shape"], row["direction"], row["dtype"]].append(row)
    return races


def _pool(elements: int) -> int:
    """The power of two that holds ``elements``."""
    return 1 << (elements - 1).bit_length()


def _order(operator: str, pool: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    speed = {impl: statistics.mean(logs) for impl, logs in pool.items()}
    first, *others = (impl for impl in _impls(operator) if impl in speed)
    best = max(others, key=speed.__getitem__)
    if speed[best] > speed[first] + math.log(MARGIN):
        return best, first, *(impl for impl in others if impl != best)
    return first, *others


def _merge(orders: Mapping[int, tuple[str, ...]]) -> tuple[Rank, ...]:
    """Join sizes of one order; the last one has no end."""
    rows: list[Rank] = []
    for size, order in sorted(orders.items()):
        if rows and rows[-1].order == order:
            rows.pop()
        rows.append(Rank(size, order))
    return (*rows[:-1], Rank(None, rows[-1].order))


def _known(operator: str, row: Rank) -> tuple[str, ...]:
    return tuple(impl for impl in _impls(operator) if impl in row.order)


def _impls(operator: str) -> Iterable[str]:
    return importlib.import_module(f"visionattn.ops.{operator}").IMPLS


def _rank(row: Rank) -> str:
    return f"Rank({row.upto}, {_tuple(row.order)})"


def _tuple(texts: Iterable[str]) -> str:
    return f"({', '.join(map(json.dumps, texts))})"


def _lines(items: Iterable[str]) -> str:
    return "".join(f"        {item},\n" for item in items)


def _braces(items: Sequence[str]) -> str:
    return "{\n" + "".join(items) + "}" if items else "{}"

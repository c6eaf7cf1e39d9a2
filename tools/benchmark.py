"""Measure operators, models, resolutions and training steps: time, its spread and peak memory, as rows of JSON.

The files in benchmarks/ come from these commands, on an idle machine, each with `--append --out FILE`:

  ops --at-least 4                    ops_cpu.json
  models convit_tiny davit_tiny maxvit_tiny_tf_224 shvit_s1 --size 224 320 --batch 1 8 --compile   models_cpu.json
  resolution, resolution --cards      resolution_cpu.json
  train                               train_cpu.json

`ranks benchmarks/h100.json` makes `auto` follow what was measured.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionattn.analysis import bench, compare, kernels, ranks, scaling

ROOT = Path(__file__).parents[1]
LINE = "{:62} {:30} {:17} {:>10} {:>22} {:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    shared.add_argument("--dtype", default="fp32", choices=sorted(bench.DTYPES), help="on a GPU, operators run in both")
    shared.add_argument("--rounds", type=int, default=7, help="times that each contestant is measured, in turn")
    shared.add_argument("--out", type=Path, help="write the rows and the machine as JSON")
    shared.add_argument(
        "--append", action="store_true", help="keep what the file holds already from this machine and day"
    )
    text = "operators against their authors' formulation: time, ratio, peak memory"
    ops = commands.add_parser("ops", help=text, parents=[shared])
    ops.add_argument("operators", nargs="*", help="names from visionattn.ops.OPERATORS; all if none")
    ops.add_argument(
        "--at-least", type=float, default=0, metavar="SECONDS", help="that each race lasts on the CPU, by more rounds"
    )
    ops.add_argument("--shape", default="", help="only cases whose shape holds this text")
    text = "models against themselves on reference operators, or timm's own against them fused"
    models = commands.add_parser("models", help=text, parents=[shared])
    models.add_argument("names", nargs="+", help="registered names")
    models.add_argument("--size", type=int, nargs="+", default=[224], help="sides of the images")
    models.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")
    models.add_argument("--compile", action="store_true", help="through torch.compile as well")
    models.add_argument("--train", action="store_true", help="forward and backward as well")
    text = "HiLo against its rivals, SHViT against MobileViTv2, Agent and InfViT against softmax at growing size"
    compared = commands.add_parser("compare", help=text, parents=[shared])
    compared.add_argument("what", choices=list(compare.COMPARISONS))
    compared.add_argument("--size", type=int, nargs="+", help="sides of the maps; for shvit and infvit, of the images")
    text = "speed and peak memory of one image at growing size; rows that the file holds are not measured again"
    growing = commands.add_parser("resolution", help=text, parents=[shared])
    growing.add_argument("names", nargs="*", help="registered names; a small model of every family if none")
    growing.add_argument("--size", type=int, nargs="+", default=list(scaling.SIZES), help="sides of the images")
    growing.add_argument("--budget", type=float, default=60, help="seconds for a model, after which it is stopped")
    growing.add_argument("--memory", type=float, default=8, help="GB that a call may hold")
    growing.add_argument(
        "--cards", action="store_true", help="instead, every model whose accuracy a card reports, at its own size"
    )
    growing.add_argument("--gmacs", type=float, default=9, help="with --cards: leave out what costs more, in 10^9")
    text = "a training step (AdamW): speed and peak memory; rows that the file holds are not measured again"
    trained = commands.add_parser("train", help=text, parents=[shared])
    trained.add_argument("names", nargs="*", help="registered names; a small model of every family if none")
    trained.add_argument("--size", type=int, default=224, help="side of the images")
    trained.add_argument("--batch", type=int, default=8, help="images a step")
    text = "let auto follow measurements: write visionattn/ops/_ranks.py out of what `ops --device cuda` wrote"
    ranked = commands.add_parser("ranks", help=text)
    ranked.add_argument("files", type=Path, nargs="+", help="JSON of every GPU whose measurements count")
    args = parser.parse_args()
    if args.command == "ranks":
        try:
            _ranks(args.files)
        except ValueError as e:
            parser.error(str(e))
        return
    where = bench.machine(args.device)
    if args.device == "cuda":
        where |= kernels.ceilings(args.device)
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    if args.command in ("resolution", "train"):
        try:
            _scaling(args, where)
        except ValueError as e:
            parser.error(str(e))
        return
    print(LINE.format("subject, shape", "contestant", "direction", "ms", "speed-up (quartiles)", "peak MB"))
    rows = []
    try:
        for row in {"ops": _operators, "models": _models, "compare": _compare}[args.command](args):
            rows.append(row)
            speedup = f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
            label = f"{row.subject}, {row.shape}"
            numbers = (f"{row.ms:.3f}", speedup, f"{row.peak_mb:.2f}")
            print(LINE.format(label, row.contestant, row.direction, *numbers), flush=True)
            if args.out:  # after every row: a run that is stopped keeps what it measured
                bench.write(args.out, where, rows, append=args.append)
        if args.command == "compare" and args.what == "agent":
            tokens = compare.crossover(rows)
            print(f"agent attention is never slower from {tokens} tokens on" if tokens else "no crossover was measured")
            if args.out:
                bench.write(args.out, where, rows, append=args.append, agent_crossover_tokens=tokens)
    except ValueError as e:
        parser.error(str(e))


def _operators(args: argparse.Namespace) -> Iterator[bench.Row]:
    cases = [c for c in bench.operator_cases(args.operators, args.device) if args.shape in c.shape]
    if not cases:
        raise ValueError(f"no case has {args.shape!r} in its shape")
    for case in cases:
        if args.device == "cpu":
            yield from bench.measure(
                case, device=args.device, dtype=args.dtype, rounds=args.rounds, at_least=args.at_least
            )
            continue
        for line in kernels.check(case, device=args.device):
            print(line, flush=True)
        busy = kernels.repeated(case)
        for dtype in ("bf16", "fp32"):
            yield from kernels.race(busy, device=args.device, dtype=dtype, rounds=args.rounds)
            yield from kernels.race(case, device=args.device, dtype=dtype, rounds=args.rounds, rivals=False)


def _scaling(args: argparse.Namespace, where: dict[str, Any]) -> None:
    known = bench.read(args.out, where)["rows"] if args.out and args.append else []
    begun, rows = time.perf_counter(), []

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - begun:4.0f} s] {text}", flush=True)

    chosen = {name: name for name in args.names} or scaling.FAMILIES
    chosen = {family: name for family, name in scaling.FAMILIES.items() if name in chosen.values()} | {
        name: name for name in args.names if name not in scaling.FAMILIES.values()
    }
    shared: dict[str, Any] = {"known": known, "device": args.device, "dtype": args.dtype, "log": log}
    if args.command == "train":
        points = scaling.train(chosen, size=args.size, batch=args.batch, **shared)
    elif args.cards:
        points = scaling.accurate(ROOT, args.gmacs, **shared)
    else:
        points = scaling.resolution(chosen, args.size, budget_s=args.budget, memory_gb=args.memory, **shared)
    for point in points:
        rows.append(point)
        spread = f"{point.ms:.1f} ms ({point.ms_low:.1f} to {point.ms_high:.1f})" if point.ms else point.stopped
        log(f"  {point.model} at {point.size}: {spread}, {point.images_per_s} images/s, {point.peak_mb} MB")
        if args.out:  # after every row: a run that is stopped keeps what it measured
            bench.write(args.out, where, rows, append=args.append, keys=scaling.KEYS)


def _ranks(files: list[Path]) -> None:
    for key, rows in ranks.write(files).items():
        print(*key, *(f"{row.upto or 'beyond'}: {', '.join(row.order)};" for row in rows))
    for file in files:
        print(f"{file}: what is faster than every implementation")
        for line in ranks.beaten(json.loads(file.read_text())):
            print(f"  {line}")


def _models(args: argparse.Namespace) -> Iterator[bench.Row]:
    for name in args.names:
        for size in args.size:
            for batch in args.batch:
                yield from bench.measure_model(
                    name,
                    size=size,
                    batch=batch,
                    device=args.device,
                    dtype=args.dtype,
                    rounds=args.rounds,
                    compiled=args.compile,
                    train=args.train,
                )


def _compare(args: argparse.Namespace) -> Iterator[bench.Row]:
    if args.what == "infvit":
        yield from compare.infvit(args.size or [1024], device=args.device, dtype=args.dtype, rounds=args.rounds)
        return
    if (args.device, args.dtype) != ("cpu", "fp32"):
        raise ValueError("of the comparisons, only infvit is measured on a GPU or in half precision")
    if args.what == "shvit":
        for size in args.size or [256]:
            yield from compare.shvit(size=size, rounds=args.rounds)
        return
    yield from compare.COMPARISONS[args.what](**({"sides": args.size} if args.size else {}), rounds=args.rounds)


if __name__ == "__main__":
    main()

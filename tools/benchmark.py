"""Measure side by side: `python tools/benchmark.py ops [operator ...]`."""

import argparse
import json
from pathlib import Path

from visionattn.analysis import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="operators against the authors' formulation: time, ratio, peak memory")
    ops.add_argument("operators", nargs="*", help="names from visionattn.ops.OPERATORS; all if none")
    ops.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    ops.add_argument("--dtype", default="fp32", choices=sorted(bench.DTYPES))
    ops.add_argument("--shape", default="", help="only cases whose shape holds this text")
    ops.add_argument("--rounds", type=int, default=7, help="times that each contestant is measured, in turn")
    ops.add_argument("--out", type=Path, help="write the rows and the machine as JSON")
    args = parser.parse_args()
    try:
        cases = [c for c in bench.operator_cases(args.operators) if args.shape in c.shape]
    except ValueError as e:
        parser.error(str(e))
    if not cases:
        parser.error(f"no case has {args.shape!r} in its shape")
    where = bench.machine(args.device)
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    head = ("operator, shape", "contestant", "direction", "ms", "speed-up (quartiles)", "peak MB")
    print("{:58} {:16} {:17} {:>10} {:>24} {:>9}".format(*head))
    rows = []
    for case in cases:
        for row in bench.measure(case, device=args.device, dtype=args.dtype, rounds=args.rounds):
            rows.append(row)
            speedup = f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
            label = f"{row.operator}, {row.shape}"
            print(f"{label:58} {row.contestant:16} {row.direction:17} {row.ms:10.3f} {speedup:>24} {row.peak_mb:9.2f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": where, "rows": bench.as_dicts(rows)}, indent=1) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

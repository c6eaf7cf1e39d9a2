"""What the command lines in tools/ share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from visionattn.dense.errors import DenseError
from visionattn.dense.run import EXTRA, load_config
from visionattn.extras import MissingExtraError, require
from visionattn.models import CheckpointError


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that say what to run."""
    engine = require("mmengine.config", "This command", EXTRA)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config of mmdetection or mmsegmentation")
    parser.add_argument("--work-dir", help="where to write; output/<the config's name> if the config does not say")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=engine.DictAction,
        metavar="KEY=VALUE",
        help="values to set in the config, by dotted name; lists as a,b or [a,b]",
    )
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="what started the processes"
    )
    parser.add_argument("--no-check", action="store_true", help="do not check the datasets first")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # older launchers'
    return parser


def load(args: argparse.Namespace) -> Any:
    """Read the config that parsed arguments name."""
    return load_config(args.config, args.cfg_options, work_dir=args.work_dir, launcher=args.launcher)


def report(run: Callable[[], Any]) -> int:
    """Run a command; the exit status is 0, or 1 after an error that the user can mend, whose message is printed."""
    try:
        run()
    except (DenseError, CheckpointError, MissingExtraError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0

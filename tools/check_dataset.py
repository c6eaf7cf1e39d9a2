"""Check the datasets of a config: python tools/check_dataset.py configs/bccd/retinanet_biformer_t_bccd.py."""

import sys

from visionattn.dense.cli import load, parser, report
from visionattn.dense.datasets import check_config


def main() -> None:
    """Run the command line."""
    arguments = parser("Say what is wrong with the datasets of a config, having opened every file of them.")
    for line in check_config(load(arguments.parse_args()), sample=None):
        print(line)


if __name__ == "__main__":
    sys.exit(report(main))

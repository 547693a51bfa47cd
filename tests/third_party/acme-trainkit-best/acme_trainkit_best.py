"""``trainkit best``: the best value of each test metric of a run."""

import argparse
import json
from pathlib import Path

from trainkit.errors import UsageError

HELP = "Print the best value of each test metric of a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", type=Path)


def run(args: argparse.Namespace) -> int:
    """Read ``result.json`` and print one line a metric."""
    path = args.run_dir / "result.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the directory of a run that ended")
    for name, best in json.loads(path.read_text())["best"].items():
        print(f"{name} {best['value']:.2f} in epoch {best['epoch']:.0f}")
    return 0

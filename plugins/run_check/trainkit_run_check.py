"""Verify a run directory: each file whole, and whether it would resume exactly."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainkit.cli.output import print_json, printable, table
from trainkit.errors import TrainkitError, UsageError
from trainkit.registry import installed
from trainkit.rundir import RunDir

__all__ = ["EXAMPLES", "HELP", "Finding", "add_arguments", "run"]

HELP = "Verify a run directory: each file whole, and whether it would resume exactly."
EXAMPLES = "examples:\n  trainkit runs check runs/basic_se/20260101-120000-0\n"
CHECKPOINTS = ("last", "previous", "best")


class Finding(NamedTuple):
    """What came of one part of the run directory."""

    what: str
    verdict: Literal["whole", "absent", "broken", "differs"]
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print a finding for each part, then the answer; 0 if all is whole and the run would resume exactly."""
    run_dir = RunDir(args.run_dir)
    run_dir.recipe_path()
    findings = [*_files(run_dir), *_checkpoints(run_dir), *_plugins(run_dir)]
    whole = all(finding.verdict in ("whole", "absent") for finding in findings)
    exact, answer = _resume(run_dir)
    if args.json:
        print_json({"findings": [f._asdict() for f in findings], "whole": whole, "exact": exact, "resume": answer})
    else:
        from rich.console import Console

        console = Console()
        console.print(table(["what", "verdict", "detail"], findings))
        console.print(printable(answer), markup=False, highlight=False, soft_wrap=True)
    return 0 if whole and exact else 1


def _files(run_dir: RunDir) -> Iterator[Finding]:
    from trainkit.recipe import load_recipe

    def recipe() -> str:
        loaded = load_recipe(run_dir.recipe_path())
        return f"{loaded.name}, {len(loaded.plugins)} plugins"

    yield _finding("recipe.yaml", recipe)
    ...

"""``trainkit resume``: continue a run from its last checkpoint, exactly."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainkit.cli.output import add_allow_local, terminal

HELP = "Continue a run from its last checkpoint, exactly."
EXAMPLES = """\
examples:
  trainkit resume runs/basic_se/20260101-120000-0
  trainkit resume runs/basic_se/20260101-120000-0 epochs=300
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
    parser.add_argument("--allow-changes", action="store_true", help="continue although the result will differ")
    add_allow_local(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Build the recipe again, check that nothing changed that matters, load, train."""
    from trainkit import numerics
    from trainkit.cli.run import refuse_meta, train
    from trainkit.recipe import load_recipe
    from trainkit.rundir import RunDir

    console = terminal(stderr=args.json)
    recipe = load_recipe(RunDir(Path(args.run_dir)).recipe_path(), args.overrides)
    refuse_meta(recipe)
    numerics.prepare(recipe)
    from trainkit.session import reopen  # loads torch, which reads the settings of numerics

    reopened = reopen(args.run_dir, args.overrides, allow_changes=args.allow_changes, console=console)
    if reopened.finished and not args.json:
        done = f"{reopened.epoch} epochs and {reopened.step} steps are completed"
        console.print(f"nothing is left to train: {done}", markup=False, highlight=False)
    return train(reopened, as_json=args.json)

"""``trainkit resume``: continue a run from its last checkpoint, exactly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainkit.cli.output import add_allow_local, terminal
from trainkit.errors import UsageError
from trainkit.registry import RESUMABLE, installed, only

HELP = "Continue a run from its last checkpoint, exactly."
EXAMPLES = """\
examples:
  trainkit resume runs/basic_se/20260101-120000-0
  trainkit resume runs/basic_se/20260101-120000-0 epochs=300
  trainkit resume runs/paper
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run, or of a study")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
    parser.add_argument("--allow-changes", action="store_true", help="continue although the result will differ")
    add_allow_local(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _several(args: argparse.Namespace) -> Any:
    """Return what resumes a folder that is no run's but is marked by a file that an installed package knows, or None.

    An entry point of the group ``trainkit.resumable`` has the file's name, such as ``group.json``, and names an object
    with ``resume(folder, allow_local=..., as_json=...) -> int``, the exit code.

    Raises:
        UsageError: there are arguments that are for one run.
    """
    folder = Path(args.run_dir)
    if (folder / "recipe.yaml").is_file():
        return None
    for name, records in installed(RESUMABLE).items():
        if Path(name).name == name and (folder / name).is_file():
            if args.overrides or args.allow_changes:
                given = args.overrides[0] if args.overrides else "--allow-changes"
                raise UsageError(f"{folder}: several runs, by its {name}; {given} is for one run: resume that alone")
            return only(name, records, "resumable").load()
    return None


def run(args: argparse.Namespace) -> int:
    """Build the recipe again, check that nothing changed that matters, load, train."""
    from trainkit import numerics
    from trainkit.cli.run import refuse_meta, train
    from trainkit.recipe import load_recipe
    from trainkit.rundir import RunDir

    if several := _several(args):
        code: int = several.resume(Path(args.run_dir), allow_local=args.allow_local, as_json=args.json)
        return code
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

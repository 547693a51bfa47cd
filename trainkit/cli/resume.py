"""``trainkit resume``: continue a run from its last checkpoint, exactly."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.cli.output import printable, terminal
from trainkit.cli.start import starting
from trainkit.errors import RecipeError

if TYPE_CHECKING:
    from trainkit.run import Run

HELP = "Continue a run from its last checkpoint, exactly."
EXAMPLES = """\
examples:
  trainkit resume runs/basic_se/20260101-120000-0
  trainkit resume runs/basic_se/20260101-120000-0 epochs=300
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
    parser.add_argument("--allow-changes", action="store_true", help="continue although the result will differ")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Build the recipe again, check that nothing changed that matters, load, train."""
    console = terminal(stderr=args.json)
    with starting():
        from trainkit import provenance
        from trainkit.cli.run import train
        from trainkit.recipe import load_recipe
        from trainkit.run import build
        from trainkit.rundir import RunDir

        run_dir = RunDir(args.run_dir)
        recipe = load_recipe(run_dir.recipe_path(), args.overrides)
        state, notice = run_dir.load_latest()
        if notice:
            console.print(printable(notice), markup=False, highlight=False)
        built = build(recipe, console=console)
    differences = provenance.compare(state["provenance"], provenance.record(built))
    changes = [str(difference) for difference in differences if difference.effect == "numbers"]
    if changes and not args.allow_changes:
        raise RecipeError(
            f"{args.run_dir}: would not continue exactly: {'; '.join(changes)}; undo that, or pass --allow-changes"
        )
    _refuse_void(built, changes)
    built.load_state_dict(state)
    if built.finished and args.overrides:
        raise RecipeError(
            f"{args.run_dir}: nothing is left to train: it has completed {built.epoch} epochs and {built.step} steps; "
            "give more epochs, or more max_steps"
        )
    length = [str(difference) for difference in differences if difference.effect == "length"]
    if length and built.schedules:
        note = f"{'; '.join(length)}: schedules keep the course that they began; a new run of that length may differ"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    built.resumed.append({"epoch": built.epoch, "step": built.step, "changes": changes + length})
    built.dir = run_dir
    return train(built, as_json=args.json)


def _refuse_void(run: Run, changes: list[str]) -> None:
    """Refuse changes that would be recorded and have no effect, whatever is allowed.

    Raises:
        RecipeError: options of the optimizer or of a schedule differ; their values are part of the saved state.
    """
    providers = {i.active.name for hook in ("optimizer", "scheduler") for i in run.hooks.implementations(hook)}
    if void := [change for change in changes if change.startswith(tuple(f"plugins.{name}." for name in providers))]:
        raise RecipeError(
            f"{run.recipe.where}: {'; '.join(void)}: the checkpoint holds the optimizer and its schedules with the "
            "values they had, and a change would not reach them; undo it, or start a new run"
        )

"""``trainkit evaluate``: evaluate a run's checkpoint on one of its splits."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainkit.cli.output import number, print_json, printable, table, terminal
from trainkit.cli.run import refuse_meta
from trainkit.errors import RecipeError

HELP = "Evaluate a run's checkpoint on its test split, or another one."
EXAMPLES = """\
examples:
  trainkit evaluate runs/quickstart/20260101-120000-0
  trainkit evaluate runs/quickstart/20260101-120000-0 --checkpoint last plugins.cifar10.root=elsewhere
  trainkit evaluate runs/quickstart/20260101-120000-0 --split validation
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"], help="which weights (default: best)")
    parser.add_argument("--split", metavar="NAME", default="test", help="which images (default: test)")
    parser.add_argument("--allow-changes", action="store_true", help="evaluate although classes or code have changed")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Build the run's recipe again, load its weights, evaluate; say what differs from how they were trained.

    Raises:
        RecipeError: classes or code differ from those that the weights were trained with.
    """
    from trainkit import numerics
    from trainkit.recipe import load_recipe
    from trainkit.rundir import RunDir

    console = terminal(stderr=args.json)
    run_dir = RunDir(args.run_dir)
    recipe = load_recipe(run_dir.recipe_path(), args.overrides)
    refuse_meta(recipe)
    numerics.prepare(recipe)
    from trainkit import provenance  # these load torch, which reads the settings of numerics
    from trainkit.build import build
    from trainkit.session import evaluate

    state = run_dir.load_state(args.checkpoint)
    built = build(recipe, console=console)
    differences = provenance.compare_state(state, built)
    changes = [difference for difference in differences if difference.effect == "numbers"]
    if (grave := [str(change) for change in changes if change.is_of_meaning]) and not args.allow_changes:
        raise RecipeError(
            f"{args.run_dir}: its metrics would not mean what they meant in training: {'; '.join(grave)}; undo that, "
            "or pass --allow-changes"
        )
    if changes:
        note = f"not evaluated as it was trained: {'; '.join(map(str, changes))}"
        console.print(printable(note), markup=False, highlight=False, soft_wrap=True)
    built.load_state_dict(state)
    metrics = evaluate(built, args.split)
    if args.json:
        print_json({"checkpoint": args.checkpoint, "epoch": built.epoch, "split": args.split, **metrics})
        return 0
    rows = [(name, number(recipe.expect.get(name)), number(value)) for name, value in metrics.items()]
    console.print(table(["", "expected", f"{args.checkpoint}, epoch {built.epoch}"], rows, right=["expected"]))
    return 0

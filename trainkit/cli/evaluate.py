"""``trainkit evaluate``: evaluate a run's checkpoint on one of its splits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cli.output import add_allow_local, error, number, print_json, printable, table, terminal
from trainkit.cli.run import refuse_meta
from trainkit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit.run import Run

HELP = "Evaluate a run's checkpoint on its test split, or another one."
EXAMPLES = """\
examples:
  trainkit evaluate runs/quickstart/20260101-120000-0
  trainkit evaluate runs/quickstart/20260101-120000-0 --checkpoint last plugins.cifar10.root=elsewhere
  trainkit evaluate runs/quickstart/20260101-120000-0 --split validation --per-class
  trainkit evaluate runs/photos/20260101-120000-0 --images new
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of its recipe")
    parser.add_argument("--checkpoint", default="best", choices=["best", "last"], help="which weights (default: best)")
    parser.add_argument("--split", metavar="NAME", default="test", help="which images (default: test)")
    parser.add_argument("--data", metavar="ROOT", help="where the data lie, their plugin's option root")
    parser.add_argument("--images", metavar="DIR", type=Path, help="other images, in one folder a class; no data set")
    parser.add_argument("--per-class", action="store_true", help="each class, and what it is taken for")
    parser.add_argument("--allow-changes", action="store_true", help="evaluate although classes or code have changed")
    add_allow_local(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Build the run's recipe again, load its weights, evaluate; say what differs from how they were trained."""
    from trainkit import numerics
    from trainkit.recipe import data_root, load_recipe
    from trainkit.rundir import RunDir

    console = terminal(stderr=args.json)
    path = RunDir(args.run_dir).recipe_path()
    overrides = list(args.overrides)
    if args.images is not None and (args.data is not None or overrides):
        raise UsageError("--images: takes neither --data nor KEY=VALUE: the run's data set is not opened")
    recipe = load_recipe(path, overrides)
    if args.data is not None:
        overrides.append(data_root(recipe, args.data))
        recipe = load_recipe(path, overrides)
    refuse_meta(recipe)
    numerics.prepare(recipe)
    from trainkit.session import evaluate, open_checkpoint  # loads torch, which reads the settings of numerics

    if args.images is not None:
        return _evaluate_images(args, console)
    built = open_checkpoint(args.run_dir, args.checkpoint, overrides, allow_changes=args.allow_changes, console=console)
    metrics = evaluate(built, args.split)
    matrix = _confusion(built, args.split) if args.per_class else None
    if args.json:
        told = {"checkpoint": args.checkpoint, "epoch": built.epoch, "split": args.split, **metrics}
        if matrix is not None:
            told |= {"classes": list(built.data.classes), "confusion_matrix": matrix}
        print_json(told)
        return 0
    rows = [(name, number(recipe.expect.get(name)), number(value)) for name, value in metrics.items()]
    console.print(table(["", "expected", f"{args.checkpoint}, epoch {built.epoch}"], rows, right=["expected"]))
    if matrix is not None:
        console.print(_per_class(built.data.classes, matrix))
    return 0


def _evaluate_images(args: argparse.Namespace, console: Console) -> int:
    """Count what the network makes of images in folders of classes; 1 where some could not be read."""
    from trainkit.inference import count_images, load_model

    model = load_model(args.run_dir, args.checkpoint, console=console)
    bad: list[str] = []
    matrix: list[list[int]] = count_images(model, args.images, bad).tolist()
    for reason in bad:
        error(reason)
    total = sum(map(sum, matrix))
    accuracy = 100 * sum(row[n] for n, row in enumerate(matrix)) / total if total else None
    if args.json:
        told = {"checkpoint": args.checkpoint, "epoch": model.epoch, "images": total, "accuracy": accuracy}
        print_json({**told, "classes": list(model.classes), "confusion_matrix": matrix, "not_counted": len(bad)})
        return int(bool(bad))
    rows = [("images", number(total)), ("accuracy", number(accuracy))]
    console.print(table([printable(args.images), f"{args.checkpoint}, epoch {model.epoch}"], rows))
    if args.per_class:
        console.print(_per_class(model.classes, matrix))
    return int(bool(bad))


def _confusion(run: Run, split: str) -> list[list[int]]:
    from trainkit.inference import confusion_matrix

    if not run.data.has_class_targets:
        raise UsageError("--per-class: the targets of the data are no classes")
    matrix: list[list[int]] = confusion_matrix(run, split).tolist()
    return matrix


def _per_class(classes: Sequence[str], matrix: list[list[int]]) -> Any:
    """Return a table of what share of each class is right, and what it is taken for most often."""
    rows = []
    for n, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        total = sum(row)
        wrong = sorted(((count, m) for m, count in enumerate(row) if m != n and count), reverse=True)[:2]
        taken = ", ".join(f"{classes[m]} ({count})" for count, m in wrong)
        rows.append((name, number(total), number(100 * row[n] / total) if total else "-", taken))
    return table(["class", "images", "right, %", "else mostly taken for"], rows, right=["images", "right, %"])

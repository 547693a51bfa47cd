"""``trainkit resume``: continue a run from its last checkpoint, exactly."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cli.output import printable, terminal
from trainkit.cli.start import starting
from trainkit.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from trainkit.recipe import Recipe
    from trainkit.run import Run
    from trainkit.rundir import RunDir

HELP = "Continue a run from its last checkpoint, exactly."
EXAMPLES = """\
examples:
  trainkit resume runs/basic_se/20260101-120000-0
  trainkit resume runs/basic_se/20260101-120000-0 epochs=300
"""
LENGTH = ("epochs", "max_steps")
MAY_CHANGE = {"name", "description", "source", *LENGTH, "expect", "requires", "plugins"}


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
        from trainkit.cli.run import train
        from trainkit.recipe import load_recipe
        from trainkit.run import build
        from trainkit.rundir import RunDir
        from trainkit.trainer import provenance

        run_dir = RunDir(args.run_dir)
        recipe = load_recipe(run_dir.recipe_path(), args.overrides)
        state, notice = load_latest(run_dir)
        if notice:
            console.print(printable(notice), markup=False, highlight=False)
        built = build(recipe, console=console)
    changes = differences(state, recipe, provenance(built))
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
    before, after = ({k: plain.get(k) for k in LENGTH} for plain in (state["recipe"], recipe.to_dict()))
    length = _changed("", before, after)
    if length and built.schedules:
        note = f"{'; '.join(length)}: schedules keep the course that they began; a new run of that length may differ"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    built.resumed.append({"epoch": built.epoch, "step": built.step, "changes": changes + length})
    built.dir = run_dir
    return train(built, as_json=args.json)


def load_latest(run_dir: RunDir) -> tuple[dict[str, Any], str]:
    """Return the state of the last whole checkpoint, and what is to be said when that is not the last one."""
    try:
        return run_dir.load_state("last"), ""
    except CheckpointError as error:
        try:
            return run_dir.load_state("previous"), f"{error}; continuing from the one before it, previous.pt"
        except CheckpointError:
            raise error from None


def differences(state: Mapping[str, Any], recipe: Recipe, now: Mapping[str, Any]) -> list[str]:
    """Return what would keep a run from continuing exactly: each difference between then and now, in words."""
    found = _changed("", state["recipe"], recipe.to_dict(), skip=MAY_CHANGE)
    before = {p["name"]: p for p in state["provenance"]["plugins"]}
    after = {p["name"]: p for p in now["plugins"]}
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in after:
            found.append(f"plugins.{name} was dropped")
        elif name not in before:
            found.append(f"plugins.{name} was added")
        else:
            found += _changed(f"plugins.{name} ", before[name], after[name], skip={"options", "source"})
            found += _changed(f"plugins.{name}.", before[name]["options"], after[name]["options"])
    if not found and list(before) != list(after):
        found.append(f"the order of plugins was {', '.join(before)}")
    then_env, now_env = state["provenance"]["environment"], now["environment"]
    for key in ("packages", "data"):
        found += _changed(f"{key}.", then_env[key], now_env[key])
    for key in ("threads", "device"):
        found += _changed("", {key: then_env[key]}, {key: now_env[key]})
    return found


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


def _changed(
    prefix: str, before: Mapping[str, Any], after: Mapping[str, Any], skip: frozenset[str] | set[str] = frozenset()
) -> list[str]:
    keys = [k for k in {**before, **after} if k not in skip and before.get(k) != after.get(k)]
    return [f"{prefix}{k} was {before.get(k, 'absent')} and is {after.get(k, 'absent')}" for k in keys]

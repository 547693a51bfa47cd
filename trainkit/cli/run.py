"""``trainkit run``: train what a recipe describes."""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trainkit.cli.output import add_allow_local, number, print_json, printable, result_rows, table, terminal
from trainkit.errors import RecipeError, UsageError, did_you_mean
from trainkit.plugin import declared

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit.hooks import CallWrapper
    from trainkit.recipe import Recipe
    from trainkit.run import Run
    from trainkit.session import Result

HELP = "Train what a recipe describes."
EXAMPLES = """\
examples:
  trainkit run recipes/quickstart.yaml
  trainkit run recipes/basic_se.yaml epochs=5 plugins.cifar10.root=data plugins.se=false
  trainkit run recipes/dense_shared.yaml --dry-run
"""
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
    parser.add_argument("--run-dir", metavar="D", help="write here, in place of runs/<recipe>/<time>-<seed>")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as seed=N")
    parser.add_argument("--dry-run", action="store_true", help="check all, take two steps, leave nothing behind")
    parser.add_argument("--profile", action="store_true", help="print the time of each plugin in each hook")
    parser.add_argument("--trace-hooks", action="store_true", help="print every hook call")
    add_allow_local(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train, and print what was expected beside what was reached."""
    from trainkit import numerics
    from trainkit.recipe import load_recipe

    profile: dict[tuple[str, str], float] = {}
    overrides = [*args.overrides, *([f"seed={args.seed}"] if args.seed is not None else [])]
    console = terminal(stderr=args.json)
    recipe = load_recipe(_named(args.recipe, console), overrides)
    refuse_meta(recipe)
    numerics.prepare(recipe)
    from trainkit.build import build  # loads torch, which reads the settings of numerics

    built = build(recipe, console=console, wrap_call=_call_wrapper(args, profile, console), dry=args.dry_run)
    console = built.console
    if (earlier := _earlier_run(built, args.run_dir)) is not None:
        return _continue(earlier, built, as_json=args.json)
    for line in (*_missing_parts(built), *_since_recorded(built)):
        console.print(printable(line), **PLAIN)
    if args.dry_run:
        return _dry_run(built, as_json=args.json)
    code = train(built, args.run_dir, as_json=args.json)
    if args.profile:
        console.print(_profile_table(profile))
    return code


def _earlier_run(run: Run, run_dir: str | None) -> Path | None:
    """Return the directory of the run that these processes trained before they were started anew, or None.

    One that has no checkpoint yet begins again, and its directory is removed.
    """
    if not run.processes.restarted:
        return None
    given = run_dir or run.processes.earlier_run()

    def decide() -> str | None:
        path = Path(given) if given else None
        if path is None or not (path / "environment.json").exists():
            return None
        if (path / "checkpoints" / "last.pt").exists():
            return str(path)
        shutil.rmtree(path)
        return None

    found = run.processes.from_first(decide)
    return None if found is None else Path(found)


def _continue(path: Path, run: Run, *, as_json: bool) -> int:
    from trainkit.session import reopen

    run.console.print(printable(f"the processes were started anew; the run goes on in {path}"), **PLAIN)
    return train(reopen(path, console=run.console), as_json=as_json)


def _named(recipe: str, console: Console) -> Path:
    """Return a recipe's file: `quickstart`, where there is no such file, stands for `recipes/quickstart.yaml`."""
    path = Path(recipe)
    inside = Path("recipes") / f"{recipe}.yaml"
    if path.exists() or path.suffix or path.name != recipe or not inside.is_file():
        return path
    console.print(printable(f"recipe: {inside}"), **PLAIN)
    return inside


def refuse_meta(recipe: Recipe) -> None:
    """Refuse torch's device without memory, on which nothing is computed.

    Raises:
        RecipeError: it is the recipe's device.
    """
    if recipe.device.partition(":")[0] == "meta":
        raise RecipeError(
            f"{recipe.where}: device: 'meta' holds no numbers, so nothing would be trained; use cpu or auto"
        )


def _missing_parts(run: Run) -> Iterator[str]:
    """Yield a warning for each thing that people expect of a run and that no plugin of the recipe does."""
    plugins = run.hooks.plugins.values()
    claimed = {slot for plugin in plugins for slot in declared(type(plugin.instance), "claims")}
    logging = [
        implementation.plugin
        for implementation in run.hooks.implementations("log")
        if "terminal" not in declared(type(implementation.plugin.instance), "claims")
    ]
    if "checkpoints" not in claimed:
        yield "warning: nothing is saved: the recipe lists no plugin that saves checkpoints; the weights will be lost"
    if not logging:
        yield "warning: nothing is logged: the recipe lists no plugin that keeps records"
    if "terminal" not in claimed:
        yield "warning: nothing is shown until the end: the recipe lists no plugin that shows progress"


def _since_recorded(run: Run) -> Iterator[str]:
    """Yield what differs from the record of the run whose directory the recipe lies in, if it lies in one."""
    from trainkit import provenance
    from trainkit.recipe import load_recipe
    from trainkit.rundir import RunDir

    path = run.recipe.path
    if path is None or path.name != "recipe.yaml" or not (path.parent / "plugins.lock.json").exists():
        return
    try:
        recorded = provenance.read(RunDir(path.parent), load_recipe(path))
        differences = provenance.compare(recorded, provenance.record(run))
    except UsageError as problem:
        yield f"not compared with the run that the recipe is of: {problem}"
        return
    if changes := [str(difference) for difference in differences if difference.effect == "numbers"]:
        yield f"not as {path.parent} was recorded, so its numbers may differ: {'; '.join(changes)}"


def train(run: Run, run_dir: str | None = None, *, as_json: bool) -> int:
    """Fit a run, print how it ended and return its exit code; a run that fails says how to continue it, if it can."""
    from trainkit.session import fit

    try:
        result = fit(run, run_dir)
    except BaseException:
        if run.dir is not None and (run.dir.path / "checkpoints" / "last.pt").exists():
            run.console.print(f"continue with: {_resume_command(run.dir.path)}", **PLAIN)
        raise
    if run.rank == 0:
        _report(result, run.console, as_json=as_json)
    return run.exit_code


def _resume_command(path: Path) -> str:
    name = f"./{path}" if str(path).startswith("-") else str(path)  # it is no option
    return f"trainkit resume {shlex.quote(printable(name))}"


def _report(result: Result, console: Console, *, as_json: bool) -> None:
    if as_json:
        print_json({**result.to_dict(), "run_dir": str(result.path)})
    else:
        columns = ["", "expected", "reached", "best"]
        console.print(table(columns, result_rows(result), right=columns[1:]))
        speed = f", {result.images_per_second:,.0f} images/s" if result.images_per_second else ""
        console.print(f"{result.status} in {result.seconds['total']:.1f} s{speed}", highlight=False)
        assert result.path is not None
        pictures = sorted(p for p in (result.path / "figures").glob("*.png"))
        for path in [result.path, *pictures]:
            console.print(printable(path), **PLAIN)
    if result.status == "completed" and result.reason:
        console.print(printable(result.reason), **PLAIN)
    if result.status == "stopped":
        assert result.path is not None
        saved = (result.path / "checkpoints" / "last.pt").exists()
        cure = (
            f"continue with: {_resume_command(result.path)}"
            if saved
            else "not saved: its recipe lists no plugin that saves checkpoints"
        )
        console.print(f"stopped by {printable(result.reason)}; {cure}", **PLAIN)


def _dry_run(trial: Run, *, as_json: bool) -> int:
    from trainkit.session import fit

    with tempfile.TemporaryDirectory() as folder:
        result = fit(trial, folder, max_steps=2, eval_batches=1)
    reported = ["parameters", *result.final]
    for name in result.expected:
        if name not in reported:
            near = did_you_mean(name, reported) or f"; reported are {', '.join(reported)}"
            raise RecipeError(f"{trial.recipe.where}: expect.{name}: no plugin of the recipe reports it{near}")
    order = trial.hooks.order()
    if trial.rank > 0:
        return 0
    if as_json:
        print_json({"hooks": order, "parameters": result.parameters, "steps": result.steps})
        return 0
    trial.console.print(table(["hook", "kind", "plugins, in call order"], [(h, k, ", ".join(p)) for h, k, p in order]))
    images = ", ".join(f"{len(split):,} {name}" for name, split in trial.data.splits.items())
    trial.console.print(
        f"dry run passed on {trial.device}: {images} images, {number(result.parameters)} parameters, "
        f"{result.steps} steps and one {trial.selection_split} batch taken, nothing written",
        **PLAIN,
    )
    return 0


def _call_wrapper(
    args: argparse.Namespace, seconds: dict[tuple[str, str], float], console: Console
) -> CallWrapper | None:
    def wrap(call: Callable[..., Any], plugin: str, hook: str) -> Callable[..., Any]:
        def wrapped(*values: Any) -> Any:
            if args.trace_hooks:
                console.print(f"{hook} {plugin}", markup=False, highlight=False)
            start = perf_counter()
            try:
                return call(*values)
            finally:
                seconds[plugin, hook] = seconds.get((plugin, hook), 0.0) + perf_counter() - start

        return wrapped

    return wrap if args.profile or args.trace_hooks else None


def _profile_table(seconds: dict[tuple[str, str], float]) -> Any:
    rows = [(plugin, hook, f"{s:.3f}") for (plugin, hook), s in sorted(seconds.items(), key=lambda item: -item[1])]
    return table(["plugin", "hook", "seconds"], rows, right=["seconds"])

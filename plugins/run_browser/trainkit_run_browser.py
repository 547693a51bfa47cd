"""List, show and compare runs: what was reached, and what produced it."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.cli.output import error, number, print_json, table
from trainkit.errors import TrainkitError, UsageError
from trainkit.rundir import RunDir

__all__ = ["COMPARE", "LIST", "SHOW"]

FILES = {"recipe.yaml": dict, "result.json": dict, "plugins.lock.json": list, "environment.json": dict}
METRIC = "test_accuracy"  # what the listing shows of a run


class _Command(NamedTuple):
    look: Callable[[Any, list[str]], tuple[Any, list[Any]]]  # returns a JSON document, and tables of the same
    folders: dict[str, Any]  # what argparse is told of the folders that it takes
    EXAMPLES: str

    @property
    def HELP(self) -> str:  # noqa: N802
        return self.look.__doc__ or ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folders", type=Path, **self.folders)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from rich.console import Console

        broken: list[str] = []  # a line for each file that cannot be read
        document, tables = self.look(args.folders, broken)
        if args.json:
            print_json(document)
        else:
            Console().print(*tables)
        for line in broken:
            error(line)
        return 1 if broken else 0


def _list(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    """List the runs of a folder, the newest first."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that holds runs")
    # runs/<recipe>/<time>-<seed>; a level less in one recipe's folder, or where --run-dir put runs
    marks = [p for at in ("*", "*/*") for f in ("recipe.yaml", "result.json") for p in folder.glob(f"{at}/{f}")]
    marks.sort(key=lambda p: (p.stat().st_mtime, p), reverse=True)
    # not the recipe: it takes far longer to read, and a result repeats what it expects
    runs = [_read(run, ["result.json"], broken) for run in dict.fromkeys(p.parent for p in marks)]
    keys = ["status", "epochs", f"final.{METRIC}", f"best.{METRIC}.value", f"expected.{METRIC}", "seconds.total"]
    rows = [(run["run"], *(_cell(_flat(run["result.json"]).get(key)) for key in keys)) for run in runs]
    columns = ["run", "status", "epochs", METRIC, "best", "expected", "seconds"]
    made = table(columns, rows, right=columns[2:])
    made.columns[0].no_wrap = True  # a path to copy
    return runs, [made]


def _show(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    """Show one run: what it reached, what produced it, and its files."""
    document, tables = _compare([folder], broken)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    rows = [(name, number(size)) for name, size in files.items()]
    return {**document, "files": files}, [*tables, table(["file", "bytes"], rows, right=["bytes"])]


def _compare(folders: list[Path], broken: list[str]) -> tuple[Any, list[Any]]:
    """Compare runs: results side by side, then only what differs in what produced them."""
    runs = [_read(folder, FILES, broken) for folder in folders]
    results = _beside([{"run": run["run"], **_flat(run["result.json"])} for run in runs])
    # what is expected of a metric stands beside what was reached
    metrics = list(dict.fromkeys(map(_metric, results)))
    results = {key: results[key] for key in sorted(results, key=lambda key: metrics.index(_metric(key)))}
    made_by = _beside([_made_by(run) for run in runs])
    if len(runs) > 1:
        made_by = {key: values for key, values in made_by.items() if any(v != values[0] for v in values)}
    tables = [
        table([title, *("" for _ in runs)], [(key, *map(_cell, values)) for key, values in rows.items()])
        for title, rows in (("result", results), ("made by" if len(runs) == 1 else "difference", made_by))
    ]
    return {"results": results, "made_by": made_by}, tables


def _metric(key: str) -> str:
    return key.split(".")[1] if key.startswith(("final.", "best.", "expected.")) else key


def _read(folder: Path, names: Iterable[str], broken: list[str]) -> dict[str, Any]:
    """Return what files of a run hold, by name; one that is broken is empty."""
    from trainkit.recipe import load_recipe

    read: dict[str, Any] = {"run": str(folder)}
    for name, run_dir in ((name, RunDir(folder)) for name in names):
        path = run_dir.recipe_path() if name == "recipe.yaml" else folder / name
        if name == "result.json" and not path.exists():
            read[name] = _so_far(folder, broken)
            continue
        try:
            read[name] = load_recipe(path).to_dict() if name == "recipe.yaml" else run_dir.read_json(name)
            if not isinstance(read[name], FILES[name]):
                raise UsageError(f"{path}: not the file of a run: it holds a {type(read[name]).__name__}")
        except TrainkitError as problem:
            broken.append(str(problem))
            read[name] = FILES[name]()
    return read


def _so_far(folder: Path, broken: list[str]) -> dict[str, Any]:
    """Return what stands for the result of a run that has none: what its table of epochs says."""
    expected = _read(folder, ["recipe.yaml"], broken)["recipe.yaml"].get("expect", {})
    table = folder / "metrics.csv"
    with ...


def _made_by(run: dict[str, Any]) -> dict[str, Any]:
    """Return what produced a run's numbers, by dotted key: recipe, plugins with versions and options, environment."""
    locked = [p for p in run["plugins.lock.json"] if isinstance(p, dict)]
    plugins = {
        p.get("name"): {"from": f"{p.get('distribution')} {p.get('version')} ({p.get('source')})", "options": p.get("options")}
        for p in locked
    }
    order = {"order": ", ".join(map(str, plugins))}
    return _flat({**run["recipe.yaml"], "plugins": order | plugins, "environment": run["environment.json"]})

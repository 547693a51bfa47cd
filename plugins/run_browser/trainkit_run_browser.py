"""List, show and compare runs: what was reached, and what produced it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

from trainkit.cli.output import error, number, print_json, printable, table
from trainkit.errors import TrainkitError, UsageError
from trainkit.rundir import RunDir

__all__ = ["COMPARE", "LIST", "SHOW"]

FILES = {"recipe.yaml": dict, "result.json": dict, "plugins.lock.json": list, "environment.json": dict}
METRIC = "test_accuracy"  # what the listing shows of a run


@attrs.frozen
class _Command:
    HELP: str
    EXAMPLES: str
    folders: dict[str, Any]  # what argparse is told of the folders that it takes
    look: Callable[[Any, list[str]], tuple[Any, list[Any]]]  # returns a JSON document, and tables of the same

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folders", type=Path, **self.folders)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from rich.console import Console

        broken: list[str] = []
        document, tables = self.look(args.folders, broken)
        if args.json:
            print_json(document)
        else:
            Console().print(*tables)
        for line in broken:
            error(line)
        return 1 if broken else 0


def _list(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that holds runs")
    # runs/<recipe>/<time>-<seed>; a level less in one recipe's folder, or where --run-dir put runs
    marks = [p for at in ("*", "*/*") for f in ("recipe.yaml", "result.json") for p in folder.glob(f"{at}/{f}")]
    marks.sort(key=lambda p: (p.stat().st_mtime, p), reverse=True)
    # not the recipe: it takes far longer to read, and a result repeats what it expects
    found = {str(run): _read(run, ["result.json"], broken) for run in dict.fromkeys(p.parent for p in marks)}
    flat = {run: _flat(read["result.json"]) for run, read in found.items()}
    keys = ["status", "epochs", f"final.{METRIC}", f"best.{METRIC}.value", f"expected.{METRIC}", "seconds.total"]
    rows = [(run, *(_cell(facts.get(key)) for key in keys)) for run, facts in flat.items()]
    columns = ["run", "status", "epochs", METRIC, "best", "expected", "seconds"]
    made = table(columns, rows, right=columns[2:])
    made.columns[0].no_wrap = True  # a path to copy
    return [{"run": run, **read["result.json"]} for run, read in found.items()], [made]


def _show(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    document, tables = _compare([folder], broken)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    rows = [(name, number(size)) for name, size in files.items()]
    return {**document, "files": files}, [*tables, table(["file", "bytes"], rows, right=["bytes"])]


def _compare(folders: list[Path], broken: list[str]) -> tuple[Any, list[Any]]:
    from rich.markup import escape

    runs = [_read(folder, FILES, broken) for folder in folders]
    results = _beside([_flat(run["result.json"]) for run in runs])
    made_by = _beside([_made_by(run) for run in runs])
    if len(runs) > 1:
        made_by = {key: values for key, values in made_by.items() if any(v != values[0] for v in values)}
    # what is expected of a metric stands beside what was reached
    metrics = list(dict.fromkeys(_metric(key) for key in results))
    results = {key: results[key] for key in sorted(results, key=lambda key: metrics.index(_metric(key)))}
    heads = [escape(printable(folder)) for folder in folders]
    tables = [
        table([title, *heads], [(key, *map(_cell, values)) for key, values in rows.items()])
        for title, rows in (("result", results), ("made by" if len(runs) == 1 else "difference", made_by))
    ]
    return {"runs": [str(folder) for folder in folders], "results": results, "made_by": made_by}, tables


def _metric(key: str) -> str:
    return key.split(".")[1] if key.startswith(("expected.", "final.", "best.")) else key


def _read(folder: Path, names: Iterable[str], broken: list[str]) -> dict[str, Any]:
    """Return what files of a run hold, by name; a broken one is told of, and empty."""
    from trainkit.recipe import load_recipe

    run_dir, read = RunDir(folder), dict[str, Any]()
    for name in names:
        try:
            value = load_recipe(run_dir.recipe_path()).to_dict() if name == "recipe.yaml" else run_dir.read_json(name)
            if not isinstance(value, FILES[name]):
                raise UsageError(f"{folder / name}: not the file of a run: it holds a {type(value).__name__}")
        except TrainkitError as problem:
            value = FILES[name]()
            if name == "result.json" and not (folder / name).exists():
                value = {"status": "running or killed"}
            else:
                broken.append(str(problem))
        read[name] = value
    return read


def _made_by(run: dict[str, Any]) -> dict[str, Any]:
    """Return what produced a run's numbers, by dotted key: recipe, plugins with versions and options, environment."""
    recipe = {key: value for key, value in run["recipe.yaml"].items() if key != "plugins"}
    plugins = [p for p in run["plugins.lock.json"] if isinstance(p, dict)]
    facts = {**_flat(recipe), "plugins": ", ".join(str(p.get("name")) for p in plugins)}
    for p in plugins:
        key = f"plugins.{p.get('name')}"
        facts[key] = f"{p.get('distribution')} {p.get('version')} ({p.get('source')})"
        facts |= _flat(p.get("options"), f"{key}.")
    return facts | _flat(run["environment.json"], "environment.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _beside(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [column.get(key) for column in columns] for key in dict.fromkeys(k for c in columns for k in c)}


def _cell(value: Any) -> str:
    return number(value) if value is None or isinstance(value, int | float) else str(value)


LIST = _Command(
    "List the runs of a folder, the newest first.",
    "examples:\n  trainkit runs list\n  trainkit runs list runs/basic_se --json\n",
    {"metavar": "FOLDER", "nargs": "?", "default": Path("runs"), "help": "default: runs"},
    _list,
)
SHOW = _Command(
    "Show one run: what it reached, what produced it, and its files.",
    "examples:\n  trainkit runs show runs/quickstart/20260101-120000-0\n",
    {"metavar": "RUN_DIR", "help": "the directory of a run"},
    _show,
)
COMPARE = _Command(
    "Compare runs: results side by side, then only what differs in what produced them.",
    "examples:\n  trainkit runs compare runs/basic_se/20260101-120000-0 runs/basic_se/20260102-120000-1\n",
    {"metavar": "RUN_DIR", "nargs": "+", "help": "the directories of runs"},
    _compare,
)

"""List, show and compare runs: what was reached, and what produced it."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainkit.cli.output import error, number, print_json, table, terminal
from trainkit.errors import TrainkitError, UsageError
from trainkit.rundir import RunDir

__all__ = ["COMPARE", "LIST", "SHOW"]

FILES = ("recipe.yaml", "result.json", "plugins.lock.json", "environment.json")
METRIC = "test_accuracy"  # what the listing shows of a run
UNFINISHED = "running or killed"


class _Command(NamedTuple):
    HELP: str
    EXAMPLES: str
    folders: dict[str, Any]  # what argparse is told of the folders that it takes
    look: Callable[[Any, list[str]], tuple[Any, list[Any]]]  # returns a JSON document, and tables of the same

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folders", type=Path, **self.folders)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        broken: list[str] = []  # a line for each file that cannot be read
        document, tables = self.look(args.folders, broken)
        if args.json:
            print_json(document)
        else:
            terminal().print(*tables)
        for line in dict.fromkeys(broken):
            error(line)
        return 1 if broken else 0


def _list(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that holds runs")
    # runs/<recipe>/<time>-<seed>; a level less in one recipe's folder, or where --run-dir put runs
    marks = [p for at in ("*", "*/*") for f in ("recipe.yaml", "result.json") for p in folder.glob(f"{at}/{f}")]
    marks.sort(key=lambda p: (p.stat().st_mtime, p), reverse=True)
    # not the recipe: it takes far longer to read, and a result repeats what it expects
    runs = [_read(run, ["result.json"], broken) for run in dict.fromkeys(p.parent for p in marks)]
    results = [{"run": run["run"], **_flat(run["result.json"])} for run in runs]
    keys = ["run", "status", "epochs", f"final.{METRIC}", f"best.{METRIC}.value", f"expected.{METRIC}", "seconds.total"]
    columns = ["run", "status", "epochs", "final", "best", "expected", "seconds"]
    made = table(columns, [[_cell(result.get(key)) for key in keys] for result in results], right=columns[2:])
    made.columns[0].no_wrap = True  # a path to copy
    made.caption = f"final, best and expected {METRIC}"
    return runs, [made]


def _show(folder: Path, broken: list[str]) -> tuple[Any, list[Any]]:
    run = _read(folder, FILES, broken)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    columns = ["version", "source", "options"]
    plugins = [(name, *(_cell(p.get(c)) for c in columns)) for name, p in run["plugins.lock.json"].items()]
    facts = _flat({**run["recipe.yaml"], "plugins": {}, "environment": run["environment.json"]})
    return {**run, "files": files}, [
        table(["result", ""], [(key, _cell(value)) for key, value in _results(run).items()]),
        table(["plugin", *columns], plugins),
        table(["made by", ""], [(key, _cell(value)) for key, value in facts.items()]),
        table(["file", "bytes"], [(name, number(size)) for name, size in files.items()], right=["bytes"]),
    ]


def _compare(folders: list[Path], broken: list[str]) -> tuple[Any, list[Any]]:
    runs = [_read(folder, FILES, broken) for folder in folders]
    results, sources = _beside([*map(_results, runs)]), _beside([*map(_sources, runs)])
    differences = {key: values for key, values in sources.items() if any(v != values[0] for v in values)}
    tables = [
        table([title, *("" for _ in runs)], [(key, *map(_cell, values)) for key, values in rows.items()])
        for title, rows in (("result", results), ("difference", differences or {"none": [""] * len(runs)}))
    ]
    return {"results": results, "differences": differences}, tables


def _read(folder: Path, names: Iterable[str], broken: list[str]) -> dict[str, Any]:
    """Return what files of a run hold, by name; one that is broken is empty."""
    from trainkit.recipe import load_recipe

    read: dict[str, Any] = {"run": str(folder)}
    for name in names:
        path = RunDir(folder).recipe_path() if name == "recipe.yaml" else folder / name
        if name == "result.json" and not path.exists():
            read[name] = _so_far(folder, broken)
            continue
        try:
            value: Any = load_recipe(path).to_dict() if name == "recipe.yaml" else RunDir(folder).read_json(name)
            read[name] = {p["name"]: dict(p) for p in value} if name == "plugins.lock.json" else dict(value)
        except (TrainkitError, KeyError, TypeError, ValueError) as problem:  # JSON of another shape, the latter three
            broken.append(f"{path}: " + str(problem).removeprefix(f"{path}: "))
            read[name] = {}
    return read


def _so_far(folder: Path, broken: list[str]) -> dict[str, Any]:
    """Return what stands for the result of a run that has none: what its table of epochs says."""
    expected = _read(folder, ["recipe.yaml"], broken)["recipe.yaml"].get("expect", {})
    rows: list[dict[str, float]] = [{}]
    with suppress(OSError, ValueError, TypeError), (folder / "metrics.csv").open(newline="") as file:
        rows += [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    top = max(rows, key=lambda row: row.get(METRIC, 0))
    best = {METRIC: {"value": top.get(METRIC), "epoch": top.get("epoch")}}
    return {"status": UNFINISHED, "epochs": len(rows) - 1, "final": rows[-1], "best": best, "expected": expected}


def _results(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's result by dotted key, what is expected of a metric beside what was reached."""
    flat = _flat({"run": run["run"], **run["result.json"]})
    metrics = ("final.", "best.", "expected.")
    return dict(sorted(flat.items(), key=lambda kv: kv[0].split(".")[1:2] if kv[0].startswith(metrics) else []))


def _sources(run: dict[str, Any]) -> dict[str, Any]:
    plugins = {"order": list(run["plugins.lock.json"]), **run["plugins.lock.json"]}
    changes = [change for resumed in run["result.json"].get("resumed", []) for change in resumed["changes"]]
    made = {"plugins": plugins, "environment": run["environment.json"], "resumed": changes}
    return _flat({**run["recipe.yaml"], **made})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _beside(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [column.get(key) for column in columns] for key in dict.fromkeys(k for c in columns for k in c)}


def _cell(value: Any) -> str:
    return number(value) if type(value) in (int, float, type(None)) else str(value)


_RUN = {"metavar": "RUN_DIR", "help": "the directory of a run"}
_RUNS = {"metavar": "FOLDER", "nargs": "?", "default": Path("runs"), "help": "default: runs"}
LIST = _Command("List runs, newest first.", "examples:\n  trainkit runs list\n", _RUNS, _list)
SHOW = _Command("Show one run.", "examples:\n  trainkit runs show runs/se/20260101-120000-0\n", _RUN, _show)
COMPARE = _Command("Compare runs.", "examples:\n  trainkit runs compare runs/se/*\n", {**_RUN, "nargs": "+"}, _compare)

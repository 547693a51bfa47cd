"""Verify a run directory: each file whole, and whether it would resume exactly."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainkit.cli.output import print_json, printable, table, terminal
from trainkit.errors import TrainkitError, UsageError
from trainkit.registry import installed
from trainkit.rundir import RunDir

__all__ = ["EXAMPLES", "HELP", "Finding", "add_arguments", "run"]

HELP = "Verify a run directory: each file whole, and whether it would resume exactly."
EXAMPLES = "examples:\n  trainkit runs check runs/basic_se/20260101-120000-0\n"
CHECKPOINTS = ("checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt")


class Finding(NamedTuple):
    """What came of one part of a run directory."""

    what: str
    verdict: Literal["whole", "absent", "broken", "differs"]
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print a finding for each part, then the answer; return 0 if all is whole and the run would resume exactly."""
    run_dir = RunDir(args.run_dir)
    run_dir.recipe_path()
    findings = [*_files(run_dir), *_plugins(run_dir)]
    reasons, position = _resume(run_dir)
    whole, exact = all(f.verdict in ("whole", "absent") for f in findings), not reasons
    answer = f"would resume exactly, from {position}" if exact else f"would not: {'; '.join(reasons)}"
    if args.json:
        print_json({"findings": [f._asdict() for f in findings], "whole": whole, "exact": exact, "answer": answer})
    else:
        terminal().print(table(Finding._fields, findings))
        terminal().print(printable(answer), markup=False, highlight=False, soft_wrap=True)
    return 0 if whole and exact else 1


def _files(run_dir: RunDir) -> Iterator[Finding]:
    from trainkit.recipe import load_recipe

    checks: dict[str, Callable[[Path], str]] = {
        "recipe.yaml": lambda path: f"{load_recipe(path).epochs} epochs",
        "plugins.lock.json": lambda path: f"{len([p['name'] for p in _json(path)])} plugins",
        "environment.json": lambda path: f"device {_json(path)['device']}",
        "result.json": lambda path: str(_json(path)["status"]),
        "metrics.jsonl": _records,
        "metrics.csv": _epochs,
        **dict.fromkeys(CHECKPOINTS, lambda path: _position(run_dir.load_state(path.stem))),
    }
    for name, check in checks.items():
        path = run_dir.path / name
        if not path.exists() and name not in ("plugins.lock.json", "environment.json"):
            yield Finding(name, "absent", "the run goes on, or was killed" if name == "result.json" else "")
            continue
        try:
            yield Finding(name, "whole", check(path))
        except (KeyError, TypeError) as error:  # JSON of another shape
            yield Finding(name, "broken", f"not what a run writes there: {error!r}")
        except (TrainkitError, OSError, ValueError, csv.Error) as error:
            yield Finding(name, "broken", str(error).removeprefix(f"{path}: "))


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _records(path: Path) -> str:
    last = {"epoch": 0, "step": 0}
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else {}
            back = [key for key in ("epoch", "step") if record[key] < last[key]]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"line {number} is cut short, or not a record") from error
        if back:
            raise UsageError(f"line {number}: {back[0]} {record[back[0]]} comes after {last[back[0]]}")
        last = record
    return f"{len(lines)} records, to epoch {last['epoch']}, step {last['step']}"


def _epochs(path: Path) -> str:
    text = path.read_text()
    header, *rows = csv.reader(text.splitlines())
    numbers = [[float(cell or "nan") for cell in row] for row in rows]
    if not text.endswith("\n") or any(len(row) != len(header) or row[:1] != [n] for n, row in enumerate(numbers, 1)):
        raise UsageError(f"cut short, or its rows are not epochs 1 to {len(rows)}, whole")
    return f"{len(rows)} epochs"


def _position(state: dict[str, Any]) -> str:
    return "epoch {epoch}, batch {batch_index}, step {step}".format(**state["position"])


def _plugins(run_dir: RunDir) -> Iterator[Finding]:
    try:
        locked = {p["name"]: f"{p['distribution']} {p['version']}" for p in _json(run_dir.path / "plugins.lock.json")}
    except (OSError, KeyError, TypeError, ValueError):  # has its finding already
        return
    have = installed()
    for name, then in locked.items():
        now = " and ".join(f"{found.distribution} {found.version}" for found in have.get(name, []))
        if now != then:
            yield Finding(f"plugin {name}", "differs", f"was {then}, is {now or 'not installed'}")


def _resume(run_dir: RunDir) -> tuple[list[str], str]:
    """Return what keeps the run from resuming exactly, and from where it would resume."""
    from rich.console import Console

    from trainkit import provenance
    from trainkit.recipe import load_recipe
    from trainkit.run import build

    try:
        with run_dir.exclusive():  # a run that goes on cannot be resumed
            recipe = load_recipe(run_dir.recipe_path())
            state, notice = run_dir.load_latest()
            built = build(recipe, console=Console(quiet=True))
            found = provenance.compare(state["provenance"], provenance.record(built))
            reasons = [str(difference) for difference in found if difference.effect == "numbers"]
            built.load_state_dict(state)
        # a checkpoint counts the rows that metric_log wrote before it, and resuming needs them
        counted = state["plugins"].get("metric_log", {"state": {"rows": 0}})["state"]["rows"]
        log = run_dir.path / "metrics.jsonl"
        rows = log.read_bytes().count(b"\n") if log.exists() else 0
        if rows < counted:
            reasons.append(f"metrics.jsonl has {rows} rows and the checkpoint counted {counted}")
    except Exception as error:  # whatever a plugin or a strange checkpoint raises is the answer
        return [str(error) if isinstance(error, TrainkitError) else f"{type(error).__name__}: {error}"], ""
    return reasons, _position(state) + (f" ({notice})" if notice else "")

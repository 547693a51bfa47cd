"""List, show, compare and check runs: what was reached, what produced it, and whether it can be continued exactly.

``list``, ``show`` and ``compare`` read files alone: no plugin of a run need be installed, and torch is not imported.
``check`` builds the run again, as ``trainkit resume`` would.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import field

from trainkit import provenance
from trainkit.cli.output import error, number, print_json, printable, table, terminal
from trainkit.errors import TrainkitError, UsageError
from trainkit.registry import installed
from trainkit.rundir import RunDir, parse_json

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

__all__ = ["CHECK", "COMPARE", "LIST", "SHOW", "Finding", "StoredRun"]

METRIC = "test_accuracy"
UNFINISHED = "running or killed"


# ---- what the files of a run hold


@attrs.define
class StoredRun:
    """What the files of a run hold, each read once. A file that cannot be read counts as empty, and is a problem.

    Args:
        folder: the run directory.
        problems: a line for each file that could not be read.
    """

    folder: Path
    problems: list[str] = field(factory=list, init=False)

    @cached_property
    def loaded(self) -> Recipe | None:
        """The resolved recipe, or None where it cannot be read."""
        from trainkit.recipe import load_recipe

        path = RunDir(self.folder).recipe_path()
        recipe: Recipe | None = self._read(path, lambda: load_recipe(path))
        return recipe

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return self.loaded.to_dict() if self.loaded else {}

    @cached_property
    def plugins(self) -> list[dict[str, Any]]:
        """What is recorded of each plugin, in call order."""
        return self._read_json("plugins.lock.json", plugins_from_json) or []

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What else the numbers depend on."""
        return self._read_json("environment.json", mapping_from_json) or {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is recorded of the data set."""
        return self._read_json("data.json", mapping_from_json) or {}

    @cached_property
    def result(self) -> dict[str, Any]:
        """How the run ended and what it reached; for one that has not ended, what it has reached so far."""
        if not (self.folder / "result.json").exists():
            return self._result_so_far()
        return self._read_json("result.json", mapping_from_json) or {}

    def record(self) -> dict[str, Any]:
        """Return what the run's numbers depend on."""
        return provenance.from_files(self.loaded, self.plugins, self.environment, self.data)

    def files(self) -> dict[str, int]:
        """Return the size of each file, by path."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def _result_so_far(self) -> dict[str, Any]:
        epochs = epochs_of(self.folder / "metrics.csv")
        with_metric = [epoch for epoch in epochs if METRIC in epoch]
        best = max(with_metric, key=lambda epoch: epoch[METRIC], default={})
        return {
            "status": UNFINISHED,
            "epochs": len(epochs),
            "final": epochs[-1] if epochs else {},
            "best": {METRIC: {"value": best.get(METRIC), "epoch": best.get("epoch")}},
            "expected": self.recipe.get("expect", {}),
        }

    def _read_json(self, name: str, convert: Callable[[Any], Any]) -> Any:
        return self._read(self.folder / name, lambda: convert(RunDir(self.folder).read_json(name)))

    def _read(self, path: Path, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (TrainkitError, TypeError, ValueError) as problem:
            self.problems.append(f"{path}: " + str(problem).removeprefix(f"{path}: "))
            return None


def mapping_from_json(value: Any) -> dict[str, Any]:
    """Return a JSON value that must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def plugins_from_json(value: Any) -> list[dict[str, Any]]:
    """Return a JSON value that must be a list of objects with a name."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list of plugins, got {type(value).__name__}")
    for item in value:
        if not (isinstance(item, dict) and isinstance(item.get("name"), str)):
            raise ValueError("expected a name in every plugin's entry")
    return value


def epochs_of(path: Path) -> list[dict[str, float]]:
    """Return the rows of a table of epochs, without empty cells; none where there is no such table."""
    try:
        rows = csv.DictReader(io.StringIO(RunDir(path.parent).read_log(path.name).decode(), newline=""))
        return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
    except (
        OSError,
        ValueError,
        TypeError,
        csv.Error,
    ):  # not there yet, or no table of numbers
        return []


def find_runs(folder: Path) -> list[Path]:
    """Return the run directories in a folder and in its folders, the one written to last first.

    The default is ``runs/<recipe>/<time>-<seed>``; ``--run-dir`` and the folder of one recipe are a level less.
    """
    written: dict[Path, float] = {}
    for depth in ("*", "*/*"):
        for name in ("recipe.yaml", "result.json"):
            for path in folder.glob(f"{depth}/{name}"):
                with suppress(OSError):  # a link that leads nowhere
                    written[path.parent] = max(path.stat().st_mtime, written.get(path.parent, 0.0))
    return sorted(written, key=lambda run: (written[run], run), reverse=True)


# ---- facts as tables


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def result_facts(run: StoredRun) -> dict[str, Any]:
    """Return a run's result by dotted key; what is expected of a metric stands beside what was reached.

    Evidence is left out: hashes, which ``trainkit verify`` checks, and which always differ between runs.
    """
    result = {name: value for name, value in run.result.items() if name != "evidence"}
    facts = flat({"run": str(run.folder), **result})
    by_metric: dict[str, list[str]] = {}
    for key in facts:
        part, _, metric = key.partition(".")
        if part in ("final", "best", "expected"):
            by_metric.setdefault(metric.partition(".")[0], []).append(key)
    metrics = [key for metric in sorted(by_metric) for key in by_metric[metric]]
    others = [key for key in facts if key not in metrics]
    return {key: facts[key] for key in [*others, *metrics]}


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number or value is None else str(value)


def side_by_side(title: str, rows: Mapping[str, Sequence[Any]], columns: int) -> Any:
    """Return a table with a row a key and a column a run."""
    cells = [[key, *(cell(value) for value in values)] for key, values in rows.items()]
    return table([title, *[""] * columns], cells)


def print_facts(args: argparse.Namespace, document: Any, tables: Iterable[Any], runs: Iterable[StoredRun]) -> int:
    """Print a document as JSON, or tables of the same, and then what could not be read; return the exit code."""
    if args.json:
        print_json(document)
    else:
        terminal().print(*tables)
    problems = [problem for run in runs for problem in run.problems]
    for problem in problems:
        error(problem)
    return 1 if problems else 0


# ---- the commands


class ListRuns:
    """``trainkit runs list``."""

    HELP = "List runs, newest first."
    EXAMPLES = "examples:\n  trainkit runs list\n  trainkit runs list runs/basic_se\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument(
            "folder", metavar="FOLDER", nargs="?", default=Path("runs"), type=Path, help="default: runs"
        )
        parser.add_argument("--metric", default=METRIC, metavar="NAME", help=f"which to show (default: {METRIC})")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a row for each run."""
        if not args.folder.is_dir():
            raise UsageError(f"{args.folder}: no such folder; give the one that holds runs")
        runs = [StoredRun(folder) for folder in find_runs(args.folder)]
        # The recipe is not read: that takes far longer, and a result repeats what its recipe expects.
        document = [{"run": str(run.folder), "result.json": run.result} for run in runs]
        return print_facts(args, document, [self.table(runs, args.metric)], runs)

    def table(self, runs: Iterable[StoredRun], metric: str) -> Any:
        """Return a table with a row a run."""
        columns = {
            "status": "status",
            "epochs": "epochs",
            "final": f"final.{metric}",
            "best": f"best.{metric}.value",
            "expected": f"expected.{metric}",
            "seconds": "seconds.total",
        }
        rows = []
        for run in runs:
            facts = flat(run.result)
            rows.append([str(run.folder), *(cell(facts.get(key)) for key in columns.values())])
        numbers = [column for column in columns if column != "status"]
        made = table(["run", *columns], rows, right=numbers)
        made.columns[0].no_wrap = True  # a path to copy
        made.caption = f"final, best and expected {printable(metric)}"
        return made


class ShowRun:
    """``trainkit runs show``."""

    HELP = "Show one run: what was reached, what produced it, and its files."
    EXAMPLES = "examples:\n  trainkit runs show runs/se/20260101-120000-0\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print all that the run's files say."""
        run = StoredRun(args.folder)
        document = {
            "run": str(run.folder),
            "recipe.yaml": run.recipe,
            "result.json": run.result,
            "plugins.lock.json": run.plugins,
            "environment.json": run.environment,
            "data.json": run.data,
            "files": run.files(),
        }
        made_by = flat({**run.recipe, "plugins": {}, "environment": run.environment, "data": run.data})
        columns = ["name", "version", "source", "options"]
        plugins = [[cell(plugin.get(column)) for column in columns] for plugin in run.plugins]
        files = [(name, number(size)) for name, size in run.files().items()]
        tables = [
            side_by_side("result", {key: [value] for key, value in result_facts(run).items()}, 1),
            table(["plugin", *columns[1:]], plugins),
            side_by_side("made by", {key: [value] for key, value in made_by.items()}, 1),
            table(["file", "bytes"], files, right=["bytes"]),
        ]
        return print_facts(args, document, tables, [run])


class CompareRuns:
    """``trainkit runs compare``."""

    HELP = "Compare runs: their results side by side, and what differs in what produced them."
    EXAMPLES = "examples:\n  trainkit runs compare runs/se/*\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("folders", metavar="RUN_DIR", nargs="+", type=Path, help="the directory of a run")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print results and differences."""
        runs = [StoredRun(folder) for folder in args.folders]
        facts = [result_facts(run) for run in runs]
        keys = dict.fromkeys(key for of_one in facts for key in of_one)
        results = {key: [of_one.get(key) for of_one in facts] for key in keys}
        differences = self.differences(runs)
        shown = differences or {"none": [""] * len(runs)}
        tables = [side_by_side("result", results, len(runs)), side_by_side("difference", shown, len(runs))]
        return print_facts(args, {"results": results, "differences": differences}, tables, runs)

    def differences(self, runs: Sequence[StoredRun]) -> dict[str, list[Any]]:
        """Return what differs in what produced the runs: for each key a value a run."""
        found = {
            difference.key: list(difference.values)
            for difference in provenance.compare(*(run.record() for run in runs))
        }
        resumed = [changes_on_the_way(run) for run in runs]
        if any(changes != resumed[0] for changes in resumed):
            found["changed when resumed"] = resumed
        return found


def changes_on_the_way(run: StoredRun) -> list[str]:
    """Return what was changed each time that the run was resumed."""
    changes: list[str] = []
    resumed = run.result.get("resumed", [])
    for session in resumed if isinstance(resumed, list) else []:
        if isinstance(session, dict) and isinstance(session.get("changes"), list):
            changes += [str(change) for change in session["changes"]]
    return changes


# ---- check


@attrs.frozen
class Finding:
    """What came of one part of a run directory."""

    what: str
    verdict: Literal["whole", "absent", "broken", "differs"]
    detail: str


class CheckRun:
    """``trainkit runs check``."""

    HELP = "Verify a run directory: each file whole, and whether it would resume exactly."
    EXAMPLES = "examples:\n  trainkit runs check runs/basic_se/20260101-120000-0\n"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a finding for each part, then the answer; return 0 if all is whole and the run would resume exactly."""
        run_dir = RunDir(args.run_dir)
        run_dir.recipe_path()
        findings = [*check_files(run_dir), *check_plugins(run_dir)]
        reasons, position = check_resume(run_dir)
        whole = all(finding.verdict in ("whole", "absent") for finding in findings)
        exact = not reasons
        answer = f"would resume exactly, from {position}" if exact else f"would not: {'; '.join(reasons)}"
        if args.json:
            facts = [attrs.asdict(finding) for finding in findings]
            print_json({"findings": facts, "whole": whole, "exact": exact, "answer": answer})
        else:
            rows = [(finding.what, finding.verdict, finding.detail) for finding in findings]
            console = terminal()
            console.print(table(["what", "verdict", "detail"], rows))
            console.print(printable(answer), markup=False, highlight=False, soft_wrap=True)
        return 0 if whole and exact else 1


def check_files(run_dir: RunDir) -> Iterator[Finding]:
    """Read each file that a run writes; one that only some runs write may be absent."""
    checks: dict[str, Callable[[RunDir, str], str]] = {
        "recipe.yaml": check_recipe,
        "plugins.lock.json": check_lock,
        "environment.json": check_environment,
        "data.json": check_data,
        "result.json": check_result,
        "metrics.jsonl": check_records,
        "metrics.csv": check_epochs,
        "checkpoints/last.pt": check_checkpoint,
        "checkpoints/previous.pt": check_checkpoint,
        "checkpoints/best.pt": check_checkpoint,
    }
    always_there = ("plugins.lock.json", "environment.json", "data.json")
    for name, check in checks.items():
        path = run_dir.path / name
        if not path.exists() and name not in always_there:
            yield Finding(name, "absent", "the run goes on, or was killed" if name == "result.json" else "")
            continue
        try:
            yield Finding(name, "whole", check(run_dir, name))
        except (KeyError, TypeError) as problem:  # JSON of another shape
            yield Finding(name, "broken", f"not what a run writes there: {problem!r}")
        except (TrainkitError, OSError, ValueError, csv.Error) as problem:
            yield Finding(name, "broken", str(problem).removeprefix(f"{path}: "))


def check_recipe(run_dir: RunDir, name: str) -> str:
    """Read the recipe; return how long it trains."""
    from trainkit.recipe import load_recipe

    return f"{load_recipe(run_dir.path / name).epochs} epochs"


def check_lock(run_dir: RunDir, name: str) -> str:
    """Read what is recorded of the plugins; return how many there are."""
    return f"{len(plugins_from_json(run_dir.read_json(name)))} plugins"


def check_environment(run_dir: RunDir, name: str) -> str:
    """Read the environment; return the device."""
    return f"device {run_dir.read_json(name)['device']}"


def check_data(run_dir: RunDir, name: str) -> str:
    """Read what is recorded of the data set; return the sizes of its splits."""
    splits = mapping_from_json(run_dir.read_json(name))["splits"]
    return ", ".join(f"{split['images']:,} {part} images" for part, split in splits.items())


def check_result(run_dir: RunDir, name: str) -> str:
    """Read the result; return how the run ended."""
    return str(run_dir.read_json(name)["status"])


def check_records(run_dir: RunDir, name: str) -> str:
    """Read a log: every line is a record, and neither epochs nor steps go back. Return how far it goes."""
    lines = run_dir.read_log(name).splitlines(keepends=True)
    last = {"epoch": 0, "step": 0}
    for line_number, line in enumerate(lines, 1):
        try:
            record = parse_json(line) if line.endswith(b"\n") else {}
            position = {"epoch": record["epoch"], "step": record["step"]}
            back = [key for key in position if position[key] < last[key]]
        except (KeyError, TypeError, ValueError) as problem:
            raise UsageError(f"line {line_number} is cut short, or not a record") from problem
        if back:
            raise UsageError(f"line {line_number}: {back[0]} {position[back[0]]} comes after {last[back[0]]}")
        last = position
    return f"{len(lines)} records, to epoch {last['epoch']}, step {last['step']}"


def check_epochs(run_dir: RunDir, name: str) -> str:
    """Read a table of epochs: whole rows of numbers, epochs 1 to the last. Return how many there are."""
    text = run_dir.read_log(name).decode()
    header, *rows = csv.reader(text.splitlines())
    whole = text.endswith("\n")
    for epoch, row in enumerate(rows, 1):
        numbers = [float(cell or "nan") for cell in row]
        whole = whole and len(numbers) == len(header) and numbers[:1] == [epoch]
    if not whole:
        raise UsageError(f"cut short, or its rows are not epochs 1 to {len(rows)}, whole")
    return f"{len(rows)} epochs"


def check_checkpoint(run_dir: RunDir, name: str) -> str:
    """Read a checkpoint and verify its checksum; return its position."""
    return position_of(run_dir.load_state(Path(name).stem))


def position_of(state: Mapping[str, Any]) -> str:
    """Return the position of a checkpoint in words."""
    return "epoch {epoch}, batch {batch_index}, step {step}".format(**state["position"])


def check_plugins(run_dir: RunDir) -> Iterator[Finding]:
    """Hold the installed plugins against those that the run was made with; only metadata is read."""
    try:
        recorded = plugins_from_json(run_dir.read_json("plugins.lock.json"))
    except (TrainkitError, ValueError):  # check_files says so
        return
    have = installed()
    for plugin in recorded:
        then = f"{plugin.get('distribution')} {plugin.get('version')}"
        now = " and ".join(f"{found.distribution} {found.version}" for found in have.get(plugin["name"], []))
        if now != then:
            yield Finding(f"plugin {plugin['name']}", "differs", f"was {then}, is {now or 'not installed'}")


def check_resume(run_dir: RunDir) -> tuple[list[str], str]:
    """Build the run again and load its last checkpoint.

    Returns:
        What keeps the run from resuming exactly, and the position that it would resume from.
    """
    from rich.console import Console

    from trainkit import build, load_recipe

    try:
        with run_dir.exclusive():  # a run that goes on in another process cannot be resumed
            recipe = load_recipe(run_dir.recipe_path())
            state, notice = run_dir.load_latest()
            run = build(recipe, console=Console(quiet=True))
            differences = provenance.compare_state(state, run)
            run.load_state_dict(state)
        reasons = [str(difference) for difference in differences if difference.effect == "numbers"]
        reasons += missing_rows(run_dir, state)
        position = position_of(state)
    except TrainkitError as problem:
        return [str(problem)], ""
    except Exception as problem:  # whatever a plugin or a strange checkpoint raises is the answer
        return [f"{type(problem).__name__}: {problem}"], ""
    return reasons, f"{position} ({notice})" if notice else position


def missing_rows(run_dir: RunDir, state: Mapping[str, Any]) -> list[str]:
    """Return what is missing of the log: a checkpoint counts the rows that ``metric_log`` wrote before it."""
    saved = state["plugins"].get("metric_log")
    if saved is None:
        return []
    counted = saved["state"]["rows"]
    log = run_dir.path / "metrics.jsonl"
    rows = run_dir.read_log(log.name).count(b"\n") if log.exists() else 0
    return [f"metrics.jsonl has {rows} rows and the checkpoint counted {counted}"] if rows < counted else []


LIST = ListRuns()
SHOW = ShowRun()
COMPARE = CompareRuns()
CHECK = CheckRun()

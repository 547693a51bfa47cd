"""List, show, compare and check runs: what was reached, what produced it, and whether it can be continued exactly.

``list``, ``show`` and ``compare`` read files alone: no plugin of a run need be installed, and torch is not imported.
``check`` builds the run again, as ``trainkit resume`` would.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import field

from trainkit import provenance
from trainkit.cli.output import error, number, print_json, printable, table, terminal, written
from trainkit.errors import TrainkitError, UsageError
from trainkit.provenance import ABSENT, LISTED
from trainkit.registry import installed
from trainkit.rundir import RunDir, as_mapping, parse_json, read_regular

if TYPE_CHECKING:
    from trainkit.recipe import Recipe

__all__ = [
    "CHECK",
    "COMPARE",
    "LIST",
    "SHOW",
    "VERIFIED",
    "Evidence",
    "Finding",
    "StoredRun",
    "cell",
    "chain_of",
    "epochs_of",
    "read_evidence",
]

METRIC = "test_accuracy"
UNFINISHED = "running or killed"
SORTED_BY = ("newest", "name", "seed", "epochs", "final", "best", "seconds")
NO_SETTINGS = {"name", "description", "source", "expect", "requires", "local", "plugins", "device"}
HASH = re.compile(r"\b(?:blake2b:)?([0-9a-f]{12})[0-9a-f]{20,}\b")
VERIFIED = "verified.json"  # what `trainkit verify RUN -o RUN/verified.json` writes
VERDICTS = ("proved", "agrees", "differs", "not possible")
MAX_EVIDENCE = 1 << 20  # bytes of what `trainkit verify` writes
MAX_CHECKS = 200  # that it lists
AT_ONCE = 3  # runs that a terminal of 80 columns shows beside each other


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

    @property
    def name(self) -> str:
        """The recipe's name."""
        found = re.search(r"^name: (\S+)$", self._text("recipe.yaml"), re.MULTILINE)
        return found[1] if found else ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe's single values and all options of its plugins, by dotted key.

        The recipe's lines are read, for its values; reading it as a recipe takes far longer than a listing may.
        """
        lines = re.findall(r"^(\w+): (\S.*)$", self._text("recipe.yaml"), re.MULTILINE)
        found: dict[str, Any] = {key: value for key, value in lines if key not in NO_SETTINGS}
        plugins: list[dict[str, Any]] = []
        with suppress(TrainkitError, TypeError, ValueError):  # `runs show` says what is wrong with the file
            plugins = plugins_from_json(RunDir(self.folder).read_json("plugins.lock.json"))
        for plugin in plugins:
            found[plugin["name"]] = LISTED
            options, without_effect = plugin.get("options"), plugin.get("without_effect")
            if isinstance(options, dict) and isinstance(without_effect, list) and not plugin.get("observer"):
                found |= {f"{plugin['name']}.{k}": v for k, v in options.items() if k not in without_effect}
        return found

    def _text(self, name: str) -> str:
        try:
            return RunDir(self.folder).read_log(name).decode(errors="replace")
        except (OSError, TrainkitError):
            return ""

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


def find_groups(folder: Path) -> list[Path]:
    """Return the groups of runs in a folder and in the folders of it: seeds, and variants of studies."""
    return sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/group.json"))


# ---- what was found when a run was checked


def chain_of(result: Mapping[str, Any]) -> str:
    """Return the last hash of a run's ledger, as its result has it; empty where it has none."""
    chain = as_mapping(as_mapping(result.get("evidence")).get("ledger")).get("chain")
    return chain if isinstance(chain, str) else ""


@attrs.frozen
class Evidence:
    """What ``trainkit verify`` found, as its writer says: nothing proves that it was not written by hand.

    Args:
        path: of the file.
        ledger: the last hash of the ledger that was checked; it tells which run that is.
        sentence: what was found, in words.
        checks: subject, verdict and detail of each check.
        proved: whether the file says that everything which was checked was proved.
        passed: whether it says that nothing differs.
        replayed: steps that were replayed and came out identical.
        steps: of the whole run.
        document: all that the file holds.
    """

    path: Path
    ledger: str
    sentence: str
    checks: list[tuple[str, str, str]]
    proved: bool
    passed: bool
    replayed: int
    steps: int
    document: dict[str, Any]

    @property
    def verdict(self) -> str:
        """All verdicts in a word; a file that contradicts itself is not taken at its best."""
        verdicts = {verdict for _, verdict, _ in self.checks}
        if "differs" in verdicts:
            return "differs"
        if self.proved and verdicts == {"proved"}:
            return "proved"
        return "agrees" if self.passed and verdicts else "not verified"


def read_evidence(path: Path) -> Evidence:
    """Read what ``trainkit verify RUN -o FILE`` wrote.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    cure = "write it with: trainkit verify RUN -o FILE"
    try:
        told = parse_json(read_regular(path, MAX_EVIDENCE))
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{path}: not JSON: {problem}; {cure}") from problem
    told = as_mapping(told)
    kinds = {"ledger": str, "sentence": str, "checks": list, "proved": bool, "passed": bool}
    kinds |= {"replayed": int, "steps": int}
    for key, kind in kinds.items():
        if not isinstance(told.get(key), kind):
            raise UsageError(f"{path}: {key}: expected {kind.__name__}, got {written(told.get(key))[:60]}; {cure}")
    if not told["ledger"]:
        raise UsageError(f"{path}: ledger: empty: the run that was checked has no ledger that could be read")
    if len(told["checks"]) > MAX_CHECKS:
        raise UsageError(f"{path}: checks: {len(told['checks']):,}, and `trainkit verify` makes {MAX_CHECKS} at most")
    checks: list[tuple[str, str, str]] = []
    for n, check in enumerate(map(as_mapping, told["checks"])):
        what, verdict, detail = (check.get(key) for key in ("what", "verdict", "detail"))
        if not (isinstance(what, str) and verdict in VERDICTS and isinstance(detail, str)):
            raise UsageError(f"{path}: checks[{n}]: expected what, verdict ({', '.join(VERDICTS)}) and detail; {cure}")
        checks.append((what, verdict, detail))
    return Evidence(path=path, checks=checks, document=told, **{key: told[key] for key in kinds if key != "checks"})


# ---- facts as tables


def flat(tree: Mapping[str, Any], prefix: str = "", depth: int = 20) -> dict[str, Any]:
    """Return nested values by dotted key; those that lie deeper than `depth` stay as they are."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and depth:
            found.update(flat(value, f"{prefix}{name}.", depth - 1))
        else:
            found[f"{prefix}{name}"] = value
    return found


def result_facts(run: StoredRun) -> dict[str, Any]:
    """Return a run's result by dotted key; what is expected of a metric stands beside what was reached.

    Evidence is left out: hashes, which ``trainkit verify`` checks, and which always differ between runs. So is what is
    better of a metric, which never does.
    """
    result = {name: value for name, value in run.result.items() if name not in ("evidence", "better")}
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
    """Return a value as a table shows it: numbers as people read them, others as in a recipe; hashes are cut short."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return number(value)
    text = value if isinstance(value, str) else written(value)
    return HASH.sub(r"\1", text)


def side_by_side(title: str, rows: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Any]:
    """Return tables with a row a key and a column a run, of so many runs as fit beside each other.

    Args:
        title: heads the keys.
        rows: for each key, the values of the runs.
        names: head the runs.
    """
    tables = []
    for start in range(0, len(names), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        cells = [[key, *(cell(value) for value in values[part])] for key, values in rows.items()]
        tables.append(table([title, *names[part]], cells))
    return tables


def differing(runs: Sequence[StoredRun]) -> dict[Path, list[str]]:
    """Return, by folder, what sets each run apart from most of its recipe: ``sgd.lr=0.02``, ``se=false``.

    The seed is left out, which a listing shows anyway.
    """
    by_recipe: dict[str, list[StoredRun]] = {}
    for run in runs:
        by_recipe.setdefault(run.name, []).append(run)
    found: dict[Path, list[str]] = {}
    for group in by_recipe.values():
        keys = dict.fromkeys(key for run in group for key in run.settings if key != "seed")
        for key in keys:
            values = [cell(run.settings.get(key, ABSENT)) for run in group]
            (usual, _), *others = Counter(values).most_common()
            for run, value in zip(group, values, strict=True) if others else ():
                plugin, dot, _ = key.partition(".")
                if value == usual or (dot and plugin not in run.settings):  # the plugin itself is what lacks
                    continue
                shown = {LISTED: key, ABSENT: f"{key}=false" if not dot else f"no {key}"}
                found.setdefault(run.folder, []).append(shown.get(value, f"{key}={value}"))
    return found


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

    HELP = "List runs, newest first, with what sets each apart from most runs of its recipe."
    EXAMPLES = """\
examples:
  trainkit runs list
  trainkit runs list runs/basic_se --sort best
  trainkit runs list --metric test_loss --sort final
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument(
            "folder", metavar="FOLDER", nargs="?", default=Path("runs"), type=Path, help="default: runs"
        )
        parser.add_argument(
            "--sort", choices=SORTED_BY, default="newest", metavar="KEY", help=f"by {', '.join(SORTED_BY)}"
        )
        parser.add_argument("--metric", default=METRIC, metavar="NAME", help=f"which to show (default: {METRIC})")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print a row for each run."""
        if not args.folder.is_dir():
            raise UsageError(f"{args.folder}: no such folder; give the one that holds runs")
        runs = [StoredRun(folder) for folder in find_runs(args.folder)]
        groups = find_groups(args.folder)
        facts = {run.folder: self.facts(run, args.metric) for run in runs}
        if args.sort != "newest":
            runs.sort(key=lambda run: sort_key(args.sort, facts[run.folder]))
        differ = differing(runs)
        document = [
            {"run": str(run.folder), "seed": facts[run.folder]["seed"], "differs": differ.get(run.folder, [])}
            | {"result.json": run.result}
            for run in runs
        ]
        tables = [self.table(facts, runs, differ, args.metric)] if runs or not groups else []
        if groups:
            from trainkit_studies import Group, facts_of, listing_table  # type: ignore[import-untyped]

            read = [Group.read(folder) for folder in groups]
            document += [{"group": str(group.folder), **facts_of(group, [args.metric])} for group in read]
            tables.append(listing_table(read, args.metric))
        return print_facts(args, document, tables, runs)

    def facts(self, run: StoredRun, metric: str) -> dict[str, Any]:
        """Return what a row says of a run."""
        result = flat(run.result)
        seed = run.settings.get("seed", "")
        return {
            "name": str(run.folder),
            "seed": int(seed) if re.fullmatch(r"-?\d{1,18}", seed) else None,
            "status": result.get("status"),
            "epochs": result.get("epochs"),
            "final": result.get(f"final.{metric}"),
            "best": result.get(f"best.{metric}.value"),
            "expected": result.get(f"expected.{metric}"),
            "seconds": result.get("seconds.total"),
            "better": result.get(f"better.{metric}"),
        }

    def table(
        self,
        facts: Mapping[Path, Mapping[str, Any]],
        runs: Sequence[StoredRun],
        differ: Mapping[Path, Sequence[str]],
        metric: str,
    ) -> Any:
        """Return a table with a row a run; what sets it apart stands under its path."""
        columns = ["run", "seed", "status", "epochs", "final", "best", "expected", "seconds"]
        rows = []
        for run in runs:
            name, *cells = (cell(value) for key, value in facts[run.folder].items() if key != "better")
            rows.append(["\n".join([name, *(f"  {each}" for each in differ.get(run.folder, []))]), *cells])
        numbers = [column for column in columns if column not in ("run", "status")]
        optional = ["expected", "seconds", "epochs", "seed", "status"]
        made = table(columns, rows, right=numbers, optional=optional)
        made.caption = f"final and best {printable(metric)}"
        return made


def sort_key(column: str, facts: Mapping[str, Any]) -> tuple[bool, Any]:
    """Return what a listing is sorted by: the best first, for a metric, and others upwards; last, what there is not."""
    value = facts[column]
    if column == "name":
        return False, value
    if not isinstance(value, int | float):
        return True, 0
    more_is_better = column in ("final", "best") and facts["better"] != "less"
    return False, -value if more_is_better else value


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
        made_by = flat({**run.recipe, "plugins": {}, "environment": run.environment, "data": run.data}, depth=1)
        columns = ["name", "version", "source", "options"]
        plugins = [[cell(plugin.get(column)) for column in columns] for plugin in run.plugins]
        files = [(name, number(size)) for name, size in run.files().items()]
        tables = [
            *side_by_side("result", {key: [value] for key, value in result_facts(run).items()}, [""]),
            table(["plugin", *columns[1:]], plugins, optional=["source", "version"]),
            *side_by_side("made by", {key: [value] for key, value in made_by.items()}, [""]),
            table(["file", "bytes"], files, right=["bytes"]),
        ]
        return print_facts(args, document, tables, [run])


class CompareRuns:
    """``trainkit runs compare``."""

    HELP = "Compare runs: where their results differ, and what differs in what produced them. Or groups: how certainly."
    EXAMPLES = """\
examples:
  trainkit runs compare runs/se/*
  trainkit runs compare runs/paper/sgd-0f3a5b7c runs/paper/adam-91d2e4f6
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("folders", metavar="RUN_DIR", nargs="+", type=Path, help="of a run, or of a group of runs")
        parser.add_argument("--metric", default=METRIC, metavar="NAME", help=f"of groups (default: {METRIC})")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print results and differences."""
        are_groups = [(folder / "group.json").is_file() for folder in args.folders]
        if all(are_groups):
            return self.compare_groups(args)
        if any(are_groups):
            raise UsageError(
                f"{args.folders[are_groups.index(True)]}: a group of runs, which a single run is not held against"
            )
        runs = [StoredRun(folder) for folder in args.folders]
        facts = [result_facts(run) for run in runs]
        keys = dict.fromkeys(key for of_one in facts for key in of_one)
        results = {key: [of_one.get(key) for of_one in facts] for key in keys}
        differences = self.differences(runs)
        if args.json:
            return print_facts(args, {"results": results, "differences": differences}, [], runs)
        out = terminal()
        names = [f"run {n}" for n in range(1, len(runs) + 1)]
        for name, run in zip(names, runs, strict=True):
            out.print(printable(f"{name}: {run.folder}"), markup=False, highlight=False, soft_wrap=True)
        apart = {key: values for key, values in results.items() if any(value != values[0] for value in values)}
        apart.pop("run", None)
        tables = [] if not apart else side_by_side("result", apart, names)
        tables += side_by_side("difference", differences or {"none": [""] * len(runs)}, names)
        return print_facts(args, None, tables, runs)

    def compare_groups(self, args: argparse.Namespace) -> int:
        """Print how each group differs from the first, with the interval of the difference."""
        from trainkit_studies import Group, compare, facts_of, study_table  # scipy is slow to load

        groups = [Group.read(folder) for folder in args.folders]
        first = groups[0].values(args.metric)
        for group in groups:
            if not group.values(args.metric):
                raise UsageError(f"{group.folder}: no completed run reports {args.metric!r}")
        beyond = [attrs.asdict(compare(group.values(args.metric), first)) for group in groups[1:]]
        document = {"groups": [facts_of(group, [args.metric]) for group in groups], "beyond_the_first": beyond}
        return print_facts(args, document, [study_table(groups, args.metric)], [])

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

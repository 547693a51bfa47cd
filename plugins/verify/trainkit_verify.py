"""Check a run by replaying parts of it, or seal what others need to check it."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import attrs
from attrs import field

from trainkit import numerics
from trainkit.cli.output import add_allow_local, print_json, printable, table, terminal
from trainkit.errors import TrainkitError, UsageError
from trainkit.recipe import load_recipe
from trainkit.registry import COMMANDS, base_name, installed, only
from trainkit.rundir import MAX_LOG, atomic_write, read_regular
from trainkit_ledger import FILE, START, Ledger, chain_of, link, record_line, recorded_files

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit import Run
    from trainkit.provenance import Difference
    from trainkit.recipe import Recipe
    from trainkit.rundir import RunDir

__all__ = ["SEAL", "VERIFY", "Check", "Verification", "seal", "verify"]

Verdict = Literal["proved", "agrees", "differs", "not possible"]

TOLERANCE = {"accuracy": 1.0, "other": 0.05}  # percentage points of an accuracy; share of any other metric
STAGES = 4  # files, record, replays, evaluation
WITHIN = f"within {TOLERANCE['accuracy']:g} point of accuracy and {TOLERANCE['other']:.0%} of any other metric"
STRANGE = (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)  # what a forged file may raise


@attrs.frozen
class Check:
    """One thing that was checked.

    Args:
        what: the subject, such as ``ledger`` or ``from the seed``.
        verdict: ``proved`` bit for bit; ``agrees`` within the tolerance, which proves nothing; ``differs``; or
            ``not possible``.
        detail: what was found, and where.
    """

    what: str
    verdict: Verdict
    detail: str


@attrs.define
class Verification:
    """What came of checking a run directory; :meth:`sentence` is what a reviewer can quote."""

    run: str
    chain: str = ""  #: the ledger's last hash; empty where the ledger cannot be read
    checks: list[Check] = field(factory=list)
    steps: int = 0  #: of the whole run
    replayed: int = 0  #: steps that were replayed and came out identical
    comparable: bool = True  #: whether this machine computes the same bits
    complete: bool = False  #: whether all checks were made, whatever came of them
    files_alone: bool = False  #: whether nothing more was asked for than a look at the files

    def add(self, what: str, verdict: Verdict, detail: str) -> None:
        """Note a check."""
        self.checks.append(Check(what, verdict, detail))

    def to_json(self) -> dict[str, Any]:
        """Return what was found as plain values; the last hash of the ledger tells which run it is of."""
        return {
            "run": self.run,
            "ledger": self.chain,
            "checks": [attrs.asdict(check) for check in self.checks],
            "steps": self.steps,
            "replayed": self.replayed,
            "comparable": self.comparable,
            "passed": self.passed,
            "proved": self.proved,
            "sentence": self.sentence(),
        }

    @property
    def proved(self) -> bool:
        """Whether nothing differs and everything was proved; steps that were not replayed are on trust nevertheless."""
        return self.complete and all(check.verdict == "proved" for check in self.checks)

    @property
    def differs(self) -> bool:
        """Whether anything differs from what the directory claims."""
        return any(check.verdict == "differs" for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether all checks that were asked for were made, and none found a difference."""
        return (self.complete or self.files_alone) and not self.differs

    def sentence(self) -> str:
        """Return what a reviewer can quote: what was replayed, what was identical, what is taken on trust."""
        if self.differs:
            wrong = next(check for check in self.checks if check.verdict == "differs")
            return f"{self.run}: NOT verified. {wrong.what}: {wrong.detail}."
        if self.files_alone:
            return f"{self.run}: its files fit each other. Nothing was replayed: all {self.steps:,} steps are on trust."
        if not self.complete:
            reason = self.checks[-1]
            return f"{self.run}: not verified, because it cannot be. {reason.what}: {reason.detail}."
        if not self.comparable:
            return (
                f"{self.run}: agrees, not proved. This machine does not compute the bits that the run recorded. Files "
                f"fit each other, and metrics are {WITHIN}. All {self.steps:,} steps are taken on trust."
            )
        rest = max(self.steps - self.replayed, 0)
        share = 100 * self.replayed / self.steps if self.steps else 0.0
        trust = f"The other {rest:,} steps are taken on trust" if rest else "No step is taken on trust"
        missing = [check.what for check in self.checks if check.verdict != "proved"]
        but = f" Not checked: {', '.join(missing)}." if missing else ""
        return (
            f"{self.run}: verified. {self.replayed:,} of {self.steps:,} steps ({share:.1f} %) were replayed and came "
            f"out identical, bit for bit. {trust}.{but}"
        )


@attrs.define
class Session:
    """What a part of the run was made under: the whole run, unless it was continued with changes.

    Args:
        first: index of the ledger's first entry that was made under it.
        recipe: what to build; None where the directory no longer holds it.
        record: what was recorded; None where nothing holds it.
        obstacle: why its steps cannot be replayed here bit for bit; empty where they can.
        machine: whether the obstacle is this machine, so that metrics can be compared within the tolerance.
    """

    first: int
    recipe: Recipe | None
    record: Mapping[str, Any] | None
    obstacle: str = ""
    machine: bool = False


@attrs.define
class Stored:
    """What a run directory holds, as far as it was read."""

    run_dir: RunDir
    overrides: tuple[str, ...]
    entries: list[dict[str, Any]] = field(factory=list)
    rows: list[dict[str, Any]] | None = None  #: of metrics.jsonl
    result: dict[str, Any] | None = None
    states: dict[int, dict[str, Any]] = field(factory=dict)  #: of checkpoints that fit the ledger, by entry
    best: dict[str, Any] | None = None  #: the state of best.pt, if it fits the ledger
    lock: list[dict[str, Any]] = field(factory=list)  #: plugins.lock.json of the last session

    @property
    def ended(self) -> bool:
        """Whether the run has a result, of a session that did not fail."""
        return self.result is not None and self.result.get("status") != "failed"

    @property
    def last(self) -> dict[str, Any] | None:
        """The state at the last position, if a checkpoint holds it."""
        position = _position(self.entries[-1])
        found = [state for state in self.states.values() if _position(state["position"]) == position]
        return max(found, key=lambda state: len(state["history"]), default=None)

    def history(self) -> list[dict[str, Any]]:
        """Return the records of epochs."""
        if self.last is not None:
            return [{name: _finite(value) for name, value in row.items()} for row in self.last["history"]]
        return [row for row in self.rows or [] if "lr" in row]

    def lists(self, plugin: str) -> bool:
        """Tell whether the last session's recipe listed a plugin."""
        return any(base_name(listed["name"]) == plugin for listed in self.lock)


def verify(
    run_dir: RunDir,
    *,
    segments: int | None = None,
    overrides: tuple[str, ...] = (),
    seconds: float = 30.0,
    files: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Check a run directory: its files, its record against this machine, replays, and the final evaluation.

    Args:
        run_dir: the directory of a run whose recipe listed ``ledger``.
        segments: parts between kept checkpoints that are replayed; by default as many as there is time for.
        overrides: of the recipe, for where the data lie.
        seconds: time for replays; of the seed's steps and of one part at least one entry is replayed whatever it takes.
        files: whether to hold the files against each other and stop there: nothing is trained or evaluated.
        progress: told what is being done.

    Raises:
        TrainkitError: the directory is not a run's.
    """
    run_dir.recipe_path()
    found = Verification(str(run_dir.path))
    stored = Stored(run_dir, overrides)
    progress("files")
    if not _check_ledger(stored, found):
        return found
    found.steps = stored.entries[-1]["step"]
    found.chain = stored.entries[-1]["chain"]
    _check_checkpoints(stored, found)
    _check_results(stored, found)
    progress("record against this machine")
    sessions = _check_record(stored, found)
    if files and sessions:
        found.files_alone = True
        return found
    if not sessions or not _check_machine(stored, sessions, found):
        return found
    progress("replays")
    _check_replays(stored, sessions, found, segments=segments, until=monotonic() + seconds)
    progress("evaluation")
    _check_evaluation(stored, sessions[-1], found)
    found.complete = stored.ended
    if not stored.ended:
        found.add("results", "not possible", "the run has not ended: there is no result to verify")
    return found


# ---- files


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that a JSON object has twice: readers differ in which of the values they show."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name twice in one object: {', '.join(name for name, _ in pairs)}")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _text(path: Path) -> str:
    """Return what a file of a run holds, which may be a stranger's: a regular one, of bounded size."""
    return read_regular(path, MAX_LOG).decode("utf-8")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line.

    Raises:
        ValueError: a line is not one.
    """
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            value = _from_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {number}: not an object")
        found.append(value)
    return found


def _check_ledger(stored: Stored, found: Verification) -> bool:
    """Read the ledger and recompute its chain."""
    try:
        entries = _read_lines(stored.run_dir.path / FILE)
        chain = START
        before = (0, 0)
        for number, entry in enumerate(entries, start=1):
            chain = chain_of(chain, entry)
            if entry["chain"] != chain or entry["entry"] != number - 1:
                found.add("ledger", "differs", f"{FILE}, line {number}: its hash is not that of what it says")
                return False
            place = (int(entry["step"]), int(entry["rows"]))
            if place < before or place[1] < before[1]:
                found.add("ledger", "differs", f"{FILE}, line {number}: lies before the line above it")
                return False
            before = place
            _position(entry), entry["state"], entry["records"]
        if not entries or "record" not in entries[0] or entries[0]["step"] != 0:
            found.add("ledger", "differs", f"{FILE}, line 1: not the entry of a run's start")
            return False
    except OSError as error:
        found.add("ledger", "not possible", f"{FILE}: {error.strerror}; a run has one if its recipe lists `ledger`")
        return False
    except STRANGE as error:
        found.add("ledger", "differs", f"{FILE} is not a ledger: {error}")
        return False
    stored.entries = entries
    found.add("ledger", "proved", f"{len(entries)} entries, each chained to the one before")
    return True


def _check_checkpoints(stored: Stored, found: Verification) -> None:
    """Hold the state in every checkpoint against the ledger."""
    from trainkit.provenance import state_digest

    with suppress(*STRANGE):
        result = _from_json(_text(stored.run_dir.path / "result.json"))
        stored.result = result if isinstance(result, dict) else None
    with suppress(*STRANGE):
        stored.lock = _from_json(_text(stored.run_dir.versions("plugins.lock.json")[-1]))
    wrong, strange, fitting = [], [], []
    for path in sorted((stored.run_dir.path / "checkpoints").glob("*.pt")):
        try:
            state = stored.run_dir.load_state(path.stem)
            digest = state_digest(state)
            here = [n for n, e in enumerate(stored.entries) if _position(e) == _position(state["position"])]
            same = [n for n in here if stored.entries[n]["state"] == digest]
            misplaced = _misplaced(path.stem, state, stored)
        except (TrainkitError, *STRANGE) as error:
            wrong.append(
                str(error).removeprefix(f"{path.parent}/")
                if isinstance(error, TrainkitError)
                else f"{path.name}: not a run's state: {error!r}"
            )
            continue
        if not here and not misplaced:
            strange.append(path.name)
        elif not same:
            lines = " or ".join(str(n + 1) for n in here)
            wrong.append(misplaced or f"{path.name}: its state is not the one that {FILE}, line {lines}, was made of")
        elif misplaced:
            wrong.append(misplaced)
        else:
            stored.states[same[0]] = state
            fitting.append(path.name)
            if path.stem == "best":
                stored.best = state
    if not wrong and stored.best is not None:
        with suppress(*STRANGE):
            wrong += _not_the_best(stored)
    if wrong:
        found.add("checkpoints", "differs", "; ".join(wrong))
    elif not fitting:
        found.add("checkpoints", "not possible", "none lies at an entry of the ledger")
    else:
        lost = f"; at no entry, so not checked: {', '.join(strange)}" if strange else ""
        found.add("checkpoints", "proved", f"{', '.join(fitting)}: each holds the state of its entry{lost}")


def _position(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    return entry["epoch"], entry["batch_index"], entry["step"]


def _misplaced(name: str, state: Mapping[str, Any], stored: Stored) -> str:
    """Return why a checkpoint is not what its name says, or the empty string."""
    epoch, batch_index, step = _position(state["position"])
    ends = state["history"] and state["history"][-1]["step"] == step
    if name == "last" and stored.ended and _position(state["position"]) != _position(stored.entries[-1]):
        return f"last.pt: lies at step {step}, and the run ended at step {stored.entries[-1]['step']}"
    if name == "best" and not ends:
        return f"best.pt: lies at step {step}, which is no end of an epoch"
    if name.startswith("epoch-") and (name != f"epoch-{epoch}" or not ends or batch_index):
        return f"{name}.pt: lies at epoch {epoch}, batch {batch_index}"
    return ""


def _not_the_best(stored: Stored) -> list[str]:
    """Return why best.pt is not the best epoch of the run, if so; a run that has not ended may have a newer one."""
    options = [plugin["options"] for plugin in stored.lock if base_name(plugin["name"]) == "checkpoint"]
    last, best = stored.last, stored.best
    if not (options and stored.ended and last is not None and best is not None):
        return []
    name = options[0]["best"]
    known = {*last["metric_info"], *(key for row in last["history"] for key in row)}
    splits = {key.partition("_")[0] for key in last["metric_info"]}
    selection = "validation" if "validation" in splits else "test"
    key = name if name in known or name.partition("_")[0] in splits else f"{selection}_{name}"
    found = _best_of(last).get(key)
    if found is None or best["history"][-1]["epoch"] == found["epoch"]:
        return []
    return [f"best.pt: is of epoch {best['history'][-1]['epoch']:g}, and {key} was best in epoch {found['epoch']:g}"]


def _best_of(state: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    from trainkit.run import MetricInfo, best_of

    info = {name: MetricInfo(*said) for name, said in state["metric_info"].items()}
    run = SimpleNamespace(history=state["history"], non_finite=state["non_finite"], metric_info=info)
    return best_of(cast("Run", run))


def _check_results(stored: Stored, found: Verification) -> None:
    """Check records, table and result against the ledger, the checkpoints and each other."""
    try:
        problem = _wrong_records(stored) or _wrong_result(stored) or _wrong_table(stored) or _wrong_files(stored)
    except (TrainkitError, *STRANGE) as error:
        problem = f"cannot be understood: {error!r}"
    if problem:
        found.add("results", "differs", problem)
    elif stored.result is not None:
        of = [f"{stored.entries[-1]['rows']} records", "metrics.csv", "result.json"]
        kept = [what for what in of if what != "metrics.csv" or (stored.run_dir.path / what).exists()]
        found.add("results", "proved", f"{', '.join(kept)}: fit the ledger and each other")


def _wrong_records(stored: Stored) -> str:
    """Return where metrics.jsonl differs from the ledger's hashes of it, or the empty string."""
    path = stored.run_dir.path / "metrics.jsonl"
    if not path.exists():
        return "metrics.jsonl is missing" if stored.lists("metric_log") and stored.entries[-1]["rows"] else ""
    try:
        stored.rows = _read_lines(path)
    except ValueError as error:
        return f"metrics.jsonl, {error}"
    hashes = [START]
    for row in stored.rows:
        hashes.append(link(hashes[-1], record_line(row)))
    before = 0
    for number, entry in enumerate(stored.entries, start=1):
        count = entry["rows"]
        if count >= len(hashes):
            return f"metrics.jsonl has {len(hashes) - 1} lines, and {FILE}, line {number}, counted {count}"
        if hashes[count] != entry["records"]:
            where = f"lines {before + 1} to {count}" if count > before + 1 else f"line {count}"
            return f"metrics.jsonl, {where}: not what {FILE}, line {number}, was made of"
        before = count
    if stored.ended and len(stored.rows) > before:
        return f"metrics.jsonl, line {before + 1}: was added after the run ended"
    return ""


def _wrong_table(stored: Stored) -> str:
    """Return where metrics.csv differs from the records of epochs, or the empty string."""
    path = stored.run_dir.path / "metrics.csv"
    history = stored.history()
    if not stored.ended:
        return ""
    if not path.exists():
        return "metrics.csv is missing" if stored.lists("metric_log") and history else ""
    table_ = csv.reader(io.StringIO(_text(path)))
    columns = next(table_, [])
    if len(set(columns)) < len(columns):
        return "metrics.csv, line 1: a column twice"
    if unknown := [name for name in columns if not any(name in row for row in history)]:
        return f"metrics.csv, line 1: no epoch has {unknown[0]}"
    count = 0
    for number, cells in enumerate(table_, start=2):
        if number - 2 >= len(history):
            return f"metrics.csv, line {number}: the run has {len(history)} epochs"
        record = history[number - 2]
        told = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
        for name in {**record, **told}:
            value = _finite(float(told[name])) if name in told else "absent"
            if name not in record or value != record[name]:
                return f"metrics.csv, line {number}: {name} is {value}, and {record.get(name, 'absent')} in the records"
        count = number - 1
    return "" if count == len(history) else f"metrics.csv has {count} epochs, and the run has {len(history)}"


def _finite(value: Any) -> Any:
    """Return a number as JSON holds it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wrong_result(stored: Stored) -> str:
    """Return where result.json differs from the ledger, the records and the last checkpoint, or the empty string."""
    from trainkit.recipe import load_recipe

    path = stored.run_dir.path / "result.json"
    if not path.exists():
        return ""
    result = stored.result
    if result is None:
        return "result.json: not a JSON object, or one that has a name twice"
    last, recipe = stored.entries[-1], load_recipe(stored.run_dir.recipe_path())
    claimed = dict(result["evidence"]["ledger"])
    claimed.pop("files", None)
    if claimed != {"entries": len(stored.entries), "chain": last["chain"]}:
        return f"result.json: evidence.ledger is {claimed}, and {FILE} ends with {last['chain']}"
    if result["status"] not in ("completed", "stopped", "failed"):
        return f"result.json: status is {result['status']}"
    if not stored.ended:
        return ""
    state = stored.last
    history = stored.history()
    finished = last["epoch"] >= recipe.epochs or (recipe.max_steps is not None and last["step"] >= recipe.max_steps)
    final = dict(history[-1]) if history else {}
    # With a validation split, the record behind those of the epochs is the one of the test split.
    tested = stored.rows[-1] if stored.rows else result["final"]
    final |= {name: value for name, value in tested.items() if name.startswith("test_")}
    expected: dict[str, Any] = {
        "steps": last["step"],
        "epochs": last["epoch"],
        "expected": dict(recipe.expect),
    }
    if stored.rows is not None or state is not None:
        expected["final"] = {name: value for name, value in final.items() if name not in ("epoch", "step")}
    if state is not None:
        expected["best"] = {name: {k: _finite(v) for k, v in b.items()} for name, b in _best_of(state).items()}
        expected["non_finite"] = list(state["non_finite"])
        expected["resumed"] = list(state["resumed"])
        if state["ended"] is not None:
            expected |= {"status": "stopped", "reason": state["ended"]}
        elif not (finished and result["status"] == "stopped" and result["reason"]):  # by a signal, in the last step
            expected["status"] = "completed" if finished else "stopped"
        if result["status"] == "completed":
            expected["reason"] = result["reason"] if state["non_finite"] else None
            cost = state["cost"]
            expected["images_per_second"] = (
                round(cost["images"] / cost["seconds"]["train"], 1) if cost["seconds"]["train"] else None
            )
            expected["seconds"] = {**result["seconds"], "train": round(cost["seconds"]["train"], 3)}
    for name, value in expected.items():
        if result[name] != value:
            key, mine, theirs = _first_apart(name, result[name], value)
            return f"result.json: {key} is {mine}, and the rest of the directory says {theirs}"
    return ""


def _first_apart(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """Return the key at which two values differ, and both values there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            if a.get(key, "absent") != b.get(key, "absent"):
                return _first_apart(f"{name}.{key}", a.get(key, "absent"), b.get(key, "absent"))
    return name, a, b


def _wrong_files(stored: Stored) -> str:
    """Return which of the files that say what produced the run is not as result.json noted it, or the empty string."""
    if stored.result is None:
        return ""
    then, now = stored.result["evidence"]["ledger"].get("files", {}), recorded_files(stored.run_dir.path)
    for name in {**then, **now}:
        if name not in now:
            return f"{name} is missing, and result.json noted it"
        if name not in then and not name.startswith("result.session"):
            return f"{name} was added: result.json did not note it"
        if name in then and then[name] != now[name]:
            return f"{name} was edited: result.json noted another content"
    return ""


# ---- record and machine


def _recorded(stored: Stored, place: int) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and the record that the files of a session hold: 0 for the first, -1 for the last."""
    from trainkit.provenance import from_files
    from trainkit.recipe import load_recipe

    run_dir = stored.run_dir
    plugins, environment, data = (
        _from_json(_text(run_dir.versions(name)[place]))
        for name in ("plugins.lock.json", "environment.json", "data.json")
    )
    path = run_dir.versions("recipe.yaml")[place]
    return load_recipe(path, stored.overrides), from_files(load_recipe(path), plugins, environment, data)


def _check_record(stored: Stored, found: Verification) -> list[Session]:
    """Hold what the sessions recorded against the ledger; return the sessions that changed something."""
    from trainkit.provenance import compare, digest, material

    begins = [number for number, entry in enumerate(stored.entries) if "record" in entry]
    sessions: list[Session] = []
    try:
        for first in begins:
            place = 0 if first == 0 else -1
            if first in (0, begins[-1]):
                recipe, record = _recorded(stored, place)
                if stored.entries[first]["record"] != digest(material(record)):
                    files = "recipe.yaml, plugins.lock.json, environment.json (code) or data.json"
                    found.add("record", "differs", f"{files}: not what {FILE}, line {first + 1}, was made of")
                    return []
                sessions.append(Session(first, recipe, record))
            else:
                sessions.append(Session(first, None, None))
        for number, state in stored.states.items():
            session = sessions[-1]
            if number < session.first:
                continue
            apart = [d for d in compare(session.record or {}, state["provenance"]) if d.effect == "numbers"]
            if apart:
                told = "; ".join(map(str, apart[:3]))
                found.add("record", "differs", f"a checkpoint of step {_position(state['position'])[2]}: {told}")
                return []
    except (TrainkitError, *STRANGE) as error:
        found.add("record", "differs", f"cannot be understood: {error!r}")
        return []
    changed = f"; continued with changes {len(sessions) - 1} times" if len(sessions) > 1 else ""
    found.add("record", "proved", f"recipe, code and data are those that the ledger was made of{changed}")
    return sessions


def _check_machine(stored: Stored, sessions: list[Session], found: Verification) -> bool:
    """Hold the record against this machine; return whether replaying makes sense."""
    from trainkit.provenance import compare, record

    for session in sessions:
        if session.recipe is None or session.record is None:
            session.obstacle = "the directory does not hold the recipe of that session"
            continue
        last = session is sessions[-1]
        try:
            with _computing_as(session.record):
                run = _build(session.recipe)
                differences = [d for d in compare(session.record, record(run)) if d.effect != "none"]
        except TrainkitError as error:
            session.obstacle = f"the run cannot be built here: {error}"
            if last:
                found.add("this machine", "not possible", session.obstacle)
                return False
            continue
        other = [difference for difference in differences if not _of_machine(difference)]
        session.obstacle = "; ".join(str(difference) for difference in other or differences)
        session.machine = bool(differences) and not other
        if last and other:
            found.add("this machine", "differs", f"not what made the run: {session.obstacle}")
            return False
        if last and stored.ended and stored.result and stored.result["parameters"] != run.parameters:
            found.add(
                "results",
                "differs",
                f"result.json: parameters is {stored.result['parameters']}, and the network has {run.parameters}",
            )
    found.comparable = not sessions[-1].machine
    if found.comparable:
        found.add("this machine", "proved", "code, packages, data, CPU, instruction sets and threads are as recorded")
    else:
        found.add(
            "this machine", "not possible", f"its bits cannot be compared with the run's: {sessions[-1].obstacle}"
        )
    return True


def _of_machine(difference: Difference) -> bool:
    """Tell whether a difference is one of the machine, and not of code, recipe or data."""
    return difference.key.startswith("environment.") and not difference.key.startswith("environment.trainkit")


@contextmanager
def _computing_as(record: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as a record says: sums over parts depend on it."""
    import torch

    before = torch.get_num_threads()
    then = record["environment"].get("threads")
    try:
        if isinstance(then, int) and 0 < then <= 1024:
            torch.set_num_threads(then)
        yield
    finally:
        torch.set_num_threads(before)


def _build(recipe: Recipe, wrap_call: Callable[[Any, str, str], Any] | None = None) -> Run:
    from rich.console import Console

    from trainkit.build import build

    return build(recipe, console=Console(quiet=True), wrap_call=wrap_call)


# ---- replays


def _without_observers(recipe: Recipe) -> Recipe:
    """Return a recipe without the plugins that only watch, but for the ledger and the records: they change no bit."""
    from trainkit.hooks import load_plugins
    from trainkit.plugin import is_observer

    plugins = load_plugins(recipe).plugins
    kept = {
        name: options
        for name, options in recipe.plugins.items()
        if not is_observer(type(plugins[name].instance)) or base_name(name) in ("ledger", "metric_log")
    }
    return attrs.evolve(recipe, plugins=kept)


@attrs.frozen
class Replay:
    """The ledger's entries and the records that taking some steps again gave."""

    entries: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def _replay(
    session: Session, state: Mapping[str, Any] | None, end: Mapping[str, Any], until: float, *, briefly: bool = False
) -> Replay:
    """Train again, from the seed or from a state, to an entry of the ledger or until time is over.

    Args:
        session: what to build and compute under.
        state: what to begin with; None for the seed.
        end: the last entry to reach.
        until: when to stop behind the first entry reached, on the monotonic clock.
        briefly: stop at the first entry in any case.
    """
    from trainkit.session import fit

    assert session.recipe is not None
    assert session.record is not None
    began: int | None = None  # entries before the first step

    def wrap_call(call: Any, name: str, hook: str) -> Any:
        if hook != "safe_point" or base_name(name) != "ledger":
            return call

        def watched(run: Run) -> None:
            nonlocal began
            path = cast("RunDir", run.dir).path / FILE
            began = _count_lines(path) if began is None else began
            call(run)
            place = {"epoch": run.epoch, "batch_index": run.batch_index, "step": run.step}
            # At max_steps another entry follows at the same position, and then the run ends by itself.
            if run.step > end["step"] or (_position(place) == _position(end) and not run.at_max_steps):
                run.stop("all was replayed", exit_code=143)
            elif _count_lines(path) > began and (briefly or monotonic() > until):
                run.stop("enough was replayed", exit_code=143)

        return watched

    with tempfile.TemporaryDirectory() as folder, _computing_as(session.record):
        run = _build(_without_observers(session.recipe), wrap_call)
        if state is not None:
            run.load_state_dict(state)
            run.ended = None
            for name, plugin in run.hooks.plugins.items():  # files of the replay begin where the state lies
                if isinstance(plugin.instance, Ledger):
                    fresh = Ledger().state_dict()
                    plugin.instance.load_state_dict({**fresh, "last": (run.step, run.epoch_ended, 0)})
                elif base_name(name) == "metric_log":
                    plugin.instance.load_state_dict({"rows": 0})
        path = Path(folder) / "replay"
        fit(run, path)
        log = path / "metrics.jsonl"
        return Replay(_read_lines(path / FILE), _read_lines(log) if log.exists() else [])


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def _compare_replay(stored: Stored, start: int, end: int, replay: Replay) -> tuple[int, str]:
    """Hold a replay against the ledger's entries behind `start`, up to `end`.

    Returns:
        The last entry that came out identical, and where the first difference is: empty where there is none.
    """
    states: dict[tuple[int, int, int], set[str]] = {}
    for entry in replay.entries:
        states.setdefault(_position(entry), set()).add(entry["state"])
    reached = start
    for number in range(start + 1, end + 1):
        entry = stored.entries[number]
        position = _position(entry)
        if position not in states:
            if position[2] <= replay.entries[-1]["step"]:
                return reached, f"{FILE}, line {number + 1} (step {entry['step']}): the replay has no such entry"
            break
        if entry["state"] not in states[position]:
            if number == end and _closes(stored, number):
                break
            return reached, f"{FILE}, line {number + 1} (step {entry['step']}): the replay reached another state"
        reached = number
    final = stored.entries[reached]
    mine = {_position(entry) for entry in stored.entries[start : reached + 1]}
    extra = [place for place in states if place[2] < final["step"] and place not in mine]
    if extra and len(stored.run_dir.versions("recipe.yaml")) == 1:
        return reached, f"{FILE} has no entry of step {extra[0][2]}, and the replay has one"
    if stored.rows is not None:
        # Behind a closing entry stands the record of the test split, which the evaluation is about.
        counted = stored.entries[reached - 1 if _closes(stored, reached) else reached]["rows"]
        theirs = stored.rows[stored.entries[start]["rows"] : counted]
        if wrong := _wrong_rows(stored, theirs, replay.rows, stored.entries[start]["rows"]):
            return reached, wrong
    return reached, ""


def _closes(stored: Stored, number: int) -> bool:
    """Tell whether an entry only closed a session, behind one of the same position."""
    return number > 0 and stored.entries[number]["state"] == stored.entries[number - 1]["state"]


def _wrong_rows(stored: Stored, theirs: list[dict[str, Any]], mine: list[dict[str, Any]], before: int) -> str:
    """Return where records differ from those of a replay, or the empty string.

    Observers that the replay left out may have recorded values of their own.
    """
    known = {name for row in mine for name in row} - {"epoch", "step"}
    waiting = list(mine)
    skipped = len(stored.run_dir.versions("recipe.yaml")) > 1  # how often a loss is recorded may have changed
    for number, row in enumerate(theirs, start=before + 1):
        if waiting and record_line(waiting[0]) == record_line(row):
            waiting.pop(0)
        elif skipped and not any(w["step"] == row["step"] and set(w) == set(row) for w in mine):
            continue
        elif known & set(row) or not _may_record(stored):
            return f"metrics.jsonl, line {number}: the replay recorded other values"
    if not skipped and waiting and theirs and waiting[0]["step"] < theirs[-1]["step"]:
        return f"metrics.jsonl: a record of step {waiting[0]['step']} is missing"
    return ""


def _may_record(stored: Stored) -> bool:
    """Tell whether the run had observers that a replay leaves out."""
    kept = ("ledger", "metric_log")
    return any(plugin.get("observer") and base_name(plugin["name"]) not in kept for plugin in stored.lock)


def _check_replays(
    stored: Stored, sessions: list[Session], found: Verification, *, segments: int | None, until: float
) -> None:
    """Replay from the seed, then from checkpoints on, whichever the chain's last hash draws first."""
    entries = stored.entries
    end = len(entries) - 1
    starts = sorted({0, *(number for number in stored.states if entries[number]["step"] < entries[end]["step"])})
    parts = []
    for start, after in zip(starts, [*starts[1:], end], strict=True):
        # A session that changed something begins between two entries, at a checkpoint that may be gone.
        session = max((s for s in sessions if s.first <= start + 1), key=lambda s: s.first)
        beyond = min((s.first for s in sessions if s.first > start + 1), default=end + 1)
        if (stop := min(after, beyond - 1)) > start:
            parts.append((start, stop, session))
    now = monotonic()
    if not parts or parts[0][0] != 0:
        found.add("from the seed", "not possible", "the ledger has no entry after the start")
    else:
        budget = until if len(parts) == 1 else now + (until - now) / 2
        _replay_parts(stored, parts[:1], found, what="from the seed", until=budget)
    later = [part for part in parts if part[0] != 0]
    if not later:
        found_none = "no checkpoint lies before the end; `checkpoint: {keep_every: N}` keeps some"
        if found.replayed < found.steps:
            found.add("from checkpoints", "not possible", found_none)
        return
    draw, drawn = int(entries[end]["chain"], 16), []
    while later:
        drawn.append(later.pop(draw % len(later)))
        draw //= 7
    _replay_parts(stored, drawn[:segments], found, what="from checkpoints", until=until)


def _replay_parts(
    stored: Stored, parts: Sequence[tuple[int, int, Session]], found: Verification, *, what: str, until: float
) -> None:
    """Replay parts of the run until time is over, the first one in any case."""
    done: list[tuple[int, int]] = []
    agreeing: list[str] = []
    obstacles = []
    for start, end, session in parts:
        if (done or agreeing) and monotonic() > until:
            break
        if session.obstacle and not session.machine:
            obstacles.append(session.obstacle)
            continue
        state = stored.states.get(start) if start else None
        first = stored.entries[start]
        try:
            replay = _replay(session, state, stored.entries[end], until, briefly=session.machine)
        except TrainkitError as error:
            found.add(what, "differs", f"replaying from step {first['step']} failed: {error}")
            return
        if session.machine:
            agreeing.append(_agreement(stored, start, replay))
            if agreeing[-1].startswith("line"):
                found.add(what, "differs", f"metrics.jsonl, {agreeing[-1]}")
                return
            continue
        if start == 0 and replay.entries[0]["state"] != first["state"]:
            found.add(what, "differs", f"{FILE}, line 1: the seed gives another initial state")
            return
        reached, wrong = _compare_replay(stored, start, end, replay)
        if wrong:
            found.add(what, "differs", wrong)
            return
        if reached > start:
            found.replayed += stored.entries[reached]["step"] - first["step"]
            done.append((first["step"] + 1, stored.entries[reached]["step"]))
    if done:
        ranges = _ranges(done)
        initial = "the initial weights and " if what == "from the seed" else ""
        left = len(parts) - len(done)
        more = f"; {left} of {len(parts)} parts were left out" if left else ""
        found.add(what, "proved", f"{initial}steps {ranges} came out identical{more}")
    elif agreeing:
        found.add(what, "agrees", f"{agreeing[0]}, {WITHIN}; no bit was compared")
    elif obstacles:
        found.add(what, "not possible", obstacles[0])
    else:
        found.add(what, "not possible", "no entry was reached")


def _ranges(spans: Sequence[tuple[int, int]]) -> str:
    """Return spans of steps as text, neighbours as one."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return ", ".join(f"{first:,} to {last:,}" for first, last in joined)


def _agreement(stored: Stored, start: int, replay: Replay) -> str:
    """Return what of a replay's records agrees, within the tolerance, or the line of the first that does not."""
    before = stored.entries[start]["rows"]
    compared = 0
    theirs = list(enumerate((stored.rows or [])[before:], start=before + 1))
    for row in replay.rows:
        for number, other in theirs:
            if (other["step"], set(other)) == (row["step"], set(row)) and other["epoch"] == row["epoch"]:
                for name, value in row.items():
                    if other[name] is not None and value is not None and not _is_close(name, value, other[name]):
                        return (
                            f"line {number}: {name} is {other[name]:.6g}, and a replay gave {value:.6g}, not {WITHIN}"
                        )
                    compared += name not in ("epoch", "step")
    first, last = stored.entries[start]["step"] + 1, replay.entries[-1]["step"]
    return f"{compared} values that steps {first:,} to {last:,} recorded agree" if compared else "no value was recorded"


# ---- evaluation


def _check_evaluation(stored: Stored, session: Session, found: Verification) -> None:
    """Evaluate the stored weights again, and hold the metrics against those recorded."""
    from trainkit.session import evaluate

    what = "evaluation"
    wanted = {"last": stored.last, "best": stored.best}
    assert session.recipe is not None
    assert session.record is not None
    told, apart, close = [], [], True
    try:
        with _computing_as(session.record):
            run = _build(_without_observers(session.recipe))
            for name, state in wanted.items():
                if state is None or not state["history"]:
                    continue
                if state["history"][-1]["step"] != state["position"]["step"]:
                    continue  # within an epoch
                run.load_state_dict(state)
                split = run.selection_split
                recorded = {n: v for n, v in state["history"][-1].items() if n.startswith(f"{split}_")}
                now = evaluate(run, split) if recorded else {}
                if run.data.validation is not None and name == ("best" if stored.best else "last") and stored.ended:
                    final = cast("dict[str, Any]", stored.result)["final"]
                    recorded |= {n: v for n, v in final.items() if n.startswith("test_")}
                    now |= evaluate(run, "test")
                told += [f"{name}.pt {n} {v:.6g}" for n, v in recorded.items() if v is not None]
                for n, v in recorded.items():
                    if n not in now or _finite(now[n]) != _finite(v):
                        apart.append(f"{name}.pt {n} is {now.get(n)}, and {v} was recorded")
                        close = close and n in now and v is not None and _is_close(n, now[n], v)
    except (TrainkitError, *STRANGE) as error:
        found.add(what, "differs", f"the stored weights cannot be evaluated: {error}")
        return
    if apart and not (close and session.machine):
        found.add(what, "differs", "; ".join(apart))
    elif not told:
        found.add(what, "not possible", "no checkpoint at the end of an evaluated epoch is there")
    elif session.machine:
        found.add(what, "agrees", f"{', '.join(told)}: {WITHIN}")
    else:
        found.add(what, "proved", f"{', '.join(told)}: identical")


def _is_close(name: str, now: float, then: float) -> bool:
    limit = TOLERANCE["accuracy"] if "accuracy" in name else TOLERANCE["other"] * abs(then)
    return abs(now - then) <= limit


# ---- seal

SEALED = ("*.yaml", "*.json", "*.jsonl", "*.csv", "files/*/*", "checkpoints/*.pt")
FILES = 10_000  # in an archive, at most
SMALL = 256 << 20  # bytes; an archive may unpack to so many, or to fifty times its own


def seal(run_dir: RunDir, target: Path) -> int:
    """Pack what a reviewer needs of a run, without its data set, into one archive, and return its size in bytes.

    Raises:
        UsageError: the archive exists.
    """
    if target.exists():
        raise UsageError(f"{target}: exists; choose another name with -o")
    part = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for pattern in SEALED:
                for path in sorted(run_dir.path.glob(pattern)):
                    if path.stem not in ("previous", "new"):
                        archive.write(path, path.relative_to(run_dir.path).as_posix())
        part.replace(target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


@contextmanager
def _opened(path: Path) -> Iterator[RunDir]:
    """Return a run directory, or the one that an archive of :func:`seal` holds, unpacked into a temporary folder.

    Raises:
        UsageError: it is neither.
    """
    from trainkit.rundir import RunDir

    if path.is_dir():
        yield RunDir(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _refuse_hostile(path, archive)
                archive.extractall(folder)
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise UsageError(f"{path}: neither the directory of a run nor an archive of one: {error}") from error
        yield RunDir(Path(folder))


def _refuse_hostile(path: Path, archive: zipfile.ZipFile) -> None:
    """Look at the names and sizes of what an archive holds, before anything is unpacked.

    zipfile unpacks no more of a file than the size that its archive gives.

    Raises:
        UsageError: a file would lie elsewhere, or there are more files or bytes than a run has.
    """
    listed = archive.infolist()
    names = Counter(info.filename for info in listed)
    for info in listed:
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or "" in parts[:1] or ":" in info.filename or names[info.filename] > 1:
            raise UsageError(f"{path}: refused: not an archive of trainkit: it holds {info.filename!r}")
    unpacked = sum(info.file_size for info in listed)
    if len(listed) > FILES or unpacked > max(SMALL, 50 * path.stat().st_size):
        raise UsageError(f"{path}: refused: it would unpack to {len(listed):,} files of {unpacked / 1e6:,.0f} MB")


# ---- commands


class _Verify:
    """``trainkit verify``."""

    HELP = "Check a run: its files, its record, replays of parts of it, and its final evaluation."
    EXAMPLES = """\
examples:
  trainkit verify runs/basic_se/20260101-120000-0
  trainkit verify sealed.zip --seconds inf plugins.cifar10.root=data
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run, or a sealed archive")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe: where the data lie")
        parser.add_argument("--files", action="store_true", help="hold the files against each other; train nothing")
        parser.add_argument("--segments", type=int, metavar="K", help="replay from K checkpoints at most")
        parser.add_argument(
            "--seconds", type=float, default=30.0, metavar="S", help="for replays (default: 30); inf replays every step"
        )
        parser.add_argument("--public-key", type=Path, metavar="PEM", help="whose signature an archive must have")
        add_allow_local(parser)
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write what was found as JSON")
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Check, print each line and the sentence; return 0 if all was checked and nothing differs, else 1."""
        console = terminal(stderr=args.json)
        signature = None if args.public_key is None else _signature(args.run, args.public_key)
        with _opened(args.run) as run_dir, _status(console) as progress:
            with suppress(TrainkitError):  # what is wrong with the recipe is found below
                numerics.prepare(load_recipe(run_dir.recipe_path()))
            found = verify(
                run_dir,
                segments=args.segments,
                overrides=tuple(args.overrides),
                seconds=args.seconds,
                files=args.files,
                progress=progress,
            )
        found.run = str(args.run)
        if signature is not None:
            found.checks.insert(0, signature)
        if args.output is not None:
            try:
                atomic_write(args.output, json.dumps(found.to_json(), indent=2) + "\n")
            except OSError as problem:
                raise UsageError(f"{args.output}: cannot be written: {problem.strerror}") from problem
        if args.json:
            print_json(found.to_json())
        else:
            rows = [(check.what, check.verdict, check.detail) for check in found.checks]
            made = table(["", "verdict", "what was found"], rows)
            for column in made.columns:
                column.overflow = "ellipsis" if column is not made.columns[-1] else "fold"
                column.no_wrap = column is not made.columns[-1]
            console.print(made)
            console.print(printable(found.sentence()), markup=False, highlight=False)
        return 0 if found.passed else 1


def _signing() -> Any:
    """Return the command that signs.

    Raises:
        UsageError: no package provides it.
    """
    records = installed(COMMANDS).get("runs.sign", [])
    if not records:
        raise UsageError("no installed package signs: `pip install -e ./plugins/signing` in trainkit's checkout does")
    return only("runs.sign", records, "command").load()


def _signature(path: Path, key: Path) -> Check:
    """Hold the signature beside an archive against a public key."""
    if path.is_dir():
        raise UsageError("--public-key: the directory of a run has no signature; `trainkit runs seal --sign` makes one")
    objection = _signing().objection(path, key)
    if objection:
        return Check("signature", "differs", objection)
    return Check("signature", "proved", f"of the key {key.name}, over every byte of the archive")


@contextmanager
def _status(console: Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done and how much is left, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("files", total=STAGES, completed=-1)  # the first stage begins, none is done

        def begin(stage: str) -> None:
            progress.update(task, description=stage, advance=1)

        yield begin


class _Seal:
    """``trainkit runs seal``."""

    HELP = "Pack what a reviewer needs of a run into one archive, which `trainkit verify` takes."
    EXAMPLES = "examples:\n  trainkit runs seal runs/basic_se/20260101-120000-0 -o basic_se.zip\n"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the directory's name and .zip")
        parser.add_argument("--sign", type=Path, metavar="PEM", help="sign it with this private key (plugin `signing`)")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Pack, and print where and how large."""
        from trainkit.rundir import RunDir

        run_dir = RunDir(args.run)
        run_dir.recipe_path()
        target = args.output or Path(f"{args.run.resolve().name}.zip")
        signing = None if args.sign is None else _signing()
        size = seal(run_dir, target)
        print(f"{printable(target)}: {size / 1e6:.1f} MB; check it with: trainkit verify {printable(target)}")
        if signing is not None:
            print(f"{printable(signing.sign(target, args.sign))}: its signature")
        return 0


VERIFY = _Verify
SEAL = _Seal

"""Check a run: its files, its record, replays of parts of it, and its final evaluation."""

from __future__ import annotations

import argparse
import csv
import io
import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import field

from trainkit.cli.output import print_json, printable, table, terminal
from trainkit.errors import TrainkitError, UsageError
from trainkit.rundir import RunDir, parse_json
from trainkit_ledger import FILE, START, Ledger, chain_of, link, material, record_line

if TYPE_CHECKING:
    from rich.console import Console

    from trainkit import Run
    from trainkit.provenance import Difference
    from trainkit.recipe import Recipe

__all__ = ["SEAL", "VERIFY", "Check", "Verification", "seal", "verify"]

Verdict = Literal["proved", "agrees", "differs", "not possible"]

TOLERANCE = {"accuracy": 1.0, "other": 0.05}  # percentage points of an accuracy; share of any other metric


@attrs.frozen
class Check:
    """One thing that was checked.

    Args:
        what: the subject, such as ``files`` or ``replay from the seed``.
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
    checks: list[Check] = field(factory=list)
    steps: int = 0  #: of the whole run
    replayed: int = 0  #: steps that were replayed and came out identical
    comparable: bool = True  #: whether this machine computes the same bits
    step_seconds: float = 0.0  #: time that a replayed step takes here

    def add(self, what: str, verdict: Verdict, detail: str) -> None:
        """Note a check."""
        self.checks.append(Check(what, verdict, detail))

    @property
    def proved(self) -> bool:
        """Whether nothing differs and everything was proved."""
        return bool(self.checks) and all(check.verdict == "proved" for check in self.checks)

    @property
    def differs(self) -> bool:
        """Whether anything differs from what the directory claims."""
        return any(check.verdict == "differs" for check in self.checks)

    def sentence(self) -> str:
        """Return one sentence: what was replayed, what was identical, what is taken on trust."""
        share = 100 * self.replayed / self.steps if self.steps else 0.0
        rest = max(self.steps - self.replayed, 0)
        if self.differs:
            wrong = ", ".join(check.what for check in self.checks if check.verdict == "differs")
            return f"{self.run}: NOT verified: {wrong} differ from what the directory claims."
        if not self.comparable:
            return (
                f"{self.run}: the directory agrees with itself and its metrics agree within the tolerance; this "
                f"machine does not compute the same bits, so none of its {self.steps:,} steps is proved."
            )
        open_points = ", ".join(check.what for check in self.checks if check.verdict != "proved")
        but = f" Not checked: {open_points}." if open_points else ""
        return (
            f"{self.run}: {self.replayed:,} of {self.steps:,} steps ({share:.1f} %) were replayed bit for bit, and "
            f"files and final evaluation are identical; the other {rest:,} steps are taken on trust.{but}"
        )


def verify(
    run_dir: RunDir,
    *,
    segments: int = 1,
    overrides: tuple[str, ...] = (),
    seconds: float = 60.0,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Check a run directory: its files, its record against this machine, replays, and the final evaluation.

    Args:
        run_dir: the directory of a run whose recipe listed ``ledger``.
        segments: segments between kept checkpoints that are replayed.
        overrides: of the recipe, for where the data lie.
        seconds: time after which no further entry is replayed.
        progress: told what is being done.

    Raises:
        TrainkitError: the directory is not a run's.
    """
    from trainkit.recipe import load_recipe

    found = Verification(str(run_dir.path))
    progress("files")
    first = load_recipe(run_dir.versions("recipe.yaml")[0], overrides)  # later ones are of continued sessions
    recipe = load_recipe(run_dir.recipe_path(), overrides)
    entries = _check_files(run_dir, found)
    if not entries:
        return found
    found.steps = entries[-1]["step"]
    states = _check_checkpoints(run_dir, entries, found)
    progress("record against this machine")
    if not _check_ledgers_record(run_dir, entries, found) or not _check_machine(run_dir, recipe, states, found):
        return found
    progress("replay from the seed")
    _replay_from_seed(first, entries, seconds, found)
    progress("replay between checkpoints")
    _replay_segments(recipe, entries, states, segments=segments, seconds=seconds, found=found)
    progress("final evaluation")
    _check_evaluation(run_dir, recipe, states, found)
    return found


def _check_files(run_dir: RunDir, found: Verification) -> list[dict[str, Any]]:
    """Check the chain, the records and the results against each other, and return the ledger's entries."""
    try:
        entries = rows_of(run_dir, FILE)
        chain = START
        for number, entry in enumerate(entries):
            chain = chain_of(chain, entry)
            if entry["chain"] != chain or entry["entry"] != number:
                found.add("ledger", "differs", f"{FILE}, line {number + 1}: its hash is not that of what it says")
                return []
    except OSError as error:
        found.add("ledger", "not possible", f"{FILE}: {error.strerror}; the recipe must list the plugin ledger")
        return []
    except (ValueError, KeyError, TypeError) as error:
        found.add("ledger", "differs", f"{FILE}: not a ledger: {error!r}")
        return []
    if not entries:
        found.add("ledger", "differs", f"{FILE} is empty")
        return []
    found.add("ledger", "proved", f"{len(entries)} entries, each chained to the one before")
    problem = _wrong_records(run_dir, entries) or _wrong_table(run_dir) or _wrong_result(run_dir, entries)
    if problem:
        found.add("records and results", "differs", problem)
    else:
        rows = entries[-1]["rows"]
        found.add("records and results", "proved", f"{rows} records, metrics.csv and result.json fit the ledger")
    return entries


def rows_of(run_dir: RunDir, name: str) -> list[dict[str, Any]]:
    """Return the rows of a log, one JSON document each.

    Raises:
        OSError: it is missing or no regular file.
        ValueError: a row is no JSON document.
    """
    return [parse_json(line) for line in run_dir.read_log(name).splitlines()]


def _wrong_records(run_dir: RunDir, entries: list[dict[str, Any]]) -> str:
    """Return where metrics.jsonl differs from the ledger's hashes of it, or the empty string."""
    try:
        rows = rows_of(run_dir, "metrics.jsonl")
    except (OSError, ValueError) as error:
        return f"metrics.jsonl cannot be read: {error}" if entries[-1]["rows"] else ""
    records = START
    hashes = {0: START}
    for count, row in enumerate(rows, start=1):
        records = link(records, record_line(row))
        hashes[count] = records
    before = 0
    for number, entry in enumerate(entries, start=1):
        if hashes.get(entry["rows"]) != entry["records"]:
            return f"metrics.jsonl, lines {before + 1} to {entry['rows']}: not the records of {FILE}, line {number}"
        before = entry["rows"]
    return ""


def _wrong_table(run_dir: RunDir) -> str:
    """Return where metrics.csv differs from the epochs' records in metrics.jsonl, or the empty string."""
    path = run_dir.path / "metrics.csv"
    if not path.exists():
        return ""
    records = {}
    for row in rows_of(run_dir, "metrics.jsonl"):
        if "lr" in row:  # the record of an epoch
            records[float(row["epoch"]), float(row["step"])] = row
    for number, row in enumerate(csv.DictReader(io.StringIO(run_dir.read_log(path.name).decode())), start=2):
        try:
            numbers = {name: float(text) for name, text in row.items() if text}
            record = records[numbers["epoch"], numbers["step"]]
        except (KeyError, ValueError, TypeError):
            return f"metrics.csv, line {number}: no record of such an epoch"
        for name, value in numbers.items():
            then = record.get(name)
            if not (then == value or (then is None and not math.isfinite(value))):
                return f"metrics.csv, line {number}: {name} is {value}, and {then} in metrics.jsonl"
    return ""


def _wrong_result(run_dir: RunDir, entries: list[dict[str, Any]]) -> str:
    """Return where result.json differs from the ledger and the records, or the empty string."""
    if not (run_dir.path / "result.json").exists():
        return "result.json is missing: the run goes on, or was killed"
    result = run_dir.read_json("result.json")
    last = entries[-1]
    claimed = result.get("evidence", {}).get("ledger", {})
    if claimed != {"entries": len(entries), "chain": last["chain"]}:
        return f"result.json: the ledger's last hash is {last['chain']}, and it has {claimed.get('chain')}"
    if result.get("steps") != last["step"] or result.get("epochs") != last["epoch"]:
        return f"result.json: {result.get('epochs')} epochs and {result.get('steps')} steps, and the ledger has others"
    rows = rows_of(run_dir, "metrics.jsonl")
    epochs = [row for row in rows if "lr" in row]
    tested = [row for row in rows if "lr" not in row and any(name.startswith("test_") for name in row)]
    reached = {**(epochs[-1] if epochs else {}), **(tested[-1] if tested else {})}
    for name, value in result.get("final", {}).items():
        if reached.get(name) != value:
            return f"result.json: final.{name} is {value}, and the last record has {reached.get(name)}"
    for name, best in result.get("best", {}).items():
        if not any(row.get(name) == best["value"] and row["epoch"] == best["epoch"] for row in epochs):
            return f"result.json: best.{name} is {best['value']} at epoch {best['epoch']:g}, and no record says so"
    return ""


def _check_checkpoints(
    run_dir: RunDir, entries: list[dict[str, Any]], found: Verification
) -> dict[str, dict[str, Any]]:
    """Hold the state in every checkpoint against the ledger, and return the states by file, the fitting ones."""
    from trainkit.provenance import state_digest

    positions = {_position(entry): entry for entry in entries}
    states: dict[str, dict[str, Any]] = {}
    wrong, strange = [], []
    for path in sorted((run_dir.path / "checkpoints").glob("*.pt")):
        try:
            state = run_dir.load_state(path.stem)
            entry = positions.get(_position(state["position"]))
            digest = state_digest(state)
        except (TrainkitError, KeyError, TypeError, AttributeError) as error:
            wrong.append(f"{path.name}: {error}")
            continue
        if entry is None:
            strange.append(path.name)
        elif entry["state"] != digest:
            wrong.append(f"{path.name}: its state is not that of {FILE}, line {entry['entry'] + 1}")
        else:
            states[path.stem] = state
    if wrong:
        found.add("checkpoints", "differs", "; ".join(wrong))
    elif not states:
        found.add("checkpoints", "not possible", "no checkpoint lies at an entry of the ledger")
    else:
        lost = f"; at no entry of the ledger: {', '.join(strange)}" if strange else ""
        found.add("checkpoints", "proved", f"{', '.join(states)} hold the states of the ledger{lost}")
    return states


def _position(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    return entry["epoch"], entry["batch_index"], entry["step"]


def _recorded(run_dir: RunDir, version: Literal["first", "latest"]) -> dict[str, Any]:
    """Return the record that the files of a run's first or latest session hold."""
    from trainkit.provenance import from_files
    from trainkit.recipe import load_recipe

    place = 0 if version == "first" else -1
    plugins, environment, data = (
        run_dir.read_json(run_dir.versions(name)[place].name)
        for name in ("plugins.lock.json", "environment.json", "data.json")
    )
    return from_files(load_recipe(run_dir.versions("recipe.yaml")[place]), plugins, environment, data)


def _check_ledgers_record(run_dir: RunDir, entries: list[dict[str, Any]], found: Verification) -> bool:
    """Hold what the run recorded at its start against the ledger's first entry."""
    from trainkit.provenance import digest

    try:
        same = entries[0]["record"] == digest(material(_recorded(run_dir, "first")))
    except (TrainkitError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        found.add("record", "differs", f"cannot be understood: {error!r}")
        return False
    if not same:
        files = "recipe.yaml, plugins.lock.json or data.json"
        found.add("record", "differs", f"{files} is not what {FILE}, line 1 holds")
        return False
    found.add("record", "proved", f"recipe, plugins and data are those of {FILE}, line 1")
    return True


def _check_machine(
    run_dir: RunDir, recipe: Recipe, states: Mapping[str, Mapping[str, Any]], found: Verification
) -> bool:
    """Hold the record against the checkpoints and against this machine; return whether replaying makes sense."""
    from rich.console import Console

    from trainkit import provenance
    from trainkit.build import build

    kept = _recorded(run_dir, "latest")
    if "last" in states:
        then = [str(d) for d in provenance.compare(kept, states["last"]["provenance"]) if d.effect == "numbers"]
        if then:
            found.add("record", "differs", f"last.pt was made with another record: {'; '.join(then[:3])}")
            return False
    try:
        built = build(recipe, console=Console(quiet=True))
        differences = provenance.compare(kept, provenance.record(built))
    except TrainkitError as error:
        found.add("this machine", "not possible", f"the run cannot be built here: {error}")
        return False
    changed = [difference for difference in differences if difference.effect != "none"]
    code = [difference for difference in changed if not _of_machine(difference)]
    if code:
        found.add("this machine", "differs", "; ".join(str(difference) for difference in code))
        return False
    if changed:
        found.comparable = False
        reasons = "; ".join(str(difference) for difference in changed)
        found.add("this machine", "not possible", f"bits cannot be compared: {reasons}")
    else:
        found.add(
            "this machine", "proved", "code, packages, data, CPU, instruction sets and threads are those recorded"
        )
    return True


def _of_machine(difference: Difference) -> bool:
    """Tell whether a difference is one of the machine, and not of code, recipe or data."""
    return difference.key.startswith("environment.") and not difference.key.startswith("environment.trainkit")


def _without_observers(recipe: Recipe) -> Recipe:
    """Return a recipe without the plugins that only watch, but for the ledger: they cannot change a bit."""
    from trainkit.hooks import load_plugins
    from trainkit.provenance import is_observer

    plugins = load_plugins(recipe).plugins
    kept = {
        name: options
        for name, options in recipe.plugins.items()
        if not is_observer(plugins[name]) or isinstance(plugins[name].instance, Ledger)
    }
    return attrs.evolve(recipe, plugins=kept)


@contextmanager
def _replay(recipe: Recipe, state: Mapping[str, Any] | None) -> Iterator[tuple[Run, Path]]:
    """Build a run again, from its seed or from a state, with a directory that is removed afterwards."""
    from rich.console import Console

    from trainkit.build import build

    with tempfile.TemporaryDirectory() as folder:
        run = build(_without_observers(recipe), console=Console(quiet=True))
        if state is not None:
            run.load_state_dict(state)
            # The replay has a ledger of its own, which begins where the state lies.
            for plugin in run.hooks.plugins.values():
                if isinstance(plugin.instance, Ledger):
                    plugin.instance.load_state_dict(
                        {**Ledger().state_dict(), "step": run.step, "ended": run.epoch_ended}
                    )
            run.ended = None
        yield run, Path(folder) / "replay"


def _replayed(recipe: Recipe, state: Mapping[str, Any] | None, steps: int) -> list[dict[str, Any]]:
    """Take some steps again and return the ledger's entries of these, without those that the early end adds."""
    from trainkit.session import fit

    with _replay(recipe, state) as (run, folder):
        last = run.step + steps
        fit(run, folder, max_steps=steps, eval_batches=None)
        lines = rows_of(RunDir(folder), FILE)
        return [line for line in lines if line["step"] <= last]


def _compare_entries(then: list[dict[str, Any]], now: list[dict[str, Any]], after: int) -> tuple[int, str]:
    """Return up to which step the states of two ledgers are identical beyond `after`, and where they first differ."""
    theirs: dict[tuple[int, int, int], str] = {}
    for entry in now:  # where a replay is cut short within an epoch, an entry with the record of that end follows
        theirs.setdefault(_position(entry), entry["state"])
    reached = after
    for entry in then:
        position = _position(entry)
        if entry["step"] <= after or position not in theirs:
            continue
        if theirs[position] != entry["state"]:
            return reached, f"{FILE}, line {entry['entry'] + 1} (step {entry['step']}): another state was reached"
        reached = entry["step"]
    return reached, ""


def _replay_from_seed(recipe: Recipe, entries: list[dict[str, Any]], seconds: float, found: Verification) -> None:
    what = "replay from the seed"
    if not found.comparable:
        found.add(what, "not possible", "this machine does not compute the same bits")
        return
    targets = [entry["step"] for entry in entries if entry["step"] > 0][:3]
    steps = targets[0] if targets else 0
    if not steps:
        found.add(what, "not possible", "the ledger has no entry after the start")
        return
    start = monotonic()
    now = _replayed(recipe, None, steps)
    found.step_seconds = (monotonic() - start) / steps
    if now[0]["state"] != entries[0]["state"]:
        found.add(what, "differs", f"{FILE}, line 1: the seed gives another initial state")
        return
    longer = [target for target in targets if target * found.step_seconds < seconds]
    if longer and longer[-1] > steps:
        steps = longer[-1]
        now = _replayed(recipe, None, steps)
    reached, wrong = _compare_entries(entries, now, 0)
    if wrong:
        found.add(what, "differs", wrong)
    else:
        found.replayed += reached
        found.add(what, "proved", f"the initial weights and steps 1 to {reached} came out identical")


def _replay_segments(
    recipe: Recipe,
    entries: list[dict[str, Any]],
    states: Mapping[str, dict[str, Any]],
    *,
    segments: int,
    seconds: float,
    found: Verification,
) -> None:
    """Replay from checkpoints on; which ones follows from the chain's last hash, so that nobody can choose them."""
    what = "replay between checkpoints"
    if not found.comparable:
        found.add(what, "not possible", "this machine does not compute the same bits")
        return
    last = entries[-1]["step"]
    starts = {state["position"]["step"]: state for state in states.values() if state["position"]["step"] < last}
    if not starts:
        found.add(what, "not possible", "no checkpoint lies before the end; `checkpoint: {keep_every: N}` keeps some")
        return
    draw = int(entries[-1]["chain"], 16)
    waiting = sorted(starts)
    done: list[str] = []
    while waiting and len(done) < segments:
        step = waiting.pop(draw % len(waiting))
        draw //= 7
        end = min((other for other in starts if other > step), default=last)
        targets = [entry["step"] for entry in entries if step < entry["step"] <= end]
        in_time = [target for target in targets if (target - step) * found.step_seconds < seconds]
        steps = (in_time or targets)[-1 if in_time else 0] - step
        reached, wrong = _compare_entries(entries, _replayed(recipe, starts[step], steps), step)
        if wrong:
            found.add(what, "differs", wrong)
            return
        found.replayed += reached - step
        done.append(f"{step + 1} to {reached}")
    found.add(what, "proved", f"steps {', '.join(done)} came out identical")


def _check_evaluation(
    run_dir: RunDir, recipe: Recipe, states: Mapping[str, dict[str, Any]], found: Verification
) -> None:
    """Evaluate the stored weights again, and hold the metrics against those recorded."""
    from trainkit.session import evaluate

    what = "final evaluation"
    if "last" not in states:
        found.add(what, "not possible", "there is no last.pt that fits the ledger")
        return
    state = states["last"]
    with _replay(recipe, None) as (run, _):
        run.load_state_dict(state)
        split = run.selection_split
        recorded = {name: value for name, value in state["history"][-1].items() if name.startswith(f"{split}_")}
        now = evaluate(run, split)
        if run.data.validation is not None and (tested := run_dir.read_json("result.json").get("final", {})):
            if "best" in states:
                run.load_state_dict(states["best"])
            now |= evaluate(run, "test")
            recorded |= {name: value for name, value in tested.items() if name.startswith("test_")}
    apart = [name for name, value in recorded.items() if now.get(name) != value and not _both_nan(now.get(name), value)]
    if not apart:
        found.add(what, "proved", ", ".join(f"{name} {value:.6g}" for name, value in recorded.items()))
        return
    told = ", ".join(f"{name} {now.get(name)} (recorded {recorded[name]})" for name in apart)
    close = all(_is_close(name, now.get(name), recorded[name]) for name in apart)
    found.add(what, "agrees" if close and not found.comparable else "differs", told)


def _both_nan(a: float | None, b: float) -> bool:
    return a is not None and math.isnan(a) and math.isnan(b)


def _is_close(name: str, now: float | None, then: float) -> bool:
    if now is None:
        return False
    limit = TOLERANCE["accuracy"] if "accuracy" in name else TOLERANCE["other"] * abs(then)
    return abs(now - then) <= limit


# ---- seal

SEALED = ("*.yaml", "*.json", "*.jsonl", "*.csv", "files/*/*", "checkpoints/*.pt")
LIMIT = 256 << 20  # bytes of one unpacked file


def seal(run_dir: RunDir, target: Path) -> int:
    """Pack what a reviewer needs of a run, without its data set, into one archive, and return its size in bytes.

    Raises:
        UsageError: the archive exists.
    """
    if target.exists():
        raise UsageError(f"{target}: exists; choose another name with -o")
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        for pattern in SEALED:
            for path in sorted(run_dir.path.glob(pattern)):
                if path.stem != "previous":
                    archive.write(path, path.relative_to(run_dir.path).as_posix())
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
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            for info in archive.infolist():
                parts = Path(info.filename).parts
                if info.file_size > LIMIT or ".." in parts or Path(info.filename).is_absolute():
                    raise UsageError(f"{path}: not an archive of trainkit: it holds {info.filename!r}")
                archive.extract(info, folder)
            yield RunDir(Path(folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: neither the directory of a run nor an archive of one: {error}") from error


# ---- commands


class _Verify:
    """``trainkit verify``."""

    HELP = "Check a run: its files, its record, replays of parts of it, and its final evaluation."
    EXAMPLES = """\
examples:
  trainkit verify runs/basic_se/20260101-120000-0
  trainkit verify sealed.zip --segments 3 plugins.cifar10.root=data
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run, or a sealed archive")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe: where the data lie")
        parser.add_argument("--segments", type=int, default=1, metavar="K", help="segments to replay (default: 1)")
        parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="for each replay (default: 60)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Check, print each line and the sentence; return 0 if nothing differs, else 1."""
        console = terminal(stderr=args.json)
        with _opened(args.run) as run_dir, _status(console) as progress:
            found = verify(
                run_dir,
                segments=args.segments,
                overrides=tuple(args.overrides),
                seconds=args.seconds,
                progress=progress,
            )
        found.run = str(args.run)
        if args.json:
            checks = [attrs.asdict(check) for check in found.checks]
            print_json({"checks": checks, "proved": found.proved, "sentence": found.sentence()})
        else:
            rows = [(check.what, check.verdict, check.detail) for check in found.checks]
            console.print(table(["", "verdict", "what was found"], rows))
            console.print(printable(found.sentence()), markup=False, highlight=False, soft_wrap=True)
        return 1 if found.differs or not found.checks else 0


@contextmanager
def _status(console: Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal."""
    with console.status("files") as status:
        yield status.update


class _Seal:
    """``trainkit runs seal``."""

    HELP = "Pack what a reviewer needs of a run into one archive, which `trainkit verify` takes."
    EXAMPLES = "examples:\n  trainkit runs seal runs/basic_se/20260101-120000-0 -o basic_se.zip\n"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the directory of a run")
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the directory's name and .zip")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Pack, and print where and how large."""
        from trainkit.rundir import RunDir

        run_dir = RunDir(args.run)
        run_dir.recipe_path()
        target = args.output or Path(f"{args.run.resolve().name}.zip")
        size = seal(run_dir, target)
        print(f"{printable(target)}: {size / 1e6:.1f} MB; check it with: trainkit verify {printable(target)}")
        return 0


VERIFY = _Verify
SEAL = _Seal

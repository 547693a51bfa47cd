"""Many runs: several seeds of a recipe, the variants of a study, or a recipe without each of its plugins.

A plan is made anew each time that a command is typed: which runs there should be, and where. What is there already is
left alone, what was broken off is resumed, what is missing is trained. So any of it may be killed at any moment, and
the same command goes on. Each run is a process of its own, and its directory is one like any other::

    runs/<name>/study.json             the variants, and their folders; of an ablation, too
    runs/<name>/<variant>-<digest>/    a group: the runs of one recipe that differ by their seed alone
        group.json                     recipe, its file, overrides, seeds
        seed-0/ seed-1/ ...            run directories

The digest is that of the variant's resolved recipe: a variant that was edited is another group.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import numpy as np

from trainkit.cli.output import add_allow_local, error, number, print_json, printable, table, terminal
from trainkit.errors import RecipeError, TrainkitError, UsageError, did_you_mean
from trainkit.plugin import is_observer
from trainkit.recipe import Recipe, load_recipe, read_yaml
from trainkit.registry import installed, only
from trainkit.rundir import RunDir, as_mapping, atomic_write, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ABLATE",
    "EXECUTORS",
    "RESUME",
    "SEEDS",
    "STUDY",
    "Difference",
    "Executor",
    "Group",
    "LocalProcesses",
    "PlannedRun",
    "Summary",
    "Variant",
    "compare",
    "cores",
    "facts_of",
    "groups_in",
    "listing_table",
    "open_executor",
    "plan",
    "planned_in",
    "read_study",
    "run_missing",
    "study_table",
    "summarize",
]

METRIC = "test_accuracy"
LEVEL = 0.95  # of confidence
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")  # of a variant's folder
MAX_RUNS = 10_000
NO_PART = {"seed", "description", "source", "expect", "name"}  # of what tells one recipe's results from another's
STOPPED = (130, 143)  # what a run that was asked to stop exits with
WHOLE = "all"  # the variant of an ablation that leaves nothing out
EXECUTORS = "trainkit.executors"  # entry points: see :func:`open_executor`
PROCESS = "process"  # the executor that is here without a plugin


# ---- what there should be


@attrs.frozen
class Variant:
    """A recipe of a study.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        path: the recipe's file.
        overrides: as on the command line.
        recipe: the recipe with them.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> str:
        """The name of the variant's folder."""
        plain = {key: value for key, value in self.recipe.to_dict().items() if key not in NO_PART}
        digest = blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        return f"{self.name}-{digest}"


@attrs.frozen
class PlannedRun:
    """A run that there should be.

    Args:
        variant: what it trains.
        seed: its seed.
        folder: its run directory.
    """

    variant: Variant
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """The file that what it prints goes to, where it does not go to the terminal."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def state(self) -> str:
        """Return how far it is: ``completed``, ``started``, which can be resumed, or ``missing``."""
        try:
            result = RunDir(self.folder).read_json("result.json")
            if _is_done(result):
                return "completed"
        except (TrainkitError, OSError):
            pass
        return "started" if (self.folder / "checkpoints" / "last.pt").is_file() else "missing"

    def command(self, options: Sequence[str]) -> list[str]:
        """Return the command line, without the program, that brings it to its end."""
        if self.state() == "started":
            return ["resume", str(self.folder), *options]
        seed = f"seed={self.seed}"
        return ["run", str(self.variant.path), *self.variant.overrides, seed, "--run-dir", str(self.folder), *options]


def _is_done(result: object) -> bool:
    """Tell whether nothing is left to train, be it that a plugin has ended the run for good."""
    return isinstance(result, dict) and (result.get("status") == "completed" or result.get("finished") is True)


def plan(home: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> list[PlannedRun]:
    """Return every run of a study, seed by seed, so that a study that is broken off has compared what it could.

    Args:
        home: the study's folder.
        variants: what is compared.
        seeds: of each of them.
    """
    return [PlannedRun(v, seed, home / v.folder / f"seed-{seed}") for seed in seeds for v in variants]


def check(runs: Sequence[PlannedRun]) -> None:
    """Load the plugins of every variant, with their options, so that no run fails later for what is written.

    Raises:
        RecipeError: an option is wrong.
        PluginError: a plugin is missing, or misplaced.
    """
    from trainkit.hooks import load_plugins

    for variant in {run.variant.name: run.variant for run in runs}.values():
        try:
            load_plugins(variant.recipe)
        except TrainkitError as problem:
            raise type(problem)(f"variant {variant.name}: {problem}") from problem


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that ``0-4,7`` names.

    Raises:
        UsageError: it names none, or too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not found or int(found[2] or found[1]) - int(found[1]) not in range(MAX_RUNS):
            raise UsageError(f"--seeds: {text!r}: expected numbers and ranges, such as 0-4 or 0,3,7")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))


def read_study(path: Path, overrides: Sequence[str]) -> tuple[str, list[Variant], list[int]]:
    """Read a study: its name, variants and seeds. Every recipe in it is read, so that nothing fails later for its text.

    Args:
        path: a YAML file: ``name``, ``recipe`` (beside the file), ``seeds``, ``overrides`` (of all variants), and
            ``variants``: by name a mapping of ``recipe``, ``overrides`` (key to value), ``drop`` (plugins) and ``grid``
            (key to a list of values: each combination is a variant).
        overrides: of all variants, behind their own.

    Raises:
        UsageError: a key of it is wrong.
        RecipeError: the file cannot be read, or a variant's recipe is wrong.
    """
    given = read_yaml(path, "variants")
    _known(given, ("name", "recipe", "seeds", "overrides", "variants"), f"{path}")
    name = given.get("name", path.name.partition(".")[0])
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"{path}: name: expected letters, digits, '.', '_' and '-', got {name!r}")
    variants: list[Variant] = []
    for key, value in _mapping(given.get("variants"), f"{path}: variants").items():
        place = f"{path}: variants.{key}"
        options = _mapping(value or {}, place)
        _known(options, ("recipe", "overrides", "drop", "grid"), place)
        base = options.get("recipe", given.get("recipe"))
        if not isinstance(base, str):
            raise UsageError(f"{place}: recipe: expected the name of a recipe file, got {base!r}")
        common = {**_mapping(given.get("overrides") or {}, f"{path}: overrides")}
        own = {**common, **_mapping(options.get("overrides") or {}, f"{place}.overrides")}
        own |= {f"plugins.{plugin}": False for plugin in _list(options.get("drop") or [], f"{place}.drop")}
        for suffix, chosen in _combinations(_mapping(options.get("grid") or {}, f"{place}.grid"), f"{place}.grid"):
            lines = (*(f"{k}={json.dumps(v)}" for k, v in {**own, **chosen}.items()), *overrides)
            variants.append(_variant(f"{key}{suffix}", path.parent / base, lines, place))
    seeds = given.get("seeds", [0])
    found = parse_seeds(seeds if isinstance(seeds, str) else ",".join(map(str, _list(seeds, f"{path}: seeds"))))
    if len(variants) * len(found) > MAX_RUNS:
        raise UsageError(f"{path}: {len(variants)} variants and {len(found)} seeds are more than {MAX_RUNS:,} runs")
    if not variants:
        raise UsageError(f"{path}: variants: there are none")
    return name, variants, found


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{place}: expected a mapping, got {value!r}"[:300])
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or (not value and not place.endswith(".drop")):
        raise UsageError(f"{place}: expected a list with values, got {value!r}"[:300])
    return value


def _known(given: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    for key in given:
        if key not in keys:
            raise UsageError(f"{place}: {key}: unknown key{did_you_mean(key, keys) or '; known: ' + ', '.join(keys)}")


def _combinations(grid: Mapping[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every combination of the values of a grid, with what names it: ``-lr_0.1``."""
    if not grid:
        yield "", {}
        return
    (key, values), *rest = grid.items()
    for value in _list(values, f"{place}.{key}"):
        word = re.sub(r"[^A-Za-z0-9_.]+", "_", str(value)).strip("_") or "none"
        for suffix, chosen in _combinations(dict(rest), place):
            yield f"-{key.rpartition('.')[2]}_{word}{suffix}", {key: value, **chosen}


def _variant(name: str, path: Path, overrides: Sequence[str], place: str) -> Variant:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"{place}: {name!r}: a variant's name is letters, digits, '.', '_' and '-'")
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as problem:
        raise RecipeError(f"{place}: {problem}") from problem
    return Variant(name, path, tuple(overrides), recipe)


# ---- run what is missing


class Executor(Protocol):
    """What trains runs. Several threads call :meth:`train` at once."""

    def train(self, planned: PlannedRun, options: Sequence[str], variables: Mapping[str, str]) -> int:
        """Bring a run to its end and return the exit code of its command.

        Args:
            planned: the run; its command is `planned.command(options)`.
            options: of the command line, such as ``--allow-local``.
            variables: of the environment: the cores and GPUs of this machine, shared among what is trained at once.
        """

    def stop(self, number: int) -> None:
        """Let what is being trained save and stop; called a second time, stop at once. A signal handler calls this.

        Args:
            number: the signal that asks for it.
        """


@attrs.define
class LocalProcesses:
    """Trains each run in a process of its own on this machine, ``python -m trainkit``.

    Args:
        quiet: write what runs print to their logs.
    """

    quiet: bool = False
    _running: list[subprocess.Popen[bytes]] = attrs.field(factory=list, init=False)
    _asked: bool = attrs.field(default=False, init=False)

    def train(self, planned: PlannedRun, options: Sequence[str], variables: Mapping[str, str]) -> int:
        """See :class:`Executor`."""
        # -P: no module of the folder that one stands in is imported.
        arguments = [sys.executable, "-P", "-m", "trainkit", *planned.command(options)]
        with planned.log.open("ab") if self.quiet else nullcontext() as output:
            # In this one's group Ctrl-C would reach it twice, from the terminal and from here: twice means at once.
            child = subprocess.Popen(
                arguments, env={**os.environ, **variables}, stdout=output, stderr=output, start_new_session=True
            )
            self._running.append(child)
            if self._asked:
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            self._running.remove(child)
            return code

    def stop(self, number: int) -> None:
        """See :class:`Executor`."""
        self._asked = True
        for child in self._running:
            if child.poll() is None:
                child.send_signal(number)


def open_executor(text: str, *, jobs: int, quiet: bool) -> AbstractContextManager[Executor]:
    """Return the executor that ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE`` names; it works within a ``with`` block.

    An entry point of the group ``trainkit.executors`` names a callable. It gets the settings, as text by key, and how
    many runs are trained at once; it checks the settings and returns a context manager that yields an
    :class:`Executor`.

    Args:
        text: what ``--executor`` says.
        jobs: how many runs are trained at once.
        quiet: print nothing of what runs print.

    Raises:
        UsageError: no executor has this name, or a setting is wrong.
        PluginError: its package cannot be imported.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if wrong := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise UsageError(f"--executor {name}: {wrong[0]!r}: expected KEY=VALUE")
    settings = {key: value for key, _, value in pairs}
    if name == PROCESS:
        if settings:
            raise UsageError(f"--executor {PROCESS}: it takes no settings, got {', '.join(settings)}")
        return nullcontext(LocalProcesses(quiet or jobs > 1))
    have = installed(EXECUTORS)
    if name not in have:
        known = [PROCESS, *have]
        near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"--executor: no executor {name!r}{near}")
    found: AbstractContextManager[Executor] = only(name, have[name], "executor").load()(settings, jobs)
    return found


def run_missing(
    runs: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    quiet: bool = False,
    options: Sequence[str] = (),
    executor: Executor | None = None,
) -> tuple[list[PlannedRun], int]:
    """Train what is not completed.

    Args:
        runs: from :func:`plan`.
        jobs: how many at once; cores and GPUs are shared among them.
        quiet: write what runs print to ``<run directory>.log``, as several at once always do.
        options: of each command line, such as ``--allow-local``.
        executor: what trains a run; by default :class:`LocalProcesses`.

    Returns:
        The runs that failed, and the exit code: 0, 1 where some failed, 130 or 143 where it was asked to stop.
    """
    waiting = [run for run in runs if run.state() != "completed"]
    done = len(runs) - len(waiting)
    failed: list[PlannedRun] = []
    stopped = 0
    executor = executor or LocalProcesses(quiet or jobs > 1)
    out = terminal(stderr=True)
    lock = threading.Lock()
    free = list(range(jobs))

    def train(planned: PlannedRun) -> None:
        nonlocal done, stopped
        with lock:
            if stopped or asked.code:
                stopped = stopped or asked.code
                return
            place = free.pop(0)
            said = f"{planned.folder}: {planned.state()}; {done} of {len(runs)} runs are completed"
            out.print(printable(said), markup=False, highlight=False, soft_wrap=True)
        _wait_for_others(planned, asked)
        if planned.state() == "missing":
            # It was killed before its first checkpoint: there is nothing to go on from.
            shutil.rmtree(planned.folder, ignore_errors=True)
        start = monotonic()
        code = executor.train(planned, options, _shares(place, jobs))
        with lock:
            free.append(place)
            if code in STOPPED or asked.code:
                stopped = asked.code or code
            elif code or planned.state() != "completed":
                failed.append(planned)
                out.print(printable(f"{planned.folder}: failed with exit code {code}"), markup=False, soft_wrap=True)
            else:
                done += 1
                said = f"{planned.folder}: completed in {monotonic() - start:,.0f} s"
                out.print(printable(said), markup=False, highlight=False, soft_wrap=True)

    with _passed_on(executor) as asked, ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, waiting))
    return failed, stopped or int(bool(failed))


@attrs.define
class _Asked:
    """The exit code that belongs to the signal that asked to stop; 0, while none did."""

    code: int = 0


@contextmanager
def _passed_on(executor: Executor) -> Iterator[_Asked]:
    """Pass SIGINT and SIGTERM on to the runs that are being trained, and wait for them to save."""
    asked = _Asked()

    def stop(number: int, frame: object) -> None:
        asked.code = 128 + number
        executor.stop(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_others(planned: PlannedRun, asked: _Asked) -> None:
    """Wait while another process trains the run, such as one that a killed study has left behind."""
    said = False
    while planned.folder.is_dir() and not asked.code:
        try:
            with RunDir(planned.folder).exclusive():
                return
        except UsageError as problem:
            if not said:
                terminal(stderr=True).print(printable(f"waiting: {problem}"), markup=False, soft_wrap=True)
            said = True
            sleep(1)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(place: int, jobs: int) -> dict[str, str]:
    """Return the environment variables that give one of several runs its share of cores and GPUs."""
    if jobs == 1:
        return {}
    found = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    drivers = Path("/proc/driver/nvidia/gpus")
    gpus = (
        given.split(",") if given else [str(n) for n in range(len(list(drivers.iterdir())) if drivers.is_dir() else 0)]
    )
    if len(gpus) > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    return found


# ---- what is certain


@attrs.frozen
class Summary:
    """Several values of one metric.

    Args:
        n: how many.
        mean: their mean.
        sd: their standard deviation (n - 1); None for a single one.
        interval: in which the mean of all seeds lies, at 95 % confidence, by Student's t; None for a single one.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


@attrs.frozen
class Difference:
    """The difference between the means of two groups, the first minus the second.

    Args:
        mean: the difference.
        interval: in which it lies, at 95 % confidence; None where there are too few values.
        n: values of each group that were used.
        paired: whether values of the same seed were compared, else Welch's t was used.
    """

    mean: float
    interval: tuple[float, float] | None
    n: tuple[int, int]
    paired: bool

    @property
    def certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def summarize(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and interval of values; at least one."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Summary(len(array), mean, None, None)
    sd = float(array.std(ddof=1))
    return Summary(len(array), mean, sd, _interval(mean, sd / math.sqrt(len(array)), len(array) - 1))


def compare(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Return the difference between two groups of values by seed; paired, where two seeds or more are in both."""
    common = sorted(first.keys() & second.keys())
    if len(common) > 1 or (len(common) == 1 and len(first) == len(second) == 1):
        found = summarize([first[seed] - second[seed] for seed in common])
        return Difference(found.mean, found.interval, (found.n, found.n), True)
    a, b = (np.asarray(list(values.values()), dtype=np.float64) for values in (first, second))
    mean = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(mean, None, (len(a), len(b)), False)
    parts = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    error_of_mean = math.sqrt(sum(parts))
    # Welch and Satterthwaite's degrees of freedom
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)) if error_of_mean else 1.0
    return Difference(mean, _interval(mean, error_of_mean, degrees), (len(a), len(b)), False)


def _interval(mean: float, error_of_mean: float, degrees: float) -> tuple[float, float]:
    from scipy.stats import t  # type: ignore[import-untyped]

    half = float(t.ppf((1 + LEVEL) / 2, degrees)) * error_of_mean
    return mean - half, mean + half


# ---- what there is


@attrs.frozen
class Group:
    """The runs of one recipe that differ by their seed alone, as files show them.

    Args:
        folder: where they lie.
        name: the variant's.
        seeds: those that there should be.
        results: ``result.json`` of those that are completed, by seed.
    """

    folder: Path
    name: str
    seeds: tuple[int, ...]
    results: Mapping[int, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Group:
        """Read a group's files.

        Raises:
            UsageError: it is no group.
        """
        found = RunDir(folder).read_json("group.json")
        try:
            seeds, name = tuple(map(int, found["seeds"])), str(found["variant"])
        except (KeyError, TypeError, ValueError) as problem:
            raise UsageError(f"{folder / 'group.json'}: not what trainkit writes: {problem!r}") from problem
        results = {}
        for seed in seeds[:MAX_RUNS]:
            try:
                result = RunDir(folder / f"seed-{seed}").read_json("result.json")
            except TrainkitError:
                continue
            if _is_done(result):
                results[seed] = result
        return cls(folder, name, seeds, results)

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric's last value by seed. The last, because the best of many epochs is too good."""
        return self._of("final", metric)

    def seconds(self) -> dict[int, float]:
        """Return the seconds of training by seed."""
        return self._of("seconds", "train")

    def metrics(self) -> list[str]:
        """Return the names of what the runs report at their end."""
        found = [name for result in self.results.values() for name in as_mapping(result.get("final"))]
        return [name for name in dict.fromkeys(found) if name != "lr"]

    def _of(self, part: str, key: str) -> dict[int, float]:
        found = {seed: as_mapping(result.get(part)).get(key) for seed, result in self.results.items()}
        return {seed: float(value) for seed, value in found.items() if is_number(value)}


def groups_in(folder: Path) -> list[Group]:
    """Return the groups that a folder stands for: a group, or all those of a study or an ablation; none of any other.

    Raises:
        UsageError: one of its files is not what trainkit writes.
    """
    if (folder / "study.json").is_file():
        document = RunDir(folder).read_json("study.json")
        names = as_mapping(as_mapping(document).get("variants")).values()
        return [Group.read(folder / Path(str(name)).name) for name in names]
    return [Group.read(folder)] if (folder / "group.json").is_file() else []


def groups_of(runs: Sequence[PlannedRun]) -> list[Group]:
    """Return the groups that planned runs belong to, in their order."""
    return [Group.read(folder) for folder in dict.fromkeys(run.folder.parent for run in runs)]


def write_groups(runs: Sequence[PlannedRun]) -> None:
    """Write what each group of planned runs is, before the first of them starts. Seeds that are there stay."""
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        own = [run for run in runs if run.folder.parent == folder]
        seeds = {run.seed for run in own}
        if (folder / "group.json").is_file():
            seeds |= {*Group.read(folder).seeds}
        variant = own[0].variant
        told = {
            "variant": variant.name,
            "recipe": variant.recipe.name,
            "file": _between(folder, variant.path),
            "overrides": list(variant.overrides),
        }
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "group.json", json.dumps({**told, "seeds": sorted(seeds)}, indent=2) + "\n")


def _write_study(home: Path, name: str, variants: Sequence[Variant], seeds: Sequence[int], kind: str) -> None:
    """Write which groups a folder holds; `kind` is ``study`` or ``ablation``."""
    home.mkdir(parents=True, exist_ok=True)
    folders = {variant.name: variant.folder for variant in variants}
    told = {"name": name, "kind": kind, "variants": folders, "seeds": list(seeds)}
    atomic_write(home / "study.json", json.dumps(told, indent=2) + "\n")


def _between(folder: Path, file: Path) -> str:
    """Return the path from a folder to a file, which holds where both are moved together."""
    try:
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on Windows, on another drive
        return file.resolve().as_posix()


def planned_in(folder: Path) -> list[PlannedRun]:
    """Return every run that there should be in the folder of a group, or of a study, as its files say.

    Raises:
        UsageError: it is neither, or a recipe of it was edited since.
        RecipeError: a recipe of it is gone, or wrong.
    """
    folders = [folder]
    if not (folder / "group.json").is_file():
        path = folder / "study.json"
        told = RunDir(folder).read_json("study.json")
        names = as_mapping(told).get("variants")
        if not isinstance(names, dict) or not all(isinstance(n, str) and NAME.fullmatch(n) for n in names.values()):
            raise UsageError(f"{path}: variants: expected the folder of each by its name")
        folders = [folder / name for name in names.values()]
    groups = [(_variant_of(each), Group.read(each).seeds) for each in folders]
    runs = [
        (seed, n, PlannedRun(variant, seed, each / f"seed-{seed}"))
        for n, (each, (variant, seeds)) in enumerate(zip(folders, groups, strict=True))
        for seed in seeds[:MAX_RUNS]
    ]
    return [run for *_, run in sorted(runs, key=lambda item: item[:2])]


def _variant_of(folder: Path) -> Variant:
    """Return what a group trains, from the recipe's file, which must say what it said when the group was begun."""
    path = folder / "group.json"
    told = RunDir(folder).read_json("group.json")
    name, file, overrides = (as_mapping(told).get(key) for key in ("variant", "file", "overrides"))
    if file is None:
        raise UsageError(
            f"{path}: file: an older trainkit wrote no recipe's file; type the command that began it again"
        )
    # An override without `=`, or with `-` before it, would be an option of the command that trains.
    if not (isinstance(name, str) and isinstance(file, str) and isinstance(overrides, list)) or not all(
        isinstance(each, str) and re.match(r"[^-=][^=]*=", each) for each in overrides
    ):
        raise UsageError(f"{path}: not what trainkit writes: variant, file or overrides")
    recipe = Path(os.path.relpath((folder.resolve() / file).resolve()))
    found = _variant(name, recipe, overrides, str(path))
    if found.folder != folder.resolve().name:
        raise UsageError(
            f"{folder}: {recipe} was edited since the group was begun, so its runs would not be of one recipe; undo "
            "that, or type the command that began it again: it trains the edited recipe in another folder"
        )
    return found


# ---- tables and pictures


def half(interval: tuple[float, float] | None) -> str:
    """Return ``±0.12``: how far an interval reaches from its middle."""
    return "-" if interval is None else f"±{(interval[1] - interval[0]) / 2:.3g}"


def _cells(values: Mapping[int, float]) -> list[str]:
    """Return n, mean, sd and how far the interval of the mean reaches."""
    if not values:
        return ["0", "-", "-", "-"]
    found = summarize(list(values.values()))
    sd = "-" if found.sd is None else f"{found.sd:.2g}"
    return [str(found.n), number(found.mean), sd, half(found.interval)]


def group_table(group: Group) -> Any:
    """Return a table with a row for each metric that the runs of a group report at their end."""
    rows = [[metric, *_cells(group.values(metric))] for metric in group.metrics()]
    made = table(["last epoch", "n", "mean", "sd", "95 %"], rows, right=["n", "mean", "sd", "95 %"])
    made.caption = "95 %: interval of the mean, by Student's t"
    return made


def listing_table(groups: Sequence[Group], metric: str) -> Any:
    """Return a table with a row a group, by its folder."""
    rows = []
    for group in groups:
        n, *cells = _cells(group.values(metric))
        rows.append([str(group.folder), f"{n}/{len(group.seeds)}", *cells])
    made = table(["group", "seeds", "mean", "sd", "95 %"], rows, right=["seeds", "mean", "sd", "95 %"])
    made.caption = f"{printable(metric)}, last epoch; 95 %: interval of the mean"
    return made


def study_table(groups: Sequence[Group], metric: str) -> Any:
    """Return a table with a row a variant, each compared with the first."""
    base = groups[0].name
    columns = ["variant", "n", "mean", "sd", "95 %", f"beyond {base}", "within", "train, s"]
    first = groups[0].values(metric)
    rows, how = [], set()
    for group in groups:
        values, seconds = group.values(metric), list(group.seconds().values())
        n, *cells = _cells(values)
        against = ["", ""]
        if group is not groups[0] and values and first:
            found = compare(values, first)
            against = [f"{found.mean:+.2f}", half(found.interval)]
            how.add("paired by seed" if found.paired else "Welch's t")
        time = f"{np.mean(seconds):,.1f}" if seconds else "-"
        rows.append([group.name, f"{n}/{len(group.seeds)}", *cells, *against, time])
    made = table(columns, rows, right=columns[1:], optional=["train, s", "sd"])
    compared = f"; within: of the difference ({', '.join(sorted(how))})" if how else ""
    made.caption = f"{printable(metric)}, last epoch; 95 %: interval of the mean{compared}"
    return made


def facts_of(group: Group, metrics: Sequence[str]) -> dict[str, Any]:
    """Return what JSON says of a group: for each metric n, mean, sd, interval and the values by seed."""
    found = {metric: group.values(metric) for metric in metrics}
    return {
        "folder": str(group.folder),
        "variant": group.name,
        "seeds": list(group.seeds),
        "completed": sorted(group.results),
        "metrics": {
            metric: {**attrs.asdict(summarize(list(values.values()))), "values": values}
            for metric, values in found.items()
            if values
        },
    }


def ablation_table(groups: Sequence[Group], metric: str) -> Any:
    """Return a table with a row for each plugin that was left out: what it buys, and what it costs in time."""
    whole, *others = groups
    rows = []
    for group in others:
        values, first = group.values(metric), whole.values(metric)
        name, n = group.name.removeprefix("without-"), f"{len(values)}/{len(group.seeds)}"
        if not values or not first:
            rows.append([name, n, "-", "-", "-", "nothing to compare" if group.results else "failed without it"])
            continue
        found, time = compare(first, values), compare(whole.seconds(), group.seconds())
        share = 100 * time.mean / (np.mean(list(group.seconds().values())) or 1)
        verdict = "certain" if found.certain else "may be nothing" if found.interval else "one seed tells nothing"
        verdict = "nothing" if found.interval == (0, 0) else verdict
        rows.append([name, n, f"{found.mean:+.2f}", half(found.interval), f"{share:+.0f} %", verdict])
    made = table(["plugin", "n", "buys", "95 %", "time", ""], rows, right=["n", "buys", "95 %", "time"])
    made.caption = f"what each plugin adds to {printable(metric)} of the last epoch, and to the time of training"
    return made


def forest(groups: Sequence[Group], metric: str, title: str) -> Figure:
    """Draw what each plugin buys, with its interval, and what it costs in time."""
    from matplotlib.figure import Figure

    whole, *others = groups
    shown = [group for group in others if group.values(metric) and whole.values(metric)]
    figure = Figure(figsize=(11, 1.8 + 0.5 * len(shown)), dpi=100, layout="constrained")
    buys, costs = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    for n, group in enumerate(shown):
        found = compare(whole.values(metric), group.values(metric))
        time = compare(whole.seconds(), group.seconds())
        for axes, difference, scale in ((buys, found, 1.0), (costs, time, 1.0)):
            low, high = difference.interval or (difference.mean, difference.mean)
            colour = "#0072B2" if difference.certain else "#8a8a8a"
            axes.plot([low * scale, high * scale], [n, n], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(difference.mean * scale, n, "o", color=colour, markersize=8)
    buys.set_yticks(range(len(shown)), [group.name.removeprefix("without-") for group in shown])
    buys.set_ylim(len(shown) - 0.5, -0.5)
    buys.set_xlabel(f"adds to {metric} (95 % interval)")
    costs.set_xlabel("adds to the time of training (s)")
    for axes in (buys, costs):
        axes.axvline(0, color="#444444", linewidth=1)
        axes.grid(axis="x", color="#e4e4e4")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _write_figure(figure: Figure, path: Path) -> None:
    for kind in ("png", "svg"):
        data = io.BytesIO()
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
        atomic_write(path.with_suffix(f".{kind}"), data.getvalue())


# ---- the commands


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", default=METRIC, metavar="NAME", help=f"what is compared (default: {METRIC})")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs at once (default: 1)")
    added = "".join(
        f"; {name}: {records[0].summary[:1].lower()}{records[0].summary[1:].rstrip('.')}"
        for name, records in installed(EXECUTORS).items()
    )
    parser.add_argument(
        "--executor",
        default=PROCESS,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"what trains the runs (default: {PROCESS}, on this machine{added})".replace("%", "%%"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_allow_local(parser)


def _train(
    args: argparse.Namespace, runs: Sequence[PlannedRun], write: Callable[[], None] = lambda: None
) -> tuple[list[Group], int]:
    """Train what is missing of a plan and return its groups, and the exit code.

    Args:
        args: what :func:`_common` declares.
        runs: the plan.
        write: writes what the folder of all is, once everything that was given is checked.
    """
    if args.jobs < 1:
        raise UsageError(f"--jobs: at least 1, not {args.jobs}")
    opened = open_executor(args.executor, jobs=args.jobs, quiet=args.json)
    check(runs)
    write()
    write_groups(runs)
    options = ["--allow-local"] if args.allow_local else []
    if all(run.state() == "completed" for run in runs):
        return groups_of(runs), 0
    with opened as executor:
        failed, code = run_missing(runs, jobs=args.jobs, options=options, executor=executor)
    for planned in failed:
        error(f"{planned.folder}: failed; see why: trainkit {shlex.join(planned.command(options))}")
    return groups_of(runs), code


class _Seeds:
    """``trainkit run RECIPE --seeds``."""

    HELP = "Train a recipe with several seeds, and say mean, standard deviation and interval of what is reached."
    EXAMPLES = """\
examples:
  trainkit run recipes/quickstart.yaml --seeds 0-4
  trainkit run recipes/quickstart.yaml epochs=5 --seeds 0,3,7 --jobs 2
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", type=Path, help="a recipe file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        parser.add_argument("--seeds", required=True, metavar="SEEDS", help="such as 0-9 or 0,3,7")
        _common(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Train what is missing, and print a row for each metric."""
        seeds = parse_seeds(args.seeds)
        recipe = load_recipe(args.recipe, args.overrides)
        runs = plan(Path("runs") / recipe.name, [Variant("seeds", args.recipe, tuple(args.overrides), recipe)], seeds)
        (group,), code = _train(args, runs)
        _report_seeds(group, as_json=args.json)
        return code


def _report_seeds(group: Group, *, as_json: bool) -> None:
    if as_json:
        print_json(facts_of(group, group.metrics()))
        return
    out = terminal()
    if group.results:
        out.print(group_table(group))
    said = f"{group.folder}: {len(group.results)} of {len(group.seeds)} seeds completed"
    out.print(printable(said), markup=False, highlight=False, soft_wrap=True)


class _Study:
    """``trainkit study``."""

    HELP = "Train the variants of a study, each with several seeds, and say how they differ, and how certainly."
    EXAMPLES = """\
examples:
  trainkit study recipes/paper.study.yaml plugins.cifar10.root=DIR
  trainkit study recipes/paper.study.yaml plugins.cifar10.root=DIR epochs=1 max_steps=20 -o runs/small
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("file", type=Path, metavar="FILE", help="a YAML file: see the plugin's README")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of every variant")
        parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: runs/<the study's name>")
        parser.add_argument("--seeds", metavar="SEEDS", help="in place of those of the file, such as 0-2")
        parser.add_argument("--plan", action="store_true", help="show which runs there are, and train none")
        _common(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Train what is missing, and print a row for each variant."""
        name, variants, seeds = read_study(args.file, args.overrides)
        if args.seeds:
            seeds = parse_seeds(args.seeds)
        home = args.output or Path("runs") / name
        runs = plan(home, variants, seeds)
        if args.plan:
            rows = [(run.variant.name, run.seed, run.state(), str(run.folder)) for run in runs]
            if args.json:
                print_json([dict(zip(("variant", "seed", "state", "folder"), row, strict=True)) for row in rows])
            else:
                terminal().print(table(["variant", "seed", "state", "folder"], rows, right=["seed"]))
            return 0
        groups, code = _train(args, runs, partial(_write_study, home, name, variants, seeds, "study"))
        _report_study(groups, args.metric, as_json=args.json)
        return code


def _report_study(groups: Sequence[Group], metric: str, *, as_json: bool) -> None:
    if as_json:
        print_json([facts_of(group, [metric]) for group in groups])
    else:
        terminal().print(study_table(groups, metric))


class _Ablate:
    """``trainkit ablate``."""

    HELP = "Train a recipe without each of its plugins in turn, and say what each buys, and how certainly."
    EXAMPLES = """\
examples:
  trainkit ablate recipes/quickstart.yaml --seeds 0-4
  trainkit ablate recipes/quickstart.yaml epochs=5 --plugins se,lookahead,grad_clip --seeds 0-2
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("recipe", type=Path, help="a recipe file")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace one value of the recipe")
        parser.add_argument("--plugins", metavar="NAMES", help="leave out these alone, such as se,lookahead")
        parser.add_argument("--seeds", default="0-2", metavar="SEEDS", help="default: 0-2")
        _common(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Train what is missing, print a row for each plugin, and draw."""
        seeds = parse_seeds(args.seeds)
        recipe = load_recipe(args.recipe, args.overrides)
        names = args.plugins.split(",") if args.plugins else None
        variants, passed_over = ablations(args.recipe, args.overrides, recipe, names)
        for name, reason in passed_over.items():
            terminal(stderr=True).print(printable(f"{name}: {reason}"), markup=False, highlight=False)
        home = Path("runs") / f"{recipe.name}.ablation"
        write = partial(_write_study, home, recipe.name, variants, seeds, "ablation")
        groups, code = _train(args, plan(home, variants, seeds), write)
        _report_ablation(home, groups, args.metric, passed_over, as_json=args.json)
        return code


def _report_ablation(
    home: Path, groups: Sequence[Group], metric: str, passed_over: Mapping[str, str] | None = None, *, as_json: bool
) -> None:
    title = f"{home.name.removesuffix('.ablation')}: {len(groups[0].seeds)} seeds"
    if any(group.values(metric) for group in groups[1:]):
        _write_figure(forest(groups, metric, title), home / "ablation.png")
    if as_json:
        print_json({"groups": [facts_of(group, [metric]) for group in groups], "passed_over": passed_over or {}})
        return
    out = terminal()
    out.print(ablation_table(groups, metric))
    for path in (home, *sorted(home.glob("ablation.*"))):
        out.print(printable(path), markup=False, highlight=False, soft_wrap=True)


class _Resume:
    """``trainkit resume`` of a group, a study or an ablation."""

    HELP = "Train what is missing of a group, a study or an ablation, as the command that began it does."
    EXAMPLES = """\
examples:
  trainkit resume runs/paper
  trainkit resume runs/paper --jobs 2
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("folder", type=Path, metavar="GROUP", help="the folder of a group, a study or an ablation")
        _common(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Train what is missing, and print what the command that began it prints."""
        folder: Path = args.folder
        if not any((folder / name).is_file() for name in ("group.json", "study.json")):
            raise UsageError(
                f"{folder}: not the folder of a group or a study: it holds neither group.json nor study.json; "
                "a run is resumed without --jobs, --executor and --metric"
            )
        groups, code = _train(args, planned_in(folder))
        if (folder / "group.json").is_file():
            _report_seeds(groups[0], as_json=args.json)
        elif as_mapping(RunDir(folder).read_json("study.json")).get("kind") == "ablation":
            _report_ablation(folder, groups, args.metric, as_json=args.json)
        else:
            _report_study(groups, args.metric, as_json=args.json)
        return code

    @classmethod
    def resume(cls, folder: Path, *, allow_local: bool, as_json: bool) -> int:
        """Do the same for ``trainkit resume GROUP``, which knows none of the options."""
        parser = argparse.ArgumentParser()
        cls.add_arguments(parser)
        options = [*(["--allow-local"] if allow_local else []), *(["--json"] if as_json else [])]
        return cls.run(parser.parse_args([*options, "--", str(folder)]))


def ablations(
    path: Path, overrides: Sequence[str], recipe: Recipe, names: Sequence[str] | None = None
) -> tuple[list[Variant], dict[str, str]]:
    """Return a recipe as it is, and without each plugin in turn; and why which plugins are passed over.

    Args:
        path: the recipe's file.
        overrides: of the recipe.
        recipe: the recipe with them.
        names: which plugins; by default all that may be left out.

    Raises:
        UsageError: the recipe does not list one of `names`, or it may not be left out.
    """
    from trainkit.hooks import load_plugins

    loaded = load_plugins(recipe).plugins
    for name in names or ():
        if name not in loaded:
            raise UsageError(f"--plugins: {path} lists no plugin {name!r}{did_you_mean(name, loaded)}")
    variants, passed_over = [Variant(WHOLE, path, tuple(overrides), recipe)], {}
    for name in names or loaded:
        reason = ""
        changed = (*overrides, f"plugins.{name}=false")
        if is_observer(type(loaded[name].instance)):
            reason = "only watches: leaving it out changes no number"
        else:
            try:
                shorter = load_recipe(path, changed)
                hooks = load_plugins(shorter)
                missing = [hook for hook in ("data", "model", "loss", "optimizer") if hooks.only(hook) is None]
                reason = f"nothing else provides {missing[0]!r}" if missing else ""
            except TrainkitError as problem:
                reason = str(problem)
        if reason:
            passed_over[name] = reason
            if names:
                raise UsageError(f"--plugins: {name}: {reason}")
        else:
            variants.append(_variant(f"without-{name.replace('@', '-')}", path, changed, str(path)))
    return variants, passed_over


RESUME = _Resume
SEEDS = _Seeds
STUDY = _Study
ABLATE = _Ablate

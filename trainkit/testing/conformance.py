"""What every plugin owes its users, checked in a few tiny runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from attrs import field
from torch import Tensor

from trainkit.errors import CheckpointError, TrainkitError
from trainkit.plugin import declared, hookimpl, is_observer, plugin
from trainkit.recipe import Recipe, from_dict, load_recipe, make_options
from trainkit.run import Run
from trainkit.rundir import RunDir, pack_state
from trainkit.session import fit
from trainkit.testing.fakes import build_from, run_steps

__all__ = ["LIGHT", "assert_conforms", "assert_light_imports"]

#: Modules that importing a plugin may load beyond those of torch and trainkit: matplotlib loads 175, scikit-learn 900.
LIGHT = 150


def assert_conforms(cls: type, /, *, beside: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Check what every plugin promises, in a few tiny runs of two epochs on fake data.

    * Its options, written out as a recipe and read again, are the same.
    * It imports nothing heavy with its module (:func:`assert_light_imports`).
    * Its state is kept in a checkpoint of tensors and plain values, and a run that was stopped within an epoch and
      resumed from it ends exactly as one that nothing interrupted; random numbers that are not drawn from ``run.rng``
      show here, too.
    * One that says ``observer = True`` only watches: it reports no metrics, and without it weights, optimizer and
      metrics are the same, bit for bit. What it lists as ``without_effect`` are options.
    * It leaves nothing behind, after a failure neither: no files beside the run directory, no changed setting of
      torch, no signal handlers, threads or environment variables.

    Args:
        cls: the plugin's class.
        beside: instances of the plugins that it needs, by name; copied for each run. They stand before it, unless it
            or they say otherwise with ``before`` and ``after``.
        options: its options, as a recipe gives them.

    Raises:
        AssertionError: a promise is not kept.
    """
    if not attrs.has(cls):
        raise AssertionError(f"{cls.__name__} is not decorated with @plugin")
    if hasattr(cls, "state_dict") != hasattr(cls, "load_state_dict"):
        raise AssertionError(f"{cls.__name__} needs both or none of state_dict and load_state_dict")
    _assert_declarations(cls)
    assert_light_imports(cls.__module__)
    name = cls.__module__.removeprefix("trainkit_")
    recipe = from_dict({"name": "test", "epochs": 2, "batch_size": 8, "plugins": {name: options}})
    beside = beside or {}
    late = {n: p for n, p in beside.items() if n in getattr(cls, "before", ()) or name in getattr(p, "after", ())}
    early = {n: p for n, p in beside.items() if n not in late}

    def fresh(plugins: Mapping[str, Any]) -> dict[str, Any]:
        return {n: attrs.evolve(p) for n, p in plugins.items()}  # a new instance with the same options

    def observed(folder: str, *, resume: bool = False, **observer: Any) -> Run:
        plugins = {**fresh(early), name: make_options(recipe, name, cls), **fresh(late)}
        return _observed(cls, {**plugins, "observer": _Observer(**observer)}, folder, resume)

    with tempfile.TemporaryDirectory() as folder, chdir(folder), _one_thread():
        run_steps({})  # what torch sets up on first use is not the plugin's doing
        _assert_options_survive(recipe, name, cls)
        half = observed("whole").steps_per_epoch // 2
        for epoch, batches in ((0, max(half, 1)), (1, half)):
            stopped = f"stopped-{epoch}"
            observed(stopped, at=(epoch, batches))
            observed(stopped, resume=True)
            if differing := _differing(_state(cls, "whole"), _state(cls, stopped)):
                raise AssertionError(
                    f"{cls.__name__}: stopped after {epoch} epochs and {batches} batches and resumed, it ended "
                    f"differently in {', '.join(differing[:5])}; state_dict() must return all that it remembers"
                )
        observed("failed", at=(0, max(half, 1)), fail=True)
        if is_observer(cls):
            _observed(cls, {**fresh(early), **fresh(late), "observer": _Observer()}, "without", resume=False)
            if differing := _differing(_state(cls, "whole"), _state(cls, "without"), but=f"plugins.{name}."):
                raise AssertionError(
                    f"{cls.__name__} says `observer = True`, and without it a run ends differently in "
                    f"{', '.join(differing[:5])}; drop `observer`, or leave alone what it watches"
                )


def _assert_declarations(cls: type) -> None:
    """Check what a class says of its part in a run's numbers."""
    options = {option.alias for option in attrs.fields(cls) if option.init}
    if unknown := [name for name in declared(cls, "without_effect") if name not in options]:
        raise AssertionError(f"{cls.__name__}.without_effect: {unknown[0]!r} is not one of its options")
    if is_observer(cls) and hasattr(getattr(cls, "metrics", None), "trainkit_impl"):
        raise AssertionError(
            f"{cls.__name__} says `observer = True` and reports metrics, which a run's records would lack without it; "
            "drop `observer`"
        )


def assert_light_imports(*modules: str) -> None:
    """Check that importing modules stays cheap: whoever shows, checks or runs a recipe imports its plugins.

    They are imported by a new interpreter, in which torch and trainkit are there already. That takes seconds, so give
    several at once; what has passed is not imported again.

    Args:
        modules: names of modules.

    Raises:
        AssertionError: a module cannot be imported, or loads more than :data:`LIGHT` others.
    """
    unknown = [module for module in modules if module not in _found_light]
    if not unknown:
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", _COUNT_IMPORTS, *unknown]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"importing {', '.join(unknown)} failed: {done.stderr.splitlines()[-1]}")
    for module, packages in json.loads(done.stdout.splitlines()[-1]).items():
        if (total := sum(packages.values())) > LIGHT:
            most = ", ".join(sorted(packages, key=packages.__getitem__, reverse=True)[:3])
            raise AssertionError(
                f"importing {module} loads {total} modules, most of them of {most}; "
                "import them inside the functions that use them"
            )
        _found_light.add(module)


_found_light: set[str] = set()
_COUNT_IMPORTS = """
import gc, json, sys
gc.disable()  # a quarter of the time of importing torch
from collections import Counter
from importlib import import_module
import trainkit.testing
counts = {}
for module in sys.argv[1:]:
    before = set(sys.modules)
    import_module(module)
    counts[module] = Counter(name.partition(".")[0] for name in sys.modules if name not in before)
print(json.dumps(counts))
"""


@plugin
class _Observer:
    """Stands last: ends a run at a position, saves it there and at its end, and measures the evaluated weights."""

    without_effect: ClassVar = ("at", "fail")

    at: tuple[int, int] | None = None  # epochs, and batches of the next one
    fail: bool = False
    losses: list[Tensor] = field(init=False, factory=list)

    @hookimpl
    def step_end(self, run: Run) -> None:
        if self.at is not None and (run.epoch, run.batch_index) >= self.at:
            if self.fail:
                raise _MadeFailureError
            run.stop("observer", exit_code=143)  # to be continued

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.stop_reason is not None or run.finished:
            assert run.dir is not None
            run.dir.write("checkpoints/observed.pt", pack_state(run.state_dict()))

    @hookimpl
    def forward_end(self, run: Run, loss: Tensor) -> None:
        if run.split != "train":
            self.losses.append(loss.detach())

    @hookimpl
    def metrics(self, split: str) -> dict[str, Tensor] | None:
        if split == "train" or not self.losses:
            return None
        losses, self.losses = self.losses, []
        return {"observed_loss": torch.stack(losses).sum()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: with images this small, several spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _MadeFailureError(Exception):
    """Made, to see what a failure leaves behind."""


def _assert_options_survive(recipe: Recipe, name: str, cls: type) -> None:
    """Write all options of a plugin out, defaults too, and read them again."""
    made = make_options(recipe, name, cls)
    options = {f.alias: _as_in_yaml(getattr(made, f.name)) for f in attrs.fields(cls) if f.init}
    path = Path("recipe.yaml")
    path.write_text(attrs.evolve(recipe, plugins={name: options}).to_yaml())
    again = make_options(load_recipe(path), name, cls)
    path.unlink()
    for f in (f for f in attrs.fields(cls) if f.init):
        before, after = getattr(made, f.name), getattr(again, f.name)
        if before != after:
            raise AssertionError(f"{cls.__name__}.{f.alias}: {before!r} came back from a recipe as {after!r}")


def _as_in_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _as_in_yaml(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_in_yaml(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _observed(cls: type, plugins: Mapping[str, Any], folder: str, resume: bool) -> Run:
    """Train in a folder and hold what is left behind against what was there before."""
    before = _surroundings(folder)
    run = build_from(plugins, {"epochs": 2})
    if resume:
        run.load_state_dict(_state(cls, folder))
        run.dir = RunDir(Path(folder))
    observer = plugins["observer"]
    try:
        fit(run, None if resume else folder)
    except TrainkitError as error:
        if not isinstance(error.__cause__, _MadeFailureError):
            raise
    else:
        if observer.at is not None and run.stop_reason != "observer":
            raise AssertionError(f"{cls.__name__}: a run ended by itself before it was stopped: {run.stop_reason}")
    after = _surroundings(folder)
    if left := [what for what in before if _left_behind(before[what], after[what])]:
        raise AssertionError(f"{cls.__name__} left behind or changed: {', '.join(left)} (in the run {folder!r})")
    return run


def _surroundings(folder: str) -> dict[str, Any]:
    """Return what a run must leave as it was."""
    return {
        "files beside the run directory": set(os.listdir()) - {folder},
        "the current directory": os.getcwd(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of matrix products": torch.get_float32_matmul_precision(),
        "cuDNN's flags": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": {thread.name for thread in threading.enumerate()},
        "environment variables": dict(os.environ),
        "standard streams": (sys.stdin, sys.stdout, sys.stderr),
    }


def _left_behind(before: Any, after: Any) -> bool:
    """Tell whether a value changed, or a set (of files, of threads) grew; what goes meanwhile is not ours."""
    return bool(after - before) if isinstance(after, set) else bool(before != after)


def _state(cls: type, folder: str) -> dict[str, Any]:
    try:
        return RunDir(Path(folder)).load_state("observed")
    except CheckpointError as error:
        raise AssertionError(f"{cls.__name__}: {error}") from error


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], but: str | None = None) -> list[str]:
    """Return the keys at which two states of a run differ, of what a result depends on, but those with a prefix."""
    parts = ("model", "optimizer", "schedules", "plugins", "position", "history")
    flat_a, flat_b = ({k: v for part in parts for k, v in _flat(state[part], part).items()} for state in (a, b))
    keys = [key for key in {**flat_a, **flat_b} if but is None or not key.startswith(but)]
    return [key for key in keys if flat_a.get(key) != flat_b.get(key)]


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Return nested values by dotted key, each as something that is equal only where they are, not-a-number too."""
    if isinstance(value, Tensor):
        return {key: (value.dtype, value.shape, value.flatten().view(torch.uint8).numpy().tobytes())}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}").items()}
    return {key: repr(value)}

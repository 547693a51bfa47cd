"""Sessions: fit, evaluate, resume, with run directory, signals and result; the loop itself is in trainer.py."""

from __future__ import annotations

import copy
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import attrs

from trainkit import provenance
from trainkit.build import build, check_optimizer
from trainkit.errors import PluginError, RecipeError, RunError, TrainkitError, UsageError
from trainkit.local import local_files
from trainkit.recipe import Recipe, load_recipe, needed_files, recipe_files
from trainkit.run import Run, best_of, to_host
from trainkit.rundir import MAX_CHECKPOINT, RunDir, read_regular
from trainkit.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Result", "evaluate", "fit", "reopen", "resume"]


@attrs.frozen(kw_only=True)
class Result:
    """How a run ended; ``result.json`` holds the same.

    Args:
        status: ``completed``, ``stopped`` (at a safe point, by a plugin or a signal) or ``failed``.
        reason: why it stopped or failed.
        epochs: epochs completed.
        steps: optimizer steps taken.
        parameters: trainable values of the network as it was built, each shared one counted once.
        final: the last epoch's metrics, and those of the test split where it was evaluated at the end.
        best: for each metric that says what is better its best value and the epoch.
        better: for each of these metrics whether ``less`` or ``more`` is better.
        expected: what the recipe says it should reach.
        seconds: wall time of training, of evaluation, and in total, over all sessions.
        images_per_second: training images over the time of training.
        non_finite: epochs that ended with weights or metrics that are not finite; none of them is ever the best.
        resumed: where the run was continued, and what was changed then.
        evidence: what plugins add, by plugin.
        finished: whether nothing is left to train: all epochs, or a plugin has ended the run for good.
        path: the run directory, as given; not part of ``result.json``.
    """

    status: Literal["completed", "stopped", "failed"]
    reason: str | None = None
    epochs: int
    steps: int
    parameters: int
    final: dict[str, float]
    best: dict[str, dict[str, float]]
    expected: dict[str, int | float]
    seconds: dict[str, float]
    images_per_second: float | None
    non_finite: list[float] = attrs.field(factory=list)
    resumed: list[dict[str, Any]] = attrs.field(factory=list)
    evidence: dict[str, Any] = attrs.field(factory=dict)
    finished: bool = False
    better: dict[str, str] = attrs.field(factory=dict)
    path: Path | None = None

    def _repr_html_(self) -> str:
        """Show the result in a notebook: what was expected and reached, and the run's pictures."""
        from trainkit.notebook import result_html

        return result_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``result.json`` holds."""
        plain: dict[str, Any] = attrs.asdict(self, filter=lambda attribute, _: attribute.name != "path")
        return plain


def fit(
    run: Run, run_dir: str | Path | None = None, *, max_steps: int | None = None, eval_batches: int | None = None
) -> Result:
    """Train a run from its position to its end and return what came of it.

    The first Ctrl-C stops at the next safe point, and the result's status is then ``stopped``; a second one raises
    ``KeyboardInterrupt`` at once. Signal handlers are put back afterwards, so a notebook stays usable, and the run may
    be evaluated, or fitted again from where it stopped.

    Args:
        run: from :func:`trainkit.build`.
        run_dir: a new directory to write to; by default ``runs/<recipe>/<time>-<seed>``. A run keeps its directory.
        max_steps: stop after so many steps of this session; a check, not a result.
        eval_batches: evaluate only so many batches of a split; a check, not a result.

    Raises:
        TrainkitError: the run directory cannot be made, or the run fails.
    """
    if run.failed:
        raise UsageError(
            f"the run {run.recipe.name!r} has failed, within a step perhaps; continue it from its last checkpoint with "
            "trainkit.resume, or build it again"
        )
    if run.is_stopping():  # this process asked it to stop, and now to go on
        run.ended = None
    new = run.dir is None
    if run.dir is None:
        given = Path(run_dir) if run_dir is not None else None
        run.dir = RunDir(Path(run.processes.from_first(lambda: str(RunDir.create(run.recipe, given).path))))
        run.processes.remember_run(str(run.dir.path))
    elif run_dir is not None and Path(run_dir).resolve() != run.dir.path.resolve():
        raise UsageError(
            f"{run_dir}: this run writes to {run.dir.path}, and a run keeps its directory; build it again to write "
            "elsewhere"
        )
    elif run.finished and (recorded := _recorded_result(run.dir)):
        return recorded  # nothing is left to do, so no file is touched
    run.stop_reason, run.exit_code = None, 0
    if not run.finished:
        run.tested = {}  # of the weights at an earlier stop; those at the end are tested again
    with _locked(run, run.dir, new):
        _refuse_overtaken(run, run.dir, new)
        if run.rank == 0:
            run.dir.remove_parts()
        step = run.step
        try:
            return _fit(run, run.dir, Trainer(run, max_steps=max_steps, eval_batches=eval_batches))
        except TrainkitError:
            if new and not run.failed and run.step == step:  # nothing has begun, so nothing is left behind
                shutil.rmtree(run.dir.path, ignore_errors=run.rank > 0)
                run.dir = None
            raise


@contextmanager
def _locked(run: Run, run_dir: RunDir, new: bool) -> Iterator[None]:
    """Keep the directory for this process; a new run must be the first to have it.

    Of the processes that train a run together, the first one keeps it.

    Raises:
        UsageError: another process holds it, or took it between its making and now. Nothing in it is touched.
    """
    if run.rank > 0:
        yield
        return
    try:
        with run_dir.exclusive():
            if new and any(run_dir.path.iterdir()):
                raise UsageError(
                    f"run directory {run_dir.path}: another process began a run there; give a new directory"
                )
            yield
    except UsageError:
        if new:
            run.dir = None
        raise


def _recorded_result(run_dir: RunDir) -> Result | None:
    """Return the result that a directory holds, or None where there is none of a run that has ended."""
    try:
        found = run_dir.read_json("result.json")
        result = Result(**found, path=run_dir.path)
    except (UsageError, TypeError):
        return None
    return None if result.status == "failed" else result


def _refuse_overtaken(run: Run, run_dir: RunDir, new: bool) -> None:
    """Refuse to continue from a checkpoint that another process has left behind since it was read.

    Raises:
        UsageError: the directory's checkpoint lies at another position.
    """
    if new or not (run_dir.path / "checkpoints" / "last.pt").exists():
        return
    position = run_dir.load_latest()[0].get("position", {})
    if run.reopened and (position.get("epoch"), position.get("step")) != (run.epoch, run.step):
        raise UsageError(
            f"{run_dir.path}: another process has continued this run meanwhile, to step {position.get('step')}; resume "
            "it again to go on from there"
        )


def _fit(run: Run, run_dir: RunDir, trainer: Trainer) -> Result:
    run.reopened = False
    run.provenance = provenance.record(run)
    already = provenance.of_contents(run.provenance["replaced"])
    run.built = attrs.evolve(run.built, contents=provenance.contents(run), already=already)
    completed = None
    if run.rank == 0:
        run_dir.add("recipe.yaml", _keep_files(run, run_dir).to_yaml())
        provenance.write(run.provenance, run_dir)
        completed = _set_result_aside(run_dir)
    start, before = perf_counter(), run.seconds["total"]
    error: BaseException | None = None
    with _signals(run):
        try:
            with run.hooks.blaming(PluginError):
                for impl in run.hooks.implementations("fit_start"):
                    impl(run)
                    check_optimizer(run, f"{impl.plugin}, fit_start")
            run.failed = True  # until the end: whatever is raised from here on is the run's failure
            with run.hooks.blaming(RunError):
                trainer.train()
                _test(run, trainer)
                run.flush_log()
            run.failed = False
            if run.finished and _is_complete(run):  # a stop that came too late changes nothing
                run.stop_reason, run.exit_code = None, 0
        except BaseException as caught:
            error = caught
            with suppress(Exception):  # what was seen before the failure; a lost device cannot tell
                run.flush_log()
        try:
            error = _fit_end(run, error)
        finally:
            run.seconds["total"] = before + perf_counter() - start
            result = _result(run, error)
            if error is not None and completed is not None:
                completed.replace(run_dir.path / "result.json")  # what was reached before stays reached
            elif run.rank == 0:
                run_dir.write_json("result.json", result.to_dict())
            for batches in run.batches.values():
                batches.close()
        error = _result_written(run, result, error)
    if error is None:
        run.built = attrs.evolve(run.built, contents=provenance.contents(run))  # trained meanwhile
    if run.failed and isinstance(error, TrainkitError) and not isinstance(error, RunError):
        raise RunError(str(error)) from error
    if error is not None:
        raise error
    return result


def _keep_files(run: Run, run_dir: RunDir) -> Recipe:
    """Copy the files beside the recipe that it names into the run directory, and return the recipe that names those."""
    home = run_dir.path.resolve()
    local = []
    for name, file in local_files(run.recipe).items():
        path = file
        if not file.resolve().is_relative_to(home):
            path = run_dir.write(f"files/local/{name.removeprefix('files/local/')}", read_regular(file, MAX_CHECKPOINT))
        local.append(path.resolve().relative_to(home).as_posix())
    plugins = dict(run.recipe.plugins)
    for name, plugin in run.hooks.plugins.items():
        for option in recipe_files(type(plugin.instance)):
            path = getattr(plugin.instance, option)
            if path is None:
                continue
            if not path.resolve().is_relative_to(home):
                for inner, file in needed_files(type(plugin.instance), option, path).items():
                    try:
                        run_dir.write(f"files/{name}/{inner}", read_regular(file, MAX_CHECKPOINT))
                    except OSError as error:
                        raise RecipeError(
                            f"{run.recipe.where}: plugins.{name}.{option}: {file}: cannot be read: {error.strerror}"
                        ) from error
                path = run_dir.path / "files" / name / path.name
            kept = path.resolve().relative_to(home).as_posix()
            plugins[name] = {**plugins.get(name, {}), option: kept}
    return attrs.evolve(run.recipe, plugins=plugins, local=local)


def _set_result_aside(run_dir: RunDir) -> Path | None:
    """Keep the result of an earlier session under another name, and return its path if that session completed the run.

    A run that goes on has no ``result.json`` until it ends.
    """
    path = run_dir.path / "result.json"
    if not path.exists():
        return None
    earlier = _recorded_result(run_dir)
    number = 1
    while (kept := run_dir.path / f"result.session-{number}.json").exists():
        number += 1
    path.replace(kept)
    return kept if earlier is not None and earlier.status == "completed" else None


def _test(run: Run, trainer: Trainer) -> None:
    """With a validation split, evaluate the test split once, when the run has ended, on the selected weights.

    These are the weights of ``best.pt``, where a plugin saved it, else the last ones. The run itself keeps its last
    weights.
    """
    ended = run.finished or trainer.trial_over
    if run.data.validation is None or run.tested or not ended:
        return
    run.stop_reason, reason = None, run.stop_reason
    last = copy.deepcopy(run.state_dict())
    assert run.dir is not None
    selected = "last"
    if (run.dir.path / "checkpoints" / "best.pt").exists():
        selected = "best"
        run.load_state_dict(run.dir.load_state("best"))
    epoch = run.epoch
    metrics = trainer.evaluate("test")
    info = {name: run.metric_info[name] for name in metrics}
    run.load_state_dict(last)
    run.metric_info.update(info)
    if run.is_stopping():  # asked to stop meanwhile, so not all of it was seen: resuming repeats it
        return
    run.stop_reason = reason
    (run.tested,) = to_host([{name: metric.value for name, metric in metrics.items()}])
    run.console.print(f"test split evaluated once, on the {selected} weights (epoch {epoch})", highlight=False)
    run.log(run.tested)


def evaluate(run: Run, split: str | None = None, *, eval_batches: int | None = None) -> dict[str, float]:
    """Evaluate the run's model, as it is, and return its metrics, ``<split>_<name>``.

    Args:
        run: from :func:`trainkit.build`; whether it was fitted, stopped or interrupted does not matter.
        split: a split's name; by default ``test``.
        eval_batches: evaluate only so many batches.

    Raises:
        UsageError: the data have no such split.
    """
    split = split or "test"
    if split not in run.data.splits:
        raise UsageError(f"no split {split!r}; the data have {', '.join(run.data.splits)}")
    before, run.stop_reason = run.stop_reason, None
    try:
        with run.hooks.blaming(RunError):
            metrics = Trainer(run, eval_batches=eval_batches).evaluate(split)
        (record,) = to_host([{name: metric.value for name, metric in metrics.items()}])
        return record
    finally:
        run.stop_reason = before
        for batches in run.batches.values():
            batches.close()


def resume(
    run_dir: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    plugins: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
) -> Result:
    """Continue a run from its last checkpoint, exactly, to its end.

    Args:
        run_dir: the directory of a run.
        overrides: values of its recipe to replace, as for :func:`trainkit.load_recipe`.
        plugins: instances by name, where it was built with such.
        allow_changes: continue although the result will differ; what differs is recorded.

    Raises:
        TrainkitError: something that matters has changed, or the run fails.
    """
    return fit(reopen(run_dir, overrides, plugins=plugins, allow_changes=allow_changes))


def reopen(
    run_dir: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    plugins: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
    console: Console | None = None,
) -> Run:
    """Build a run again and load its last checkpoint, ready for :func:`trainkit.fit` to continue it.

    Arguments and errors are those of :func:`resume`.
    """
    directory = RunDir(Path(run_dir))
    recipe = load_recipe(directory.recipe_path(), overrides)
    state, notice = directory.load_latest()
    run = build(recipe, plugins=plugins, console=console)
    if notice:
        _say(run, notice)
    kept = provenance.of_contents(provenance.of_state(state).get("replaced", ()))
    run.built = attrs.evolve(run.built, already=kept)
    differences = provenance.compare_state(state, run)
    recorded = _recorded_result(directory)
    if not overrides and recorded is not None and recorded.status == "completed" and _is_at_end(state, recipe):
        differences = []  # nothing is left to train, so nothing can change a number
    changes = [str(difference) for difference in differences if difference.effect == "numbers"]
    length = [str(difference) for difference in differences if difference.effect == "length"]
    if changes and not allow_changes:
        raise RecipeError(
            f"{run_dir}: would not continue exactly: {'; '.join(changes)}; undo that, or pass --allow-changes"
        )
    _refuse_void(run, changes)
    if length and isinstance(state.get("schedules"), list):
        _refuse_longer_schedules(run, state)
    run.load_state_dict(state)
    run.dir, run.reopened = directory, True
    if changes or length:
        run.ended = None
    if run.finished and overrides:
        raise RecipeError(
            f"{run_dir}: nothing is left to train: it has completed {run.epoch} epochs and {run.step} steps"
            + (f" ({run.ended})" if run.ended else "")
            + "; give more epochs, or more max_steps"
        )
    notes = [str(difference) for difference in differences if difference.effect == "none"]
    if notes:
        _say(run, f"changed, without effect on any number: {'; '.join(notes)}")
    if not run.finished:
        run.resumed.append({"epoch": run.epoch, "step": run.step, "changes": changes + length})
    return run


def open_checkpoint(
    run_dir: str | Path,
    checkpoint: str = "best",
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    allow_changes: bool = False,
    console: Console | None = None,
) -> Run:
    """Build a run again and load one of its checkpoints, to evaluate it; say what differs from how it was trained.

    Args:
        run_dir: the directory of a run.
        checkpoint: the name of a file in ``checkpoints/``.
        overrides: values of its recipe to replace, as for :func:`trainkit.load_recipe`.
        allow_changes: whether classes or code may differ.
        console: where plugins print for people; by default the standard output.

    Raises:
        RecipeError: classes or code differ from those that the weights were trained with.
        TrainkitError: the directory is not that of a run, or has no such checkpoint.
    """
    directory = RunDir(Path(run_dir))
    recipe = load_recipe(directory.recipe_path(), overrides)
    state = directory.load_state(checkpoint)
    run = build(recipe, console=console)
    differences = provenance.compare_state(state, run)
    changes = [difference for difference in differences if difference.effect == "numbers"]
    if (grave := [str(change) for change in changes if change.is_of_meaning]) and not allow_changes:
        raise RecipeError(
            f"{run_dir}: its metrics would not mean what they meant in training: {'; '.join(grave)}; undo that, "
            "or pass --allow-changes"
        )
    if changes:
        _say(run, f"not evaluated as it was trained: {'; '.join(map(str, changes))}")
    run.load_state_dict(state)
    return run


def _is_at_end(state: Mapping[str, Any], recipe: Recipe) -> bool:
    """Tell whether a checkpoint lies where its run ends; a session of a few steps is completed before that."""
    position = state.get("position", {})
    at_max_steps = recipe.max_steps is not None and position.get("step", 0) >= recipe.max_steps
    return bool(position.get("epoch", 0) >= recipe.epochs or at_max_steps or state.get("ended") is not None)


def _refuse_longer_schedules(run: Run, state: Mapping[str, Any]) -> None:
    """Refuse to train longer than a schedule was made for: beyond its end it would climb again, or fail.

    A scheduler whose state says ``stretch: True`` takes its state to a longer run itself.

    Raises:
        RecipeError: a schedule's saved length (torch's ``T_max`` or ``total_steps``) is less than the run's.
    """
    for schedule, saved in zip(run.schedules, state["schedules"], strict=False):
        now = schedule.scheduler.state_dict()
        for name in ("T_max", "total_steps"):
            if now.get("stretch") is not True and name in saved and name in now and saved[name] < now[name]:
                stretch = ", or set its option `stretch: true`, which says how it goes on" if "stretch" in now else ""
                raise RecipeError(
                    f"{run.recipe.where}: {run.hooks.named('scheduler')}: the schedule was made for {saved[name]} "
                    f"{schedule.unit}s and the run would last {now[name]}; a learning rate that has come down would "
                    f"climb again. Start a new run of that length{stretch}"
                )


def _say(run: Run, text: str) -> None:
    text = "".join(c if c.isprintable() else "?" for c in text)
    run.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _refuse_void(run: Run, changes: list[str]) -> None:
    """Refuse changes that would be recorded and have no effect, whatever is allowed.

    Raises:
        RecipeError: options of the optimizer or of a schedule differ; their values are part of the saved state.
    """
    providers = {impl.plugin.name for hook in ("optimizer", "scheduler") for impl in run.hooks.implementations(hook)}
    void = [change for change in changes if change.startswith(tuple(f"plugins.{name}." for name in providers))]
    if void:
        raise RecipeError(
            f"{run.recipe.where}: {'; '.join(void)}: the checkpoint holds the optimizer and its schedules with the "
            "values they had, and a change would not reach them; undo it, or start a new run"
        )


def _fit_end(run: Run, error: BaseException | None) -> BaseException | None:
    """Fire ``fit_end`` for every plugin, in reverse order, whatever the others do, and return the run's first error."""
    for impl in reversed(run.hooks.implementations("fit_end")):
        try:
            with run.hooks.blaming(RunError):
                impl(run, error)
        except Exception as caught:
            run.failed = run.failed or error is None
            error = error or caught
    return error


def _result_written(run: Run, result: Result, error: BaseException | None) -> BaseException | None:
    """Fire ``result_written`` for every plugin, whatever the others do, and return the run's first error."""
    for impl in run.hooks.implementations("result_written"):
        try:
            with run.hooks.blaming(RunError):
                impl(run, result)
        except Exception as caught:
            error = error or caught
    return error


def _is_complete(run: Run) -> bool:
    """Tell whether all is trained that this session was to train, and the test split evaluated where it is due."""
    tested = run.data.validation is None or bool(run.tested) or not run.finished
    stopped = run.is_stopping() and not run.finished
    return tested and run.ended is None and not stopped


def _result(run: Run, error: BaseException | None) -> Result:
    reason = f"{type(error).__name__}: {error}" if error is not None else run.stop_reason or run.ended
    if reason is None and run.history and run.history[-1]["epoch"] in run.non_finite:
        reason = f"weights or metrics are not finite since epoch {run.non_finite[0]:g}"
    last = run.history[-1] if run.history else {}
    return Result(
        status="failed" if error is not None else "completed" if _is_complete(run) else "stopped",
        finished=error is None and run.finished and (_is_complete(run) or run.ended is not None),
        reason=reason,
        epochs=run.epoch,
        steps=run.step,
        parameters=run.parameters,
        final={name: value for name, value in {**last, **run.tested}.items() if name not in ("epoch", "step")},
        best=best_of(run),
        expected=dict(run.recipe.expect),
        seconds={part: round(seconds, 3) for part, seconds in run.seconds.items()},
        images_per_second=round(run.images / run.seconds["train"], 1) if run.seconds["train"] else None,
        non_finite=run.non_finite,
        resumed=run.resumed,
        evidence=run.evidence,
        better={name: info.better for name, info in run.metric_info.items() if info.better is not None},
        path=run.dir.path if run.dir else None,
    )


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into a stop at the next safe point; a second Ctrl-C acts at once.

    ``timeout`` and ``kill`` of a process group send the same signal twice, so a second SIGTERM changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        interrupted = interrupted or number == signal.SIGINT
        run.stop(signal.Signals(number).name, exit_code=128 + number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

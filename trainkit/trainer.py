"""The loop. It fires hooks and keeps counters; everything else is a plugin's.

Nothing here waits for the device but the end of a pass over a split: no ``.item()``, no copy to the host, no list that
grows.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from trainkit import provenance
from trainkit.data import Batch, epoch_permutation
from trainkit.errors import PluginError, RunError, TrainkitError
from trainkit.rng import torch_seed
from trainkit.run import Run, best_of, check_optimizer, count_parameters, to_host
from trainkit.rundir import RunDir

__all__ = ["Result", "Trainer", "evaluate", "fit"]

FLUSH_EVERY = 50  # records that wait on the device before they are copied to the host together


@attrs.frozen(kw_only=True)
class Result:
    """How a run ended; ``result.json`` holds the same.

    Args:
        status: ``completed``, ``stopped`` (at a safe point, by a plugin or a signal) or ``failed``.
        reason: why it stopped or failed.
        epochs: epochs completed.
        steps: optimizer steps taken.
        parameters: trainable values, each shared one counted once.
        final: the last epoch's metrics.
        best: for each test metric its best value and the epoch, the least for losses and errors, else the greatest.
        expected: what the recipe says it should reach.
        seconds: wall time by part.
        images_per_second: training images over the time of training alone.
        data_wait: the share of that time spent waiting for batches.
        resumed: where the run was continued, and what was changed then.
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
    data_wait: float | None
    resumed: list[dict[str, Any]] = attrs.field(factory=list)
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``result.json`` holds."""
        plain: dict[str, Any] = attrs.asdict(self, filter=lambda a, _: a.name != "path")
        return plain


class Trainer:
    """Binds the hooks of a run once and takes its steps."""

    def __init__(self, run: Run, test_batches: int | None = None) -> None:
        hooks = run.hooks
        self.run = run
        self.test_batches = test_batches
        self.epoch_start = hooks.notify("epoch_start")
        self.transform_batch = hooks.chain("transform_batch", Batch)
        self.forward_end = hooks.notify("forward_end")
        self.backward = hooks.one("backward", (bool, type(None)))
        self.gradients_ready = hooks.notify("gradients_ready")
        self.optimizer_step = hooks.one("optimizer_step", object)
        self.step_end = hooks.notify("step_end")
        self.safe_point = hooks.notify("safe_point")
        self.eval_model = hooks.one("eval_model", (nn.Module, type(None)))
        self.epoch_end = hooks.notify("epoch_end")
        self.log = hooks.notify("log")
        self.step_schedulers = [s.scheduler for s in run.schedules if s.unit == "step"]
        self.epoch_schedulers = [s.scheduler for s in run.schedules if s.unit == "epoch"]
        cuda = run.device.type == "cuda"
        self.generator = torch.cuda.default_generators[run.device.index or 0] if cuda else torch.default_generator
        self.draws: bool | None = None  # whether the network draws random numbers; not known before a first step
        self.seconds = run.seconds
        self._clock = perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to a part of the run; whatever is done with test batches is evaluation."""
        now = perf_counter()
        self.seconds[part if self.run.split == "train" else "evaluation"] += now - self._clock
        self._clock = now

    def train(self) -> None:
        """Train from the run's position to its end, or to a safe point at which it was asked to stop."""
        run = self.run
        self._clock = perf_counter()
        while not (run.finished or self.stopping()):
            if run.batch_index == 0 and self.epoch_start:
                self.epoch_start(run)
            self.train_epoch()
            if self.stopping():
                return
            metrics = self.gather_metrics("train")
            self.lap("plugins")
            metrics |= self.evaluate()
            if self.stopping():  # stopped while testing: resuming repeats the test
                self.at_safe_point()
                return
            self.end_epoch(metrics)

    def stopping(self) -> bool:
        """Tell whether the run was asked to stop."""
        return self.run.stop_reason is not None

    def train_epoch(self) -> None:
        """Take the steps that are left of this epoch."""
        run = self.run
        run.split = "train"
        run.forward.train()
        self.draws = None
        indices = epoch_permutation(run.recipe.seed, run.epoch, len(run.data.train))
        for batch in run.batches["train"].iterate(indices, run.batch_index):
            self.lap("data")
            if not self.train_step(batch):
                continue
            self.at_safe_point()
            if self.stopping() or run.finished:
                break
        self.settle("backward")

    def settle(self, part: str) -> None:
        """Wait for a GPU, which may be steps behind, so that what it still does counts as this part."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        self.lap(part)

    def train_step(self, batch: Batch) -> bool:
        """Take one step; returns False while gradients are still being accumulated."""
        run = self.run
        batch = self.prepare(batch)
        seeded = self.seed() if self.draws is not False else None
        output, loss = run.compute_loss(batch)
        self.lap("forward")
        if self.forward_end:
            self.forward_end(run, batch, output, loss)
            self.lap("plugins")
        complete = True
        if self.backward:
            complete = self.backward(run, loss) is not False
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        if self.draws is None:
            self.draws = seeded is None or not torch.equal(seeded, self.generator.get_state())
        self.lap("backward")
        run.images += len(batch)
        run.batch_index += 1
        if not complete:
            return False
        if self.gradients_ready:
            self.gradients_ready(run)
            self.lap("plugins")
        if self.optimizer_step:
            self.optimizer_step(run)
        else:
            run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        for scheduler in self.step_schedulers:
            scheduler.step()
        self.lap("optimizer")
        if self.step_end:
            self.step_end(run)
        if len(run.pending) >= FLUSH_EVERY:
            run.flush_log()
            self.lap("plugins")
        return True

    def prepare(self, batch: Batch) -> Batch:
        """Apply the image transforms of the split, then what plugins do to the batch."""
        run = self.run
        batch.images = run.transforms[run.split](batch.images, run.rng)
        self.lap("transforms")
        if self.transform_batch:
            batch = self.transform_batch(run, batch)
            self.lap("plugins")
        run.batch = batch
        return batch

    def seed(self) -> Tensor | None:
        """Make what torch draws itself in this step, such as dropout, depend on the run's position alone.

        Returns:
            The generator's state, in an epoch's first step: unless it has changed by the step's end, the network draws
            nothing, and the other steps of the epoch are spared the seeding.
        """
        run = self.run
        self.generator.manual_seed(torch_seed(run.recipe.seed, "step", run.epoch, run.batch_index))
        return self.generator.get_state() if self.draws is None else None

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor | float]:
        """Evaluate the test split (what there is of it when asked to stop meanwhile) and return its metrics."""
        run = self.run
        model = (self.eval_model(run) if self.eval_model else None) or run.forward
        was_training = model.training
        model.eval()
        run.split = "test"
        try:
            for number, batch in enumerate(run.batches["test"].iterate()):
                if number == self.test_batches or self.stopping():
                    break
                prepared = self.prepare(batch)
                output, loss = run.compute_loss(prepared, model)
                if self.forward_end:
                    self.forward_end(run, prepared, output, loss)
            metrics = self.gather_metrics("test")
        except BaseException:
            with suppress(Exception):  # what was gathered of a failed test must not count in the next one
                self.gather_metrics("test")
            raise
        finally:
            run.split = "train"
            model.train(was_training)
        self.settle("evaluation")
        return metrics

    def gather_metrics(self, split: str) -> dict[str, Tensor | float]:
        """Collect the named values of a split, as ``<split>_<name>``."""
        metrics: dict[str, Tensor | float] = {}
        owners: dict[str, Any] = {}
        for impl, values in self.run.hooks.collect("metrics", dict, self.run, split):
            for name, value in values.items():
                key = f"{split}_{name}"
                if key in metrics:
                    raise PluginError(f"{owners[key]} and {impl.active} both report the metric {name!r}")
                if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.dim() == 0):
                    got = type(value).__name__
                    raise PluginError(
                        f"{impl.active}, metrics: expected a number or a scalar tensor as {name!r}, got {got}"
                    )
                metrics[key], owners[key] = value, impl.active
        return metrics

    def end_epoch(self, metrics: dict[str, Tensor | float]) -> None:
        """Complete the epoch: metrics to the host in one copy, hooks, schedulers, counters, safe point."""
        run = self.run
        run.flush_log()
        lr = run.optimizer.param_groups[0]["lr"]
        (record,) = to_host([{"epoch": run.epoch + 1, "step": run.step, "lr": float(lr), **metrics}])
        run.history.append(record)
        if self.epoch_end:
            self.epoch_end(run, record)
        if self.log:
            self.log(run, record)
        for scheduler in self.epoch_schedulers:
            scheduler.step()
        run.epoch += 1
        run.batch_index = 0
        self.lap("plugins")
        self.at_safe_point()

    def at_safe_point(self) -> None:
        """Tell plugins that the run may be saved or stopped here."""
        if self.safe_point:
            self.safe_point(self.run)
            self.lap("plugins")


def fit(run: Run, run_dir: str | Path | None = None, *, test_batches: int | None = None) -> Result:
    """Train a run to its end and return what came of it.

    The first Ctrl-C stops at the next safe point, and the result's status is then ``stopped``; a second one raises
    ``KeyboardInterrupt`` at once. Signal handlers are put back afterwards, so a notebook stays usable.

    Args:
        run: from :func:`trainkit.build`.
        run_dir: a new directory to write to; by default ``runs/<recipe>/<time>-<seed>``.
        test_batches: evaluate only so many test batches; a check, not a result.

    Raises:
        TrainkitError: the run directory cannot be made, or the run fails.
    """
    new = run.dir is None
    run.dir = run.dir or RunDir.create(run.recipe, Path(run_dir) if run_dir is not None else None)
    try:
        with run.dir.exclusive():
            run.dir.remove_parts()
            return _fit(run, run.dir, test_batches)
    except TrainkitError:
        if new and run.hooks.failure is not RunError:  # nothing has begun, so nothing is left behind
            shutil.rmtree(run.dir.path)
            run.dir = None
        raise


def _fit(run: Run, run_dir: RunDir, test_batches: int | None) -> Result:
    run.provenance = provenance.record(run)
    run_dir.write("recipe.yaml", run.recipe.to_yaml())
    provenance.write(run.provenance, run_dir)
    (run_dir.path / "result.json").unlink(missing_ok=True)  # a resumed run has not ended yet
    trainer = Trainer(run, test_batches)
    error: BaseException | None = None
    with _signals(run):
        try:
            for impl in run.hooks.implementations("fit_start"):
                impl(run)
                check_optimizer(run, f"{impl.active}, fit_start")
            run.hooks.failure = RunError  # from here on it is the run that fails, whatever is wrong
            trainer.train()
            run.flush_log()
        except BaseException as caught:
            error = caught
            with suppress(Exception):  # what was seen before the failure; a lost device cannot tell
                run.flush_log()
        try:
            error = _fit_end(run, error)
        finally:
            result = _result(run, error)
            run_dir.write_json("result.json", result.to_dict())
            for batches in run.batches.values():
                batches.close()
    begun = run.hooks.failure is RunError
    if begun and isinstance(error, TrainkitError) and not isinstance(error, RunError):
        raise RunError(str(error)) from error
    if error is not None:
        raise error
    return result


def evaluate(run: Run, *, test_batches: int | None = None) -> dict[str, float]:
    """Evaluate the run's model, as it is, on the test split and return its metrics, ``test_<name>``."""
    (metrics,) = to_host([Trainer(run, test_batches).evaluate()])
    return metrics


def _fit_end(run: Run, error: BaseException | None) -> BaseException | None:
    """Fire ``fit_end`` for every plugin, in reverse order, whatever the others do, and return the run's first error."""
    for impl in reversed(run.hooks.implementations("fit_end")):
        try:
            impl(run, error)
        except Exception as caught:
            error = error or caught
    return error


def _result(run: Run, error: BaseException | None) -> Result:
    seconds = {**run.seconds, "total": sum(run.seconds.values())}  # of all sessions of a resumed run
    busy = sum(run.seconds.get(part, 0.0) for part in ("data", "transforms", "forward", "backward", "optimizer"))
    message = f"{type(error).__name__}: {error}" if error is not None else run.stop_reason
    return Result(
        status="failed" if error is not None else "stopped" if run.stop_reason else "completed",
        reason=message,
        epochs=run.epoch,
        steps=run.step,
        parameters=count_parameters(run.model),
        final={k: v for k, v in run.history[-1].items() if k not in ("epoch", "step")} if run.history else {},
        best=best_of(run.history),
        expected=dict(run.recipe.expect),
        seconds={k: round(v, 3) for k, v in seconds.items()},
        images_per_second=round(run.images / busy, 1) if busy else None,
        data_wait=round(run.seconds.get("data", 0.0) / busy, 4) if busy else None,
        resumed=run.resumed,
        path=run.dir.path if run.dir else None,
    )


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a stop at the next safe point; the second acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if run.stop_reason is not None:
            raise KeyboardInterrupt
        run.stop(signal.Signals(number).name, exit_code=128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

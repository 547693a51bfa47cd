"""The loop. It fires hooks and keeps counters; everything else is a plugin's.

Nothing here waits for the device but the ends of a pass over a split: no ``.item()``, no copy to the host, no list that
grows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.data import Batch
from trainkit.errors import PluginError
from trainkit.hooks import Hooks
from trainkit.numerics import widest_float
from trainkit.rng import torch_seed
from trainkit.run import Metric, MetricInfo, Run, epoch_order, scalar, to_host

__all__ = ["Fire", "Trainer"]


class Fire:
    """The hooks that the loop fires, bound once: what nobody implements does nothing, or the default."""

    def __init__(self, hooks: Hooks) -> None:
        self.epoch_start = hooks.notify("epoch_start")
        self.train_start = hooks.notify("train_start")
        self.forward_end = hooks.notify("forward_end")
        self.transform_loss = hooks.chain("transform_loss", Tensor)
        self.backward = hooks.one("backward", default=lambda run, loss: loss.backward())
        self.gradients_ready = hooks.notify("gradients_ready")
        self.optimizer_step = hooks.one("optimizer_step", default=lambda run: run.optimizer.step())
        self.step_end = hooks.notify("step_end")
        self.eval_start = hooks.notify("eval_start")
        self.epoch_end = hooks.notify("epoch_end")
        self.safe_point = hooks.notify("safe_point")
        self.log = hooks.notify("log")


class Trainer:
    """Takes the steps of a run.

    Args:
        run: a run that is built.
        max_steps: stop after so many steps of this trainer; for a trial.
        eval_batches: evaluate only so many batches of a split; for a trial.
    """

    def __init__(self, run: Run, *, max_steps: int | None = None, eval_batches: int | None = None) -> None:
        self.run = run
        self.fire = Fire(run.hooks)
        self.last_step = None if max_steps is None else run.step + max_steps
        self.eval_batches = eval_batches

    def train(self) -> None:
        """Train from the run's position to its end, or to a safe point at which it was asked to stop."""
        run, fire = self.run, self.fire
        run.agree()
        stopped = run.is_stopping() and self.safe_point()
        while not (run.finished or stopped or self.trial_over):
            if run.batch_index == 0:
                fire.epoch_start(run)
            with run.clock("train"):
                stopped = self.train_epoch()
            if stopped:
                return
            metrics = self.metrics("train")
            if self.evaluation_is_due:
                metrics |= self.evaluate(run.selection_split)
            # When it stops here, resuming repeats the evaluation.
            stopped = self.safe_point() if run.is_stopping() else self.end_epoch(metrics)

    @property
    def trial_over(self) -> bool:
        """Whether the steps of a trial are taken."""
        return self.last_step is not None and self.run.step >= self.last_step

    @property
    def evaluation_is_due(self) -> bool:
        """Whether this epoch ends with an evaluation: every ``eval_every`` epochs, and the last epoch."""
        run = self.run
        done = run.epoch + 1
        is_last = done == run.epochs or run.at_max_steps or self.trial_over
        return is_last or done % run.recipe.eval_every == 0

    def safe_point(self) -> bool:
        """Let plugins save, and return whether the run stops here.

        A stop that is asked for meanwhile, by a plugin or a signal, is told to those who have already been called.
        """
        run = self.run
        run.agree()
        stopping = run.is_stopping()
        self.fire.safe_point(run)
        run.agree()
        if run.is_stopping() and not stopping:
            stopping = True
            self.fire.safe_point(run)
        return stopping

    def train_epoch(self) -> bool:
        """Take the steps that are left of this epoch, and return whether the run stops within it."""
        run, fire = self.run, self.fire
        run.split = "train"
        run.forward.train()
        fire.train_start(run)
        if run.at_max_steps:  # resumed to repeat an evaluation
            return False
        for batch in run.batches["train"].iterate(epoch_order(run), run.batch_index, run.epoch):
            if not self.train_step(batch):
                continue
            if self.safe_point():
                return True
            if run.at_max_steps or self.trial_over:
                break
        return False

    def train_step(self, batch: Batch) -> bool:
        """Train on one batch; returns False while gradients are still being accumulated."""
        run, fire = self.run, self.fire
        batch = run.prepare(batch)
        seed_torch(run)
        run.output, loss = run.compute_loss(batch)
        fire.forward_end(run, batch, run.output, loss)
        fire.backward(run, fire.transform_loss(run, loss))
        completes_step = run.completes_step
        run.count_batch()
        if not completes_step:
            return False
        fire.gradients_ready(run)
        fire.optimizer_step(run)
        run.optimizer.zero_grad()
        run.advance_step()
        fire.step_end(run)
        return True

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Metric]:
        """Evaluate a split (part of it when asked to stop meanwhile) and return its metrics, ``<split>_<name>``."""
        run, fire = self.run, self.fire
        model = run.evaluated_model()
        was_training = model.training
        model.eval()
        run.split = split
        try:
            with run.clock("evaluation"):
                fire.eval_start(run)
                for number, batch in enumerate(run.batches[split].iterate()):
                    if run.is_stopping() or number == self.eval_batches:
                        break
                    prepared = run.prepare(batch)
                    output, loss = run.compute_loss(prepared, model)
                    fire.forward_end(run, prepared, output, loss)
                return self.metrics(split)
        finally:
            run.split = "train"
            model.train(was_training)

    def metrics(self, split: str) -> dict[str, Metric]:
        """Collect the named values of a split, as ``<split>_<name>``."""
        run = self.run
        found: dict[str, Metric] = {}
        owners: dict[str, Any] = {}
        for impl, values in run.hooks.collect("metrics", dict, run, split):
            for name, reported in values.items():
                metric = reported if isinstance(reported, Metric) else Metric(reported)
                key = f"{split}_{name}"
                if key in found:
                    raise PluginError(f"{owners[key]} and {impl.plugin} both report the metric {name!r}")
                try:
                    value = scalar(name, metric.value)
                except PluginError as error:
                    raise PluginError(f"{impl.plugin}, metrics: {error}") from error
                found[key], owners[key] = metric._replace(value=value), impl.plugin
                run.metric_info[key] = MetricInfo(metric.better, metric.progress)
        self.refuse_partial(found, owners)
        return found

    def refuse_partial(self, metrics: dict[str, Metric], owners: dict[str, Any]) -> None:
        """Hold what this process reports against what the others report: a value of its share alone would be wrong.

        Raises:
            PluginError: they differ.
        """
        if self.run.world == 1:
            return
        (mine,) = to_host([{name: metric.value for name, metric in metrics.items()}])
        for rank, other in enumerate(self.run.processes.all_gather(mine)):
            for name in {**mine, **other}:
                values = mine.get(name), other.get(name)
                if repr(values[0]) != repr(values[1]):  # NaN is NaN
                    raise PluginError(
                        f"{owners.get(name, 'a plugin')}, metrics: {name} is {values[0]} in process {self.run.rank} "
                        f"and {values[1]} in process {rank}: it must add up what all processes see, with "
                        "run.processes.all_reduce"
                    )

    def end_epoch(self, metrics: dict[str, Metric]) -> bool:
        """Complete the epoch: metrics to the host in one copy, hooks, schedulers, counters.

        Returns:
            Whether the run stops at the safe point that follows.
        """
        run, fire = self.run, self.fire
        run.flush_log()
        complete = run.batch_index == run.batches_per_epoch  # else max_steps cuts it short
        plain = self.record(run.epoch + (1 if complete else run.batch_index / run.batches_per_epoch), metrics)
        record = dict(plain)
        run.history.append(record)
        try:
            fire.epoch_end(run, record)
            record = self.amended(record)
        except BaseException:
            run.history[-1] = plain  # result.json can hold it
            raise
        run.history[-1] = record
        self.note_non_finite(record)
        fire.log(run, record)
        if complete:
            for schedule in run.schedules:
                self.step_epoch_schedule(schedule, record)
            run.epoch += 1
            run.batch_index = 0
        return self.safe_point()

    def record(self, epoch: float, metrics: dict[str, Metric]) -> dict[str, float]:
        """Return a record of metrics at the current step, as numbers, after one copy from the device."""
        run = self.run
        lr = float(run.optimizer.param_groups[0]["lr"])
        values = {name: metric.value for name, metric in metrics.items()}
        (record,) = to_host([{"epoch": epoch, "step": run.step, "lr": lr, **values}])
        return record

    def amended(self, record: dict[str, Any]) -> dict[str, float]:
        """Return a record as plain numbers after plugins amended it.

        Raises:
            PluginError: one put something else there.
        """
        try:
            return to_host([record])[0]
        except PluginError as error:
            raise PluginError(f"{self.run.hooks.named('epoch_end')}: {error}") from error

    def note_non_finite(self, record: dict[str, float]) -> None:
        """Note an epoch whose weights, or a metric that says what is better, are not finite: it is never the best."""
        run = self.run
        judged = [record[k] for k, info in run.metric_info.items() if info.better is not None and k in record]
        weights = [p.detach() for p in run.model.parameters() if p.is_floating_point()]
        norms = (
            torch.stack([norm.to(widest_float(norm.device)) for norm in torch._foreach_norm(weights)])
            if weights
            else torch.zeros(1)
        )
        values = to_host([{"weights": norms.sum(), **{str(n): value for n, value in enumerate(judged)}}])[0]
        if not all(abs(value) < float("inf") for value in values.values()):
            run.non_finite.append(record["epoch"])

    def step_epoch_schedule(self, schedule: Any, record: dict[str, float]) -> None:
        """Step a scheduler that follows epochs; one that looks at a metric waits until it was reported.

        Raises:
            PluginError: nothing reports the metric.
        """
        run = self.run
        if schedule.unit != "epoch":
            return
        if schedule.metric is None:
            schedule.scheduler.step()
            return
        key = run.metric_key(schedule.metric)
        if key in record:
            schedule.scheduler.step(record[key])
        elif key not in run.metric_info and self.evaluation_is_due:
            known = ", ".join(run.metric_info) or "none"
            raise PluginError(
                f"{run.hooks.named('scheduler')}: no plugin reports the metric {key!r} that a schedule looks at; "
                f"known: {known}"
            )


def seed_torch(run: Run) -> None:
    """Make what torch draws itself in a step, such as dropout, depend on the run's position alone."""
    purpose = "step" if run.world == 1 else f"step/{run.rank} of {run.world}"
    seed = torch_seed(run.recipe.seed, purpose, run.epoch, run.batch_index)
    torch.default_generator.manual_seed(seed)
    if run.device.type == "cuda":
        torch.cuda.default_generators[run.device.index or 0].manual_seed(seed)

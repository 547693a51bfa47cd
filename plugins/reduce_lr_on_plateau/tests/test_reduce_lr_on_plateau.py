import io
from typing import Any

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from trainkit import Metric, fit
from trainkit.errors import PluginError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, run_steps
from trainkit_metrics import Metrics
from trainkit_reduce_lr_on_plateau import ReduceLROnPlateau


@plugin
class Reports:
    """Reports made values, one an epoch."""

    values: list
    better: Any = "less"
    splits: tuple = ("test",)

    @hookimpl
    def metrics(self, run, split):
        return {"made": Metric(self.values[run.epoch], self.better)} if split in self.splits else None


@plugin
class Watch:
    """Notes the learning rate of each step, and keeps a checkpoint of one in memory."""

    lrs: list = field(factory=list)
    save_at: int = -1
    file: Any = None

    @hookimpl
    def gradients_ready(self, run):
        self.lrs.append(run.optimizer.param_groups[0]["lr"])

    @hookimpl
    def safe_point(self, run):
        if run.step == self.save_at and self.file is not None and not self.file.tell():
            torch.save(run.state_dict(), self.file)


def rates(values, better="less", watch=None, recipe=None, **options):
    """Return the learning rate of each epoch of a run that reports these values."""
    watch = watch or Watch()
    plugins = {
        "reports": Reports(values=values, better=better),
        "reduce_lr_on_plateau": ReduceLROnPlateau(metric="made", **options),
        "watch": watch,
    }
    run = run_steps(plugins, steps=1000, epochs=len(values), batch_size=32, **recipe or {})
    return [*watch.lrs, run.optimizer.param_groups[0]["lr"]]


def torchs(values, mode, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode, **options)
    found = [0.1]
    for value in values:
        scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


numbers = st.floats(-2, 2) | st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
made_options = st.fixed_dictionaries(
    {
        "factor": st.floats(0.05, 0.9),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 1e-4, 0.3]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 2),
        "min_lr": st.sampled_from([0, 0.01]),
        "eps": st.sampled_from([1e-8, 0.02]),
    }
)


@settings(max_examples=40)
@given(st.lists(numbers, min_size=1, max_size=12), st.sampled_from(["less", "more"]), made_options)
def test_rates_are_torchs_whichever_way_is_better(values, better, options):
    mode = {"less": "min", "more": "max"}[better]
    assert rates(values, better, **options) == torchs(values, mode, **options)


def test_a_made_sequence_by_hand():
    found = rates([3.0, 2.0, 2.5, 2.1, 2.2, 1.0], patience=1, factor=0.5)
    assert found == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]
    assert rates([3.0, 2.0, 2.5, 2.1], "more", patience=1, factor=0.5) == [0.1, 0.1, 0.1, 0.05, 0.05]


def test_only_evaluations_count():
    values = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0]  # the even epochs are evaluated: no better value than the first of them
    found = rates(values, "more", patience=0, factor=0.5, recipe={"eval_every": 2})
    assert found == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("step", [1, 3, 5, 6, 10])
@pytest.mark.parametrize("better", ["less", "more"])
def test_continues_exactly_from_a_checkpoint(better, step, tmp_path):
    values, file = [2.0, 3.0, 2.5, 1.0, 0.5, 0.7], io.BytesIO()

    def plugins(watch):
        schedule = ReduceLROnPlateau(metric="made", patience=1, factor=0.5)
        return {"reports": Reports(values=values, better=better), "reduce_lr_on_plateau": schedule, "watch": watch}

    whole, rest = Watch(save_at=step, file=file), Watch()
    run_steps(plugins(whole), steps=12, batch_size=16)
    run = build_run(plugins(rest), epochs=6, batch_size=16)
    file.seek(0)
    run.load_state_dict(torch.load(file, weights_only=True))
    fit(run, tmp_path / "run")
    assert rest.lrs == whole.lrs[step:]
    assert len(set(whole.lrs)) > 1


def test_the_loss_of_the_selection_split_by_default():
    schedule = ReduceLROnPlateau(patience=0, threshold=1e9, threshold_mode="abs")
    run = run_steps({"metrics": Metrics(), "reduce_lr_on_plateau": schedule}, steps=12)
    assert run.schedules[0].scheduler.best == run.history[0]["test_loss"]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_each_parameter_group_may_have_its_own_minimum():
    assert rates([1.0, 1.0, 1.0], patience=0, min_lr=[0.05]) == [0.1, 0.1, 0.05, 0.05]
    with pytest.raises(PluginError, match="'reduce_lr_on_plateau' failed in scheduler.*expected 1 min_lrs, got 2"):
        rates([1.0], min_lr=[0.05, 0.01])


def test_a_metric_without_a_direction_is_refused():
    with pytest.raises(RunError, match="'metric': the plugin that reports 'test_made' does not say whether less or"):
        rates([1.0], better=None)


def test_a_metric_that_nothing_reports_is_refused():
    with pytest.raises(RunError, match="no plugin reports the metric 'test_other'"):
        run_steps({"reduce_lr_on_plateau": ReduceLROnPlateau(metric="other")}, steps=4)


@pytest.mark.parametrize(
    "options",
    [{"factor": 1}, {"factor": 0}, {"patience": -1}, {"threshold": -1}, {"cooldown": -1}, {"eps": -1}],
)
def test_wrong_values_name_the_option(options):
    with pytest.raises(ValueError, match=f"'{next(iter(options))}'"):
        ReduceLROnPlateau(**options)

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit import Metric, fit
from trainkit.errors import RunError
from trainkit.testing import assert_refuses, build_run, watch
from trainkit_early_stopping import EarlyStopping

NAN = math.nan


def reports(values, name="loss", better="less", split="test"):
    """Return a plugin that reports the values that a test wants, one an epoch; None is no report."""

    def metrics(run, split):
        value = values[run.epoch] if split == wanted else None
        return None if value is None else {name: Metric(value, better)}

    wanted = split
    return watch(metrics=metrics)


def train(tmp_path, scores, epochs, others=None, recipe=None, **options):
    plugins = {"scores": scores, "early_stopping": EarlyStopping(**options), **(others or {})}
    return fit(build_run(plugins, epochs=epochs, batch_size=32, **recipe or {}), tmp_path / "run")


@pytest.mark.parametrize(
    ("better", "values", "options", "epochs"),
    [
        ("less", [3, 2, 2, 2, 2, 2], {"patience": 2}, 4),  # as good is not better
        ("less", [3, 4, 2.9, 4, 4, 4], {"patience": 2}, 5),
        ("more", [50, 60, 59, 61, 60, 60, 60], {"patience": 2}, 6),
        ("less", [3, 2.95, 2.91, 2.85, 2.8, 2.8, 2.8, 1], {"patience": 3, "min_delta": 0.1}, 7),
        ("less", [3, 2.95, 2.91, 2.89, 2.88, 1], {"patience": 3, "min_delta": 0.2}, 4),
        ("more", [50, 50.5, 51, 51.5, 99], {"patience": 3, "min_delta": 1.5}, 4),
        ("less", [NAN, NAN, NAN, NAN, 1], {"patience": 3}, 3),
        ("more", [NAN, 2, NAN, 3, NAN, NAN, 1], {"patience": 2}, 6),
        ("less", [math.inf, math.inf, 1, 2, 3, 4], {"patience": 2}, 5),
        ("less", [2, None, None, 1, 3, None, 3, 1], {"patience": 2}, 7),  # epochs that do not report it do not count
        ("less", [3, 2, 1, 2], {"patience": 2}, 4),  # completes
        ("less", [3, 3, 3], {"patience": 2}, 3),
    ],
)
def test_stops_after_so_many_evaluations_without_a_better_value(tmp_path, better, values, options, epochs):
    result = train(tmp_path, reports(values, "score", better), len(values), metric="score", **options)
    assert result.epochs == epochs
    expected = ("completed", None)
    if epochs < len(values):
        expected = ("stopped", f"early_stopping: no better test_score for {options['patience']} evaluations")
    assert (result.status, result.reason) == expected
    assert json.loads((tmp_path / "run" / "result.json").read_text())["reason"] == expected[1]


def test_the_last_of_max_steps_completes_the_run(tmp_path):
    result = train(tmp_path, reports([1.0] * 3), 3, recipe={"max_steps": 2}, patience=1)
    assert (result.status, result.steps) == ("completed", 2)


def test_it_looks_at_the_validation_split_where_there_is_one(tmp_path):
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    scores = reports([3.0, 4.0, 5.0, 6.0], split="validation")
    result = train(tmp_path, scores, 4, {"held_out": held_out}, patience=2)
    assert (result.epochs, result.reason) == (3, "early_stopping: no better validation_loss for 2 evaluations")


def test_a_metric_of_the_training_split(tmp_path):
    result = train(tmp_path, reports([3.0, 4.0, 5.0], split="train"), 3, metric="train_loss", patience=1)
    assert (result.epochs, result.status) == (2, "stopped")


def test_patience_counts_evaluations(tmp_path):
    values = [9.0, 3.0, 9.0, 4.0, 9.0, 5.0, 9.0, 9.0]  # evaluated: epochs 2, 4, 6, 8
    result = train(tmp_path, reports(values), 8, recipe={"eval_every": 2}, patience=2)
    assert (result.epochs, result.status) == (6, "stopped")


@given(st.lists(st.sampled_from([NAN, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=12))
def test_evaluations_waited_are_those_since_the_first_of_the_least(values):
    finite = [v for v in values if not math.isnan(v)]
    since = len(values) - (values.index(min(finite)) + 1 if finite else 0)
    assert EarlyStopping().waited(values, "less") == since
    assert EarlyStopping().waited([-v for v in values], "more") == since


@pytest.mark.parametrize("part", [1, 3])
def test_a_resumed_run_stops_where_the_whole_run_does(tmp_path, part):
    plugins = {"scores": reports([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]), "early_stopping": EarlyStopping(patience=3)}
    interrupt = watch(epoch_end=lambda run: run.epoch + 1 == part and run.stop("interrupt"))
    first = build_run({**plugins, "interrupt": interrupt}, epochs=7, batch_size=32)
    fit(first, tmp_path / "first")
    rest = build_run(plugins, epochs=7, batch_size=32)
    rest.load_state_dict(first.state_dict())
    result = fit(rest, tmp_path / "rest")
    assert (first.epoch, result.epochs) == (part, 5)
    assert result.reason.startswith("early_stopping")


def test_a_checkpoint_plugin_knows_of_the_stop_at_the_same_safe_point(tmp_path):
    points = []
    saves = watch(safe_point=lambda run: points.append((run.epoch, run.step)) if run.stop_reason else None)
    train(tmp_path, reports([1.0] * 5), 5, {"saves": saves}, patience=1)
    assert points == [(2, 2)]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (reports([1.0, 1.0]), {"metric": "los"}, r"reports 'test_los'; did you mean 'test_loss'\?; known: test_loss$"),
        (watch(), {}, r"no plugin reports 'test_loss'; known: none"),
        (reports([1.0, 1.0], better=None), {}, "'test_loss' does not say whether less or more is better"),
    ],
)
def test_a_metric_that_tells_nothing_is_one_clear_error_at_the_first_epochs_end(tmp_path, scores, options, message):
    with pytest.raises(RunError, match=message):
        train(tmp_path, scores, 2, **options)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 0


def test_a_wrong_name_is_said_at_the_first_evaluation(tmp_path):
    with pytest.raises(RunError, match="no plugin reports 'test_los'"):
        train(tmp_path, reports([1.0] * 4), 4, recipe={"eval_every": 2}, metric="los")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 1


def test_wrong_options_are_one_clear_error():
    assert_refuses(EarlyStopping, "patience", 0)
    assert_refuses(EarlyStopping, "min_delta", -0.1)

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit import fit
from trainkit.errors import RecipeError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.testing import build_run
from trainkit_early_stopping import EarlyStopping

NAN = math.nan


@plugin
class Scores:
    """Reports the values that a test wants, one an epoch."""

    values: list
    name: str = "loss"

    @hookimpl
    def metrics(self, run, split):
        value = self.values[run.epoch] if split == "test" else None
        return None if value is None else {self.name: value}


def train(tmp_path, values, name="loss", **options):
    plugins = {
        "scores": Scores(values=values, name=name),
        "early_stopping": EarlyStopping(metric=f"test_{name}", **options),
    }
    return fit(build_run(plugins, epochs=len(values), batch_size=32), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "values", "options", "epochs"),
    [
        ("loss", [3, 2, 2, 2, 2, 2], {"patience": 2}, 4),  # as good is not better
        ("loss", [3, 4, 2.9, 4, 4, 4], {"patience": 2}, 5),
        ("error", [3, 4, 5, 6], {"patience": 1}, 2),
        ("accuracy", [50, 60, 59, 61, 60, 60, 60], {"patience": 2}, 6),
        ("loss", [3, 2.95, 2.91, 2.85, 2.8, 2.8, 2.8, 1], {"patience": 3, "min_delta": 0.1}, 7),
        ("loss", [3, 2.95, 2.91, 2.89, 2.88, 1], {"patience": 3, "min_delta": 0.2}, 4),
        ("accuracy", [50, 50.5, 51, 51.5, 99], {"patience": 3, "min_delta": 1}, 5),
        ("accuracy", [50, 50.5, 51, 51.5, 99], {"patience": 3, "min_delta": 1.5}, 4),
        ("loss", [NAN, NAN, NAN, NAN, 1], {"patience": 3}, 3),
        ("loss", [NAN, 2, NAN, NAN, NAN, 1], {"patience": 2}, 4),
        ("accuracy", [NAN, 2, NAN, 3, NAN, NAN, 1], {"patience": 2}, 6),
        ("loss", [math.inf, math.inf, 1, 2, 3, 4], {"patience": 2}, 5),
        ("loss", [2, None, None, 1, None], {"patience": 2}, 3),  # epochs that do not report it
    ],
)
def test_stops_after_so_many_epochs_without_a_better_value(tmp_path, name, values, options, epochs):
    result = train(tmp_path, values, name, **options)
    assert result.epochs == epochs
    if epochs < len(values):
        expected = ("stopped", f"early_stopping: no better test_{name} for {options['patience']} epochs")
        assert (result.status, result.reason) == expected
        assert json.loads((tmp_path / "run" / "result.json").read_text())["reason"] == expected[1]


@pytest.mark.parametrize("values", [[3, 2, 1, 2], [3, 3, 3]])
def test_a_run_that_completes_is_not_stopped(tmp_path, values):
    result = train(tmp_path, values, patience=2)
    assert (result.status, result.epochs) == ("completed", len(values))


def test_the_last_of_max_steps_completes_the_run(tmp_path):
    plugins = {"scores": Scores(values=[1.0, 1.0, 1.0]), "early_stopping": EarlyStopping(patience=1)}
    result = fit(build_run(plugins, epochs=3, batch_size=32, max_steps=2), tmp_path / "run")
    assert (result.status, result.steps) == ("completed", 2)


losses = st.lists(st.sampled_from([NAN, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=12)


@given(losses)
def test_epochs_waited_are_those_since_the_first_of_the_least(values):
    finite = [v for v in values if not math.isnan(v)]
    since = len(values) - (values.index(min(finite)) + 1 if finite else 0)
    assert EarlyStopping().waited([{"test_loss": v} for v in values]) == since
    negated = [{"test_accuracy": -v} for v in values]
    assert EarlyStopping(metric="test_accuracy").waited(negated) == since


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_resumed_run_stops_where_the_whole_run_does(tmp_path, part):
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    @plugin
    class Interrupt:
        @hookimpl
        def epoch_end(self, run):
            if run.epoch + 1 == part:
                run.stop("interrupt")

    def plugins():
        return {"scores": Scores(values=values), "early_stopping": EarlyStopping(patience=3)}

    first = build_run({**plugins(), "interrupt": Interrupt()}, epochs=7, batch_size=32)
    fit(first, tmp_path / "first")
    rest = build_run(plugins(), epochs=7, batch_size=32)
    rest.load_state_dict(first.state_dict())
    result = fit(rest, tmp_path / "rest")
    assert (first.epoch, result.epochs) == (part, 5)
    assert result.reason.startswith("early_stopping")


def test_a_checkpoint_plugin_knows_of_the_stop_at_the_same_safe_point(tmp_path):
    @plugin
    class Saves:
        points: list

        @hookimpl
        def safe_point(self, run):
            if run.stop_reason:
                self.points.append((run.epoch, run.step))

    saves = Saves(points=[])
    plugins = {"saves": saves, "scores": Scores(values=[1.0] * 5), "early_stopping": EarlyStopping(patience=1)}
    fit(build_run(plugins, epochs=5, batch_size=32), tmp_path / "run")
    assert saves.points == [(2, 2)]


def test_an_unknown_metric_is_one_clear_error_at_the_first_epochs_end(tmp_path):
    plugins = {"scores": Scores(values=[1.0, 1.0]), "early_stopping": EarlyStopping(metric="test_los")}
    run = build_run(plugins, epochs=2)
    with pytest.raises(RunError, match=r"'test_los'; did you mean 'test_loss'\?; known: test_loss$"):
        fit(run, tmp_path / "run")
    assert len(run.history) == 1


def test_no_metrics_at_all_is_said(tmp_path):
    with pytest.raises(RunError, match=r"no plugin reports 'test_loss'; known: none"):
        fit(build_run({"early_stopping": EarlyStopping()}), tmp_path / "run")


@pytest.mark.parametrize(("options", "key"), [({"patience": 0}, "patience"), ({"min_delta": -0.1}, "min_delta")])
def test_wrong_options_are_one_clear_error(options, key):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"early_stopping": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.early_stopping\.{key}"):
        make_options(recipe, "early_stopping", EarlyStopping)

import math

import pytest
import torch

from trainkit import Metric, fit
from trainkit.errors import RunError
from trainkit.rundir import RunDir
from trainkit.testing import build_run, watch
from trainkit_checkpoint import Checkpoint


def reports(better="more", **values):
    """Return a plugin that reports the values that a test wants, by ``<split>_<name>``, one an epoch."""

    def metrics(run, split):
        found = {name.partition("_"): each[run.epoch] for name, each in values.items()}
        return {name: Metric(value, better) for (of, _, name), value in found.items() if of == split} or None

    return watch(metrics=metrics)


def held_out(data):
    return data.replace(validation=data.test, test=data.train)


def train(folder, checkpoint, epochs=3, recipe=None, **others):
    run = build_run({"checkpoint": checkpoint, **others}, epochs=epochs, **recipe or {})
    fit(run, folder)
    return run, RunDir(folder)


def position(run_dir, name):
    return {key: run_dir.load_state(name)["position"][key] for key in ("epoch", "step", "batch_index")}


def step(run_dir, name):
    return position(run_dir, name)["step"]


def test_keeps_last_previous_and_best(tmp_path):
    run, kept = train(tmp_path, Checkpoint(), scores=reports(test_accuracy=[50.0, 70.0, 60.0]))
    assert run.step == 12
    assert {name: step(kept, name) for name in ("last", "previous", "best")} == {"last": 12, "previous": 8, "best": 8}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.pt", "last.pt", "previous.pt"]


@pytest.mark.parametrize(
    ("best", "better", "values", "expected"),
    [
        ("accuracy", "more", {"train_accuracy": [9.0, 1.0, 1.0], "test_accuracy": [50.0, 70.0, 60.0]}, 8),
        ("loss", "less", {"train_loss": [1.0, 2.0, 3.0], "test_loss": [3.0, 1.0, 2.0]}, 8),
        ("test_loss", "less", {"test_loss": [3.0, 1.0, 2.0]}, 8),
        ("train_loss", "less", {"train_loss": [3.0, 2.0, 1.0], "test_loss": [1.0, 2.0, 3.0]}, 12),
        ("accuracy", "more", {"test_accuracy": [50.0, 50.0, 50.0]}, 4),  # as good is not better
        ("accuracy", "more", {"test_accuracy": [50.0, 60.0, math.inf]}, 8),  # a diverged epoch is never the best
    ],
)
def test_best_is_what_the_metrics_plugin_calls_better(tmp_path, best, better, values, expected):
    _, kept = train(tmp_path, Checkpoint(best=best), scores=reports(better, **values))
    assert step(kept, "best") == expected


def test_the_validation_split_selects_where_there_is_one_and_the_test_split_is_evaluated_on_its_choice(tmp_path):
    weights = {}

    def note(run):
        weights[run.split] = run.model[0].weight.clone()

    scores = reports(validation_accuracy=[50.0, 70.0, 60.0], test_accuracy=[1.0, 2.0, 3.0])
    others = watch(transform_data=held_out, eval_start=note)
    run, kept = train(tmp_path, Checkpoint(), scores=scores, others=others)
    assert step(kept, "best") == 8
    assert set(run.tested) == {"test_accuracy"}
    assert torch.equal(weights["test"], kept.load_state("best")["model"]["0.weight"])
    assert torch.equal(run.model[0].weight, kept.load_state("last")["model"]["0.weight"])


def test_epochs_without_an_evaluation_are_not_the_best_and_say_nothing(tmp_path, capsys):
    scores = reports(test_accuracy=[99.0, 50.0, 99.0, 40.0, 45.0])
    _, kept = train(tmp_path, Checkpoint(), epochs=5, recipe={"eval_every": 2}, scores=scores)
    assert step(kept, "best") == 8  # evaluated: epochs 2, 4 and, because it is the last, 5
    assert "no plugin reports" not in capsys.readouterr().out


def test_an_epoch_that_is_the_best_is_saved_whatever_the_intervals(tmp_path):
    _, kept = train(tmp_path, Checkpoint(every_epochs=0), scores=reports(test_accuracy=[1.0, 3.0, 2.0]))
    assert (step(kept, "previous"), step(kept, "last")) == (8, 12)


def test_a_run_that_goes_on_knows_the_best_so_far(tmp_path):
    scores, stop = (
        reports(test_accuracy=[70.0, 60.0, 65.0]),
        watch(epoch_end=lambda run: run.stop("enough", exit_code=143)),
    )
    first = build_run({"checkpoint": Checkpoint(), "scores": scores, "stop": stop}, epochs=3)
    fit(first, tmp_path)
    rest = build_run({"checkpoint": Checkpoint(), "scores": scores}, epochs=3)
    rest.load_state_dict(RunDir(tmp_path).load_state("last"))
    rest.dir = first.dir
    fit(rest)
    assert (rest.step, step(rest.dir, "best")) == (12, 4)


def test_torch_loads_the_file_without_code_and_the_model_is_the_runs(tmp_path):
    run, _ = train(tmp_path, Checkpoint())
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    for name, value in run.model.state_dict().items():
        assert torch.equal(state["model"][name], value)


@pytest.mark.parametrize("options", [{"every_epochs": 2}, {"every_epochs": 0, "every_steps": 5}, {"every_epochs": 0}])
def test_the_end_is_always_saved(tmp_path, options):
    _, kept = train(tmp_path, Checkpoint(**options))
    assert step(kept, "last") == 12


def test_every_steps_saves_inside_an_epoch(tmp_path):
    _, kept = train(tmp_path, Checkpoint(every_epochs=0, every_steps=5))
    assert position(kept, "previous") == {"epoch": 2, "step": 10, "batch_index": 2}


def test_every_minutes_saves_by_the_clock(tmp_path):
    _, kept = train(tmp_path, Checkpoint(every_epochs=0, every_minutes=1e-9))
    assert step(kept, "previous") == 12  # after the last step; `last` is after its epoch


def test_a_stopped_run_is_saved_at_once(tmp_path):
    stop = watch(step_end=lambda run: run.stop("enough") if run.step == 6 else None)
    run, kept = train(tmp_path, Checkpoint(every_epochs=0), stop=stop)
    assert position(kept, "last") == {"epoch": 1, "step": 6, "batch_index": 2}
    assert run.stop_reason == "enough"


def test_unknown_metric_is_said_once_and_nothing_is_lost(tmp_path, capsys):
    _, kept = train(tmp_path, Checkpoint(best="f1"), scores=reports(test_accuracy=[1.0, 2.0, 3.0]))
    assert step(kept, "last") == 12
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    printed = capsys.readouterr().out
    assert printed.count("no plugin reports 'test_f1', so there is no best.pt; known: test_accuracy") == 1


def test_a_metric_without_a_direction_is_an_error(tmp_path):
    with pytest.raises(RunError, match="'checkpoint', safe_point: 'best': .*'test_accuracy' does not say whether less"):
        train(tmp_path, Checkpoint(), scores=reports(None, test_accuracy=[1.0, 2.0, 3.0]))


def test_a_failed_write_keeps_the_checkpoint_before_it(tmp_path, monkeypatch):
    run, kept = train(tmp_path, Checkpoint(), epochs=2)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()

    def full(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainkit_checkpoint.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        Checkpoint().safe_point(run)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    assert step(kept, "last") == 8

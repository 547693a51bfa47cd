import json
from pathlib import Path

import optuna
import pytest

import trainkit_search
from trainkit import load_recipe
from trainkit.cli import main

RECIPE = """\
name: found
epochs: 3
batch_size: 64
device: cpu
plugins:
  digits:
  hold_out: {fraction: 0.2}
  resnet: {stem: 4, blocks: [1], channels: [8]}
  cross_entropy:
  sgd: {lr: 0.1, momentum: 0.9}
  metrics:
  metric_log:
  checkpoint:
"""
SPACE = """\
trials: 5
space:
  plugins.sgd.lr: {low: 1e-4, high: 1.0, log: true}
  batch_size: [64, 128]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found.yaml").write_text(RECIPE)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def study():
    return optuna.load_study(study_name="search", storage="sqlite:///runs/found.search/search.db")


def test_the_best_trial_is_written_as_a_recipe_that_gives_its_value(folder, capsys):
    assert main(["search", "found.yaml", "space.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    home = Path("runs/found.search")
    results = {path.parent.name: json.loads(path.read_text()) for path in home.glob("trial-*/result.json")}
    assert len(results) == len(found["trials"]) == 5
    completed = [result["final"]["validation_accuracy"] for result in results.values() if not result["reason"]]
    assert found["value"] == max(completed)
    recipe = load_recipe("found.best.yaml")
    assert recipe.plugins["sgd"]["lr"] == found["best"]["plugins.sgd.lr"]
    assert recipe.batch_size in (64, 128)
    assert main(["run", "found.best.yaml", "--run-dir", "again"]) == 0
    again = json.loads(Path("again/result.json").read_text())
    assert again["final"]["validation_accuracy"] == found["value"]


def test_a_search_goes_on_where_it_was_broken_off(folder, capsys, monkeypatch):
    real, calls = trainkit_search._train, []

    def broken_off(trial, *args):
        calls.append(trial.number)
        if len(calls) == 2:
            trial.suggest_float("plugins.sgd.lr", 1e-4, 1.0, log=True)
            raise KeyboardInterrupt
        return real(trial, *args)

    monkeypatch.setattr(trainkit_search, "_train", broken_off)
    assert main(["search", "found.yaml", "space.yaml", "--trials", "2", "epochs=1"]) == 130
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "RUNNING"]
    proposed = study().trials[1].params["plugins.sgd.lr"]
    assert main(["search", "found.yaml", "space.yaml", "--trials", "2", "epochs=1"]) == 0
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study().trials[2].params["plugins.sgd.lr"] == proposed
    assert main(["search", "found.yaml", "space.yaml", "--trials", "2", "epochs=1"]) == 0  # nothing is left to do
    assert len(calls) == 3


def test_a_trial_that_falls_behind_is_ended(folder, capsys, monkeypatch):
    """A pruner that ends every trial after its second epoch stands for others that were better."""
    threshold = optuna.pruners.ThresholdPruner(lower=101.0, n_warmup_steps=2)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **options: threshold)
    assert main(["search", "found.yaml", "space.yaml", "epochs=4", "--trials", "2"]) == 2
    assert "no trial was completed" in capsys.readouterr().err
    assert [trial.state.name for trial in study().trials] == ["PRUNED", "PRUNED"]
    for number in (0, 1):
        result = json.loads(Path(f"runs/found.search/trial-{number}/result.json").read_text())
        assert "falls behind" in result["reason"]
        assert result["epochs"] == 2


def test_a_search_by_a_loss_must_say_that_less_is_better(folder, capsys):
    (folder / "space.yaml").write_text("metric: validation_loss\n" + SPACE)
    assert main(["search", "found.yaml", "space.yaml"]) != 0
    assert "less is better; say `better: less`" in capsys.readouterr().err
    (folder / "space.yaml").write_text("metric: validation_loss\nbetter: less\n" + SPACE)
    assert main(["search", "found.yaml", "space.yaml", "--trials", "3", "-o", "other"]) == 0
    losses = [json.loads(p.read_text())["final"]["validation_loss"] for p in Path("other").glob("*/result.json")]
    assert optuna.load_study(study_name="search", storage="sqlite:///other/search.db").best_value == min(losses)


def test_a_search_by_the_test_split_is_refused(folder, capsys):
    (folder / "space.yaml").write_text("metric: test_accuracy\n" + SPACE)
    assert main(["search", "found.yaml", "space.yaml"]) == 2
    assert "a search chooses by the validation split" in capsys.readouterr().err
    (folder / "space.yaml").write_text(SPACE)
    assert main(["search", "found.yaml", "space.yaml", "plugins.hold_out=false"]) == 2
    assert "the data have none; list a plugin that holds one out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("trials: 3", "expected a mapping with `space`"),
        ("space: {epochs: [1]}", "space.epochs: expected two values or more"),
        ("space: {epochs: 3}", "space.epochs: expected a list of values, or"),
        ("space: {epochs: {low: 3, high: 1}}", "low must be less than high"),
        ("space: {epochs: {low: 0, high: 1, log: true}}", "greater than 0"),
        ("space: {epochs: {low: a, high: 1}}", "are numbers"),
        ("trails: 3\nspace: {epochs: [1, 2]}", "trails: unknown key; did you mean 'trials'"),
        ("trials: 0\nspace: {epochs: [1, 2]}", "at least 1 trial"),
        ("space: {plugins.sgd.lrr: [1, 2]}", "plugins.sgd.lrr: unknown key"),
        ("metric: validation_speed\nspace: {epochs: [1, 2]}", "reports 'validation_speed'"),
        ("better: bigger\nspace: {epochs: [1, 2]}", "better: expected more or less"),
        ("space: [", "YAML syntax"),
        ("space: &a {x: *a}", "aliases"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder, capsys, space, said):
    (folder / "space.yaml").write_text(space)
    assert main(["search", "found.yaml", "space.yaml"]) == 2
    assert said in capsys.readouterr().err

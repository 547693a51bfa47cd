import json
import math
import multiprocessing
import os
import shutil
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import trainkit_studies
from trainkit import fit
from trainkit.cli import main
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, build_run
from trainkit_mlflow import MLflow

RECIPE = """\
name: watched
description: one that is watched
seed: 3
epochs: 2
batch_size: 512
device: cpu
plugins:
  digits:
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics: {every: 1}
  metric_log:
  mlflow:
  checkpoint: {every_steps: 1}
"""
NOWHERE = "http://127.0.0.1:9"  # where nothing listens


def started(code):
    """Run code in the current folder, in a process that has loaded torch and not MLflow, as a user's."""
    code = f"import os, sys\nos.chdir({os.getcwd()!r})\nfrom trainkit.cli import main\n{code}"
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(code, {}))
    process.start()
    return process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store in which nothing is yet: to make MLflow's tables takes seconds."""
    folder = tmp_path_factory.mktemp("made")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watched.yaml").write_text(RECIPE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(made.read_bytes())
    return tmp_path


def store(folder):
    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")


def runs_of(folder, experiment="watched"):
    client = store(folder)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def history(folder, run, name):
    return [(m.step, m.value) for m in store(folder).get_metric_history(run.info.run_id, name)]


def recorded(run_dir):
    """What metrics.jsonl has: for each name the steps and values."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("epoch", "step"):
                found.setdefault(name, []).append((row["step"], value))
    return found


def assert_same_as_the_records(folder, run, run_dir):
    expected = recorded(run_dir)
    assert set(run.data.metrics) == set(expected)
    for name, values in expected.items():
        assert sorted(history(folder, run, name)) == sorted(values), name


@pytest.mark.slow
def test_mlflow_reads_records_recipe_result_and_files(folder, tmp_path_factory):
    assert main(["run", "watched.yaml", "--run-dir", "runs/watched/a", "plugins.figures={}"]) == 0
    (run,) = runs_of(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "watched/a")
    assert_same_as_the_records(folder, run, folder / "runs/watched/a")
    params = run.data.params
    assert (params["epochs"], params["plugins.sgd.lr"], params["plugins.resnet.blocks"]) == ("2", "0.1", "[1]")
    assert params["plugins.sgd.momentum"] == "0.0"  # a default
    assert "checkpoint" in json.loads(params["plugins"])
    tags = run.data.tags
    assert (tags["trainkit.recipe"], tags["trainkit.seed"], tags["trainkit.status"]) == ("watched", "3", "completed")
    assert tags["mlflow.note.content"] == "one that is watched"
    environment = json.loads((folder / "runs/watched/a/environment.json").read_text())
    assert tags.get("trainkit.revision") == environment["revision"]
    client, copies = store(folder), tmp_path_factory.mktemp("copies")
    for name in ("recipe.yaml", "result.json", "figures/accuracy.png"):
        kept = Path(client.download_artifacts(run.info.run_id, name, str(copies)))
        assert kept.read_bytes() == (folder / "runs/watched/a" / name).read_bytes()
    assert run.info.artifact_uri.startswith((folder / "runs" / "mlartifacts").as_uri())
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "watched.yaml"]


def test_a_dry_run_leaves_nothing(folder):
    before = (folder / "runs/mlflow.db").read_bytes()
    assert main(["run", "watched.yaml", "--dry-run"]) == 0
    assert (folder / "runs/mlflow.db").read_bytes() == before
    assert sorted(path.name for path in folder.rglob("*")) == ["mlflow.db", "runs", "watched.yaml"]


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_one_run_with_each_value_once(folder):
    (folder / "watched.yaml").write_text(RECIPE.replace("epochs: 2", "epochs: 2000").replace("every_steps: 1", ""))
    process = started("main(['run', 'watched.yaml', '--run-dir', 'runs/k'])")
    try:
        deadline = time.monotonic() + 120
        while len(runs_of(folder)) == 0 or "test_loss" not in runs_of(folder)[0].data.metrics:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(0.5)
    finally:
        process.kill()
        process.join()
    (run,) = runs_of(folder)
    assert run.info.status == "RUNNING"
    reached = max(step for step, _ in history(folder, run, "loss"))
    # Stand back, as where the last checkpoint was lost: what MLflow has of the steps after it is trained again.
    (folder / "runs/k/checkpoints/last.pt").unlink()
    assert main(["resume", "runs/k", f"max_steps={reached + 6}"]) == 0
    (run,) = runs_of(folder)
    assert run.info.status == "FINISHED"
    assert_same_as_the_records(folder, run, folder / "runs/k")
    (resumed,) = json.loads(run.data.tags["trainkit.resumed"])
    assert resumed["step"] < reached
    assert run.data.params["epochs"] == "2000"


def test_a_repeated_step_with_another_value_is_there_twice_and_the_later_is_the_runs(folder):
    assert main(["run", "watched.yaml", "--run-dir", "runs/a", "max_steps=1"]) == 0
    shutil.copytree("runs/a/checkpoints", "earlier")
    assert main(["resume", "runs/a", "max_steps=3"]) == 0
    (run,) = runs_of(folder)
    first = dict(history(folder, run, "loss"))
    with sqlite3.connect(folder / "runs/mlflow.db") as database:  # as another machine may have computed it
        database.execute("UPDATE metrics SET value = 99.5 WHERE key = 'loss' AND step = 2")
    shutil.rmtree("runs/a/checkpoints")
    Path("earlier").rename("runs/a/checkpoints")
    assert main(["resume", "runs/a", "max_steps=4"]) == 0
    (run,) = runs_of(folder)
    found = sorted(store(folder).get_metric_history(run.info.run_id, "loss"), key=lambda m: (m.step, m.timestamp))
    assert [(m.step, m.value) for m in found[:4]] == [(1, first[1]), (2, 99.5), (2, first[2]), (3, first[3])]
    assert [m.step for m in found[4:]] == [4]
    assert json.loads(run.data.tags["trainkit.resumed"])[-1]["step"] == 1


def test_a_study_is_one_experiment_in_one_store(folder, monkeypatch):
    class Here:  # runs start no processes, which would load torch and MLflow each
        def train(self, planned, options, variables):
            return main(planned.command(options))

    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here())
    assert main(["run", "watched.yaml", "--seeds", "0-1"]) == 0
    runs = runs_of(folder)
    assert {run.data.tags["trainkit.seed"] for run in runs} == {"0", "1"}
    assert {run.info.run_name.rpartition("/")[2] for run in runs} == {"seed-0", "seed-1"}
    assert len(list(folder.rglob("*.db"))) == 1


def test_a_failure_and_a_stop_are_told_apart(folder):
    @plugin
    class Fails:
        @hookimpl
        def step_end(self):
            raise ValueError("no")

    @plugin
    class Stops:
        @hookimpl
        def step_end(self, run):
            run.stop("SIGTERM", 143)

    for name, other in (("fails", Fails()), ("stops", Stops())):
        run = build_run({name: other, "mlflow": MLflow(experiment="both")})
        if name == "fails":
            with pytest.raises(Exception, match="ValueError: no"):
                fit(run, f"runs/{name}")
        else:
            fit(run, f"runs/{name}")
    found = {run.info.run_name: run for run in runs_of(folder, "both")}
    assert (found["fails"].info.status, found["stops"].info.status) == ("FAILED", "KILLED")
    assert "ValueError: no" in found["fails"].data.tags["trainkit.reason"]
    assert found["stops"].data.tags["trainkit.reason"] == "SIGTERM"


def test_values_that_are_no_number_and_names_that_mlflow_refuses_arrive(folder):
    @plugin
    class Logs:
        @hookimpl
        def step_end(self, run):
            run.log({"f1@macro": 0.5, "nan": math.nan, "infinite": math.inf})

    fit(build_run({"logs": Logs(), "mlflow": MLflow(experiment="odd")}, epochs=1), "runs/odd")
    (run,) = runs_of(folder, "odd")
    assert run.data.metrics["f1_macro"] == 0.5
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["infinite"] > 1e308


def test_a_long_value_is_cut_where_one_sees_it(folder):
    long = "x" * 7000
    fit(build_run({"mlflow": MLflow(experiment="long")}, source=long), "runs/long")
    (run,) = runs_of(folder, "long")
    assert run.data.params["source"] == f"{long[:5999]}…"


def test_a_store_that_has_lost_the_run_gets_a_new_one(folder, made, capsys):
    assert main(["run", "watched.yaml", "--run-dir", "runs/a", "max_steps=2"]) == 0
    (folder / "runs/mlflow.db").write_bytes(made.read_bytes())
    assert main(["resume", "runs/a", "max_steps=4"]) == 0
    assert "a new one is begun there" in " ".join(capsys.readouterr().out.split())
    (run,) = runs_of(folder)
    assert {step for step, _ in history(folder, run, "loss")} == {3, 4}


# Stores that cannot be used


def test_an_unreachable_server_is_one_error_at_the_start(folder, capsys):
    begun = time.monotonic()
    assert main(["run", "watched.yaml", f"plugins.mlflow.tracking_uri={NOWHERE}"]) == 1
    assert time.monotonic() - begun < 8
    said = " ".join(capsys.readouterr().err.split())
    assert f"{NOWHERE}: MLflow's store cannot be used" in said
    assert "plugins.mlflow=false" in said
    assert "Traceback" not in said


def test_a_server_that_never_answers_does_not_hang_the_start(folder, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 10 unless the user says otherwise
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        assert main(["run", "watched.yaml", f"plugins.mlflow.tracking_uri={address}"]) == 1
        assert time.monotonic() - begun < 6
    assert "MLflow's store cannot be used" in " ".join(capsys.readouterr().err.split())


@plugin
class Breaks:
    """Makes the store refuse metrics from a step on, and perhaps no longer from another one on."""

    at: int
    back: int = -1

    @hookimpl
    def step_end(self, run):
        refuse = "CREATE TRIGGER full BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        if run.step in (self.at, self.back):
            with sqlite3.connect("runs/mlflow.db") as database:
                database.execute(refuse if run.step == self.at else "DROP TRIGGER full")


def test_a_store_that_goes_away_is_one_warning_and_the_training_ends(folder, capsys):
    run = build_run({"mlflow": MLflow(experiment="away"), "breaks": Breaks(at=2)}, epochs=9)
    assert fit(run, "runs/away").status == "completed"
    printed = capsys.readouterr()
    said = " ".join(printed.out.split())
    assert said.count("training goes on") == 1
    assert "the disk is full" in said
    assert "values are not in MLflow" in said
    assert printed.err == ""


def test_what_waited_for_a_store_is_written_once_it_is_back(folder, capsys):
    run = build_run({"mlflow": MLflow(experiment="back"), "breaks": Breaks(at=2, back=6)}, epochs=3)
    fit(run, "runs/back")
    said = " ".join(capsys.readouterr().out.split())
    assert "training goes on" in said
    assert "not in MLflow" not in said
    (found,) = runs_of(folder, "back")
    assert [step for step, _ in history(folder, found, "lr")] == [row["step"] for row in run.history]
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize(
    "uri",
    ["databricks", "file:///tmp/x", "sqlite:///", "sqlite:///a.db?x=1", "mysql://h/d", "runs/mlflow.db", "http://", ""],
)
def test_what_is_no_store_is_refused(folder, capsys, uri):
    assert main(["run", "watched.yaml", f"plugins.mlflow.tracking_uri='{uri}'"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "plugins.mlflow.tracking_uri" in said
    assert "must be http://HOST:PORT, https://HOST or sqlite:///FILE" in said


def test_a_password_in_a_recipe_is_refused(folder, capsys):
    assert main(["run", "watched.yaml", "plugins.mlflow.tracking_uri=http://me:secret@host"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "MLFLOW_TRACKING_PASSWORD" in said


def test_a_recipe_alone_does_not_get_the_users_credentials(folder, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    assert main(["run", "watched.yaml", f"plugins.mlflow.tracking_uri={NOWHERE}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"set MLFLOW_TRACKING_URI={NOWHERE} to allow it" in said
    assert "secret" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    assert main(["run", "watched.yaml", f"plugins.mlflow.tracking_uri={NOWHERE}"]) == 1


def test_a_database_of_something_else_is_left_alone(folder, capsys):
    path = folder / "notes.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    assert main(["run", "watched.yaml", "plugins.mlflow.tracking_uri=sqlite:///notes.db"]) == 2
    assert "notes.db: not a store of MLflow" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == before
    path.write_text("no database at all, and longer than a header of SQLite is; " * 9)
    assert main(["run", "watched.yaml", "plugins.mlflow.tracking_uri=sqlite:///notes.db"]) == 2


def test_a_file_that_puts_artifacts_elsewhere_is_not_obeyed(folder, capsys, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    store(folder).create_experiment("stranger", artifact_location=elsewhere.as_uri())
    fit(build_run({"mlflow": MLflow(experiment="stranger")}), "runs/stranger")
    assert "artifacts would go to" in " ".join(capsys.readouterr().out.split())
    assert list(elsewhere.iterdir()) == []


def test_a_run_directory_that_names_no_run_is_refused(folder, capsys):
    assert main(["run", "watched.yaml", "--run-dir", "runs/a", "max_steps=1"]) == 0
    (folder / "runs/a/mlflow.json").write_text('{"run_id": "../../x"}')
    assert main(["resume", "runs/a", "max_steps=2"]) == 1
    assert "names no run of MLflow; remove it" in " ".join(capsys.readouterr().err.split())


# What it leaves alone


@pytest.mark.slow
def test_it_keeps_the_promises_of_every_plugin(made, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(made.read_bytes())
    assert_conforms(MLflow, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_the_users_settings_come_back_and_telemetry_is_off(folder):
    process = started(
        "import threading\n"
        "os.dup2(os.open('said.txt', os.O_WRONLY | os.O_CREAT), 2)\n"
        "for name in [n for n in os.environ if n.startswith(('MLFLOW', 'PYTEST', 'CI', 'DO_NOT_TRACK'))]:\n"
        "    del os.environ[name]\n"
        "assert main(['plugins', 'list']) == 0 and 'mlflow' not in sys.modules\n"
        "assert main(['run', 'watched.yaml', '--run-dir', 'runs/a']) == 0\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None\n"
        "assert threading.enumerate() == [threading.main_thread()]\n"
        "assert [name for name in os.environ if name.startswith('MLFLOW')] == []\n"
    )
    process.join()
    said = Path("said.txt").read_text()
    assert process.exitcode == 0, said
    assert "INFO" not in said

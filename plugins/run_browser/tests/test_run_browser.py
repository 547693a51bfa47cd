import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.cli import main

RECIPE = """\
name: small
epochs: 2
batch_size: 512
device: cpu
expect: {test_accuracy: 98.0}
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  metric_log:
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(RECIPE)
    for name, overrides in (("a", []), ("b", ["seed=1", "plugins.sgd.lr=0.05"])):
        assert (
            main(["run", str(folder / "small.yaml"), "--run-dir", str(folder / "runs" / "small" / name), *overrides])
            == 0
        )
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """Two real runs, runs/small/a and the newer runs/small/b, below the current directory."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    for seconds, name in enumerate("ab"):
        for path in (tmp_path / "runs" / "small" / name).iterdir():
            os.utime(path, (10**9 + seconds, 10**9 + seconds))
    return tmp_path / "runs" / "small"


@pytest.fixture
def ask(capsys):
    """Run a command with --json and return its exit code, document and errors."""

    def ask(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err.splitlines()

    return ask


def test_list_has_the_newest_first_with_what_each_reached(runs, ask):
    code, listed, errors = ask("runs", "list")
    assert (code, errors) == (0, [])
    assert [run["run"] for run in listed] == ["runs/small/b", "runs/small/a"]
    assert listed[1]["result.json"] == json.loads((runs / "a" / "result.json").read_text())
    os.utime(runs / "a" / "result.json", (2 * 10**9, 2 * 10**9))
    assert [run["run"] for run in ask("runs", "list")[1]] == ["runs/small/a", "runs/small/b"]


def test_list_prints_a_row_for_each(runs, capsys):
    assert main(["runs", "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((runs / "a" / "result.json").read_text())
    (row,) = (line.split() for line in printed if "runs/small/a" in line)
    assert row[:3] == ["runs/small/a", "completed", "2"]
    assert float(row[3]) == pytest.approx(result["final"]["test_accuracy"], abs=0.01)
    assert float(row[4]) == pytest.approx(result["best"]["test_accuracy"]["value"], abs=0.01)
    assert row[5] == "98"


def test_list_finds_runs_in_the_folder_of_one_recipe(runs, ask):
    assert {run["run"] for run in ask("runs", "list", "runs/small")[1]} == {"runs/small/a", "runs/small/b"}


def test_a_run_without_result_counts_as_far_as_it_came(runs, ask):
    (runs / "b" / "result.json").unlink()
    (runs / "b" / "metrics.csv").write_text("epoch,step,test_accuracy\n1,3,50.5\n2,6,80.25\n3,9,70.0\n")
    code, listed, _ = ask("runs", "list")
    assert code == 0
    assert listed[0]["result.json"] == {
        "status": "running or killed",
        "epochs": 3,
        "final": {"epoch": 3, "step": 9, "test_accuracy": 70.0},
        "best": {"test_accuracy": {"value": 80.25, "epoch": 2}},
        "expected": {"test_accuracy": 98.0},
    }


@pytest.mark.parametrize("table", [None, "", "epoch,test_accuracy\n1,fifty\n", "epoch\n1,2,3\n"])
def test_a_run_that_has_no_epochs_yet_is_listed(runs, ask, table):
    (runs / "b" / "result.json").unlink()
    (runs / "b" / "metrics.csv").unlink()
    if table is not None:
        (runs / "b" / "metrics.csv").write_text(table)
    code, listed, _ = ask("runs", "list")
    assert (code, listed[0]["result.json"]["status"], listed[0]["result.json"]["epochs"]) == (0, "running or killed", 0)


@pytest.mark.parametrize("text", ["", '{"status": "comp', "[1, 2]", "7", '"x"', "null", "\x00"])
def test_a_broken_result_is_named_and_the_others_are_listed(runs, ask, text):
    (runs / "b" / "result.json").write_text(text)
    code, listed, errors = ask("runs", "list")
    assert code == 1
    assert len(errors) == 1
    assert errors[0].startswith("error: runs/small/b/result.json: ")
    assert [run["result.json"].get("status") for run in listed] == [None, "completed"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
parts = st.sampled_from(["status", "epochs", "final", "best", "expected", "seconds"])


@settings(max_examples=20)
@given(st.dictionaries(parts, anything | st.dictionaries(st.just("test_accuracy"), anything)), anything, anything)
def test_no_json_stops_a_listing(made, result, lock, environment):
    run = made / "strange" / "run"
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE)
    for name, value in (("result", result), ("plugins.lock", lock), ("environment", environment)):
        (run / f"{name}.json").write_text(json.dumps(value))
    assert main(["runs", "list", str(run.parent)]) == 0
    assert main(["runs", "show", str(run)]) in (0, 1)
    assert main(["runs", "compare", str(run), str(made / "runs" / "small" / "a")]) in (0, 1)


def test_list_of_no_folder_and_of_an_empty_one(tmp_path, capsys):
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert main(["runs", "list", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_show_tells_all_that_the_files_say(runs, ask):
    code, shown, errors = ask("runs", "show", "runs/small/a")
    assert (code, errors) == (0, [])
    for name in ("result.json", "environment.json"):
        assert shown[name] == json.loads((runs / "a" / name).read_text())
    lock = json.loads((runs / "a" / "plugins.lock.json").read_text())
    assert list(shown["plugins.lock.json"].values()) == lock
    assert shown["recipe.yaml"]["plugins"]["sgd"] == {"lr": 0.1}
    assert shown["files"] == {p.name: p.stat().st_size for p in sorted((runs / "a").iterdir())}


def test_show_puts_what_is_expected_beside_what_was_reached(runs, capsys):
    (runs / "a" / "figures").mkdir()
    (runs / "a" / "figures" / "loss.png").write_bytes(bytes(1234))
    assert main(["runs", "show", "runs/small/a"]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line.split()]
    at = names.index("final.test_accuracy")
    assert names[at + 1 : at + 4] == ["best.test_accuracy.value", "best.test_accuracy.epoch", "expected.test_accuracy"]
    for said in ("{'lr': 0.1}", "environment.packages.torch"):
        assert said in printed
    assert ["figures/loss.png", "1,234"] in [line.split() for line in printed.splitlines()]


def test_show_names_files_that_are_gone_or_broken(runs, ask):
    (runs / "a" / "environment.json").unlink()
    (runs / "a" / "plugins.lock.json").write_text('["sgd"]')
    code, shown, errors = ask("runs", "show", "runs/small/a")
    assert code == 1
    assert [error.split(":")[1].strip() for error in errors] == [
        "runs/small/a/plugins.lock.json",
        "runs/small/a/environment.json",
    ]
    assert shown["result.json"]["status"] == "completed"


@pytest.mark.parametrize("command", ["show", "compare"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys, command):
    assert main(["runs", command, str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_compare_shows_what_differs_and_nothing_else(runs, ask):
    code, compared, _ = ask("runs", "compare", "runs/small/a", "runs/small/b")
    assert code == 0
    assert compared["differences"] == {"seed": [0, 1], "plugins.sgd.options.lr": [0.1, 0.05]}
    results = [json.loads((runs / name / "result.json").read_text()) for name in "ab"]
    assert compared["results"]["run"] == ["runs/small/a", "runs/small/b"]
    assert compared["results"]["final.test_loss"] == [result["final"]["test_loss"] for result in results]


def test_compare_of_a_run_with_itself_differs_in_nothing(runs, ask, capsys):
    assert ask("runs", "compare", "runs/small/a", "runs/small/a")[1]["differences"] == {}
    assert main(["runs", "compare", "runs/small/a", "runs/small/a"]) == 0
    assert "none" in capsys.readouterr().out.splitlines()[-2]


def test_compare_sees_versions_order_environment_and_data(runs, ask):
    shutil.rmtree(runs / "b")
    shutil.copytree(runs / "a", runs / "b")
    lock = json.loads((runs / "b" / "plugins.lock.json").read_text())
    lock[3]["version"] = "9.9"
    (runs / "b" / "plugins.lock.json").write_text(json.dumps([*lock[:-2], lock[-1], lock[-2]]))
    environment = json.loads((runs / "b" / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    environment["data"]["train"]["fingerprint"] = "x"
    (runs / "b" / "environment.json").write_text(json.dumps(environment))
    _, compared, _ = ask("runs", "compare", "runs/small/a", "runs/small/b")
    differences = {key: values[1] for key, values in compared["differences"].items()}
    assert differences == {
        "plugins.order": ["digits", "resnet", "cross_entropy", "sgd", "metric_log", "metrics"],
        "plugins.sgd.version": "9.9",
        "environment.packages.torch": "1.0",
        "environment.data.train.fingerprint": "x",
    }


def test_nothing_raw_reaches_the_terminal(runs, capsys):
    (runs / "a").rename(runs / "a\x1b[31m")
    result = {"status": "\x1b]0;owned\x07[red]", "reason": "[bold]x[/nonsense]"}
    (runs / "a\x1b[31m" / "result.json").write_text(json.dumps(result))
    for command in (["list"], ["show", "runs/small/a\x1b[31m"], ["compare", "runs/small/a\x1b[31m", "runs/small/b"]):
        assert main(["runs", *command]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert "[red]" in printed


def test_listing_does_not_import_torch(runs):
    code = "import sys; from trainkit.cli import main; main(['runs', 'list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", ["list", "show", "compare"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main(["runs", command, "--help"])
    assert f"trainkit runs {command}" in capsys.readouterr().out.split("examples:")[1]

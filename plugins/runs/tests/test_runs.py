import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainkit.cli import main
from trainkit.rundir import RunDir

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
    assert row[:4] == ["runs/small/a", "0", "completed", "2"]
    assert float(row[4]) == pytest.approx(result["final"]["test_accuracy"], abs=0.01)
    assert float(row[5]) == pytest.approx(result["best"]["test_accuracy"]["value"], abs=0.01)
    assert row[6] == "98"


def test_list_tells_what_sets_a_run_apart_from_most_of_its_recipe(runs, ask, capsys):
    shutil.copytree(runs / "a", runs / "c")
    listed = {run["run"][-1]: (run["seed"], run["differs"]) for run in ask("runs", "list")[1]}
    assert listed == {"a": (0, []), "b": (1, ["sgd.lr=0.05"]), "c": (0, [])}
    assert main(["runs", "list"]) == 0
    assert "\n   sgd.lr=0.05 " in capsys.readouterr().out


def test_list_is_sorted_as_it_is_asked(runs, ask):
    for name, final in (("a", {"test_accuracy": 90.0, "test_loss": 0.1}), ("b", {"test_accuracy": 95.0})):
        path = runs / name / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "final": final}))

    def order(*arguments):
        return "".join(run["run"][-1] for run in ask("runs", "list", *arguments)[1])

    assert [order("--sort", key) for key in ("newest", "name", "seed", "final")] == ["ba", "ab", "ab", "ba"]
    assert order("--sort", "final", "--metric", "test_loss") == "ab"  # b has none
    with pytest.raises(SystemExit):
        main(["runs", "list", "--sort", "speed"])


def test_at_80_columns_no_word_or_number_is_broken(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = runs / "20260101-120000-0000000"
    shutil.copytree(runs / "b", long)
    assert main(["runs", "list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "runs/small/20260101-120000-0000000 " in printed
    assert printed.count("completed") == 3
    assert main(["runs", "compare", "runs/small/a", "runs/small/b"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "plugins.sgd.lr   0.1     0.05" in printed
    assert "parameters" not in printed  # which do not differ


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
    assert shown["plugins.lock.json"] == lock
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
    for said in ("lr: 0.1", "environment.packages"):
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


@pytest.mark.parametrize("command", ["show", "compare", "check"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys, command):
    assert main(["runs", command, str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_compare_shows_what_differs_and_nothing_else(runs, ask):
    code, compared, _ = ask("runs", "compare", "runs/small/a", "runs/small/b")
    assert code == 0
    assert compared["differences"] == {"seed": [0, 1], "plugins.sgd.lr": [0.1, 0.05]}
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
    (runs / "b" / "plugins.lock.json").write_text(json.dumps([*lock[:2], lock[3], lock[2], *lock[4:]]))
    environment = json.loads((runs / "b" / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (runs / "b" / "environment.json").write_text(json.dumps(environment))
    data = json.loads((runs / "b" / "data.json").read_text())
    data["splits"]["train"]["content"] = "x"
    (runs / "b" / "data.json").write_text(json.dumps(data))
    _, compared, _ = ask("runs", "compare", "runs/small/a", "runs/small/b")
    differences = {key: values[1] for key, values in compared["differences"].items()}
    assert differences == {
        "plugins.sgd version": "9.9",
        "order of plugins": "digits, resnet, sgd, cross_entropy, metrics",
        "environment.packages.torch": "1.0",
        "data.splits.train.content": "x",
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


@pytest.mark.parametrize("command", ["list", "show", "compare", "check"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main(["runs", command, "--help"])
    assert f"trainkit runs {command}" in capsys.readouterr().out.split("examples:")[1]


# ---- runs check

CHECKED = """\
name: small
epochs: 2
batch_size: 4
device: cpu
plugins:
  image_folder: {root: images, size: 8}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics: {every: 1}
  metric_log:
  checkpoint:
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    for n in range(16):
        path = folder / "images" / ("train" if n < 12 else "test") / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * n, 0, 0)).save(path)
    (folder / "small.yaml").write_text(CHECKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "small.yaml", "--run-dir", "run"]) == 0
    return folder


@pytest.fixture
def run(ended, tmp_path, monkeypatch):
    """A real run that has ended, in the current directory, and beside it its data."""
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    return tmp_path / "run"


@pytest.fixture
def check(capsys):
    """Check the run; return exit code, verdict of each part, and the whole document."""

    def check():
        capsys.readouterr()
        code = main(["runs", "check", "run", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert code == (0 if found["whole"] and found["exact"] else 1)
        return code, {f["what"]: f["verdict"] for f in found["findings"]}, found

    return check


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_as_it_was_left_is_whole_and_exact(run, check):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, verdicts, found = check()
    assert code == 0
    assert set(verdicts.values()) == {"whole"}
    assert set(verdicts) == {str(p.relative_to(run)) for p in before}
    assert found["answer"] == "would resume exactly, from epoch 2, batch 0, step 6"
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_the_table_ends_with_the_answer(run, capsys):
    assert main(["runs", "check", "run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert ["checkpoints/previous.pt", "whole", "epoch", "1,", "batch", "0,", "step", "3"] in map(str.split, printed)
    assert printed[-1] == "would resume exactly, from epoch 2, batch 0, step 6"


def test_a_killed_run_that_is_whole_passes(run, check):
    (run / "result.json").unlink()
    shutil.copy(run / "checkpoints" / "previous.pt", run / "checkpoints" / "last.pt")
    code, verdicts, found = check()
    assert (code, verdicts["result.json"]) == (0, "absent")
    assert found["answer"] == "would resume exactly, from epoch 1, batch 0, step 3"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("recipe.yaml", "epochs: 2", "epochs: two"),
        ("plugins.lock.json", "]", ""),
        ("plugins.lock.json", '"name"', '"title"'),
        ("environment.json", "{", "["),
        ("environment.json", '"device"', '"machine"'),
        ("result.json", "}", ""),
        ("metrics.jsonl", '{"epoch": 2, "step": 4', '{"epoch": 2, "step": '),
        ("metrics.jsonl", '{"epoch": 2, "step": 4', '{"epoch": 2, "step": 2'),
        ("metrics.jsonl", '{"epoch": 2, "step": 4', '{"epoch": 0, "step": 4'),
        ("metrics.jsonl", '{"epoch": 2, "step": 4', '{"epoch": 2, "stop": 4'),
        ("metrics.csv", "epoch,", "epoch,more,"),
        ("metrics.csv", "\n2,", "\n3,"),
        ("metrics.csv", "\n2,", "\nx,"),
        ("metrics.csv", "\n2,", "\n\n2,"),
    ],
)
def test_a_file_that_is_not_whole_is_broken(run, check, name, old, new):
    edit(run / name, old, new)
    code, verdicts, _ = check()
    assert code == 1
    assert {what for what, verdict in verdicts.items() if verdict == "broken"} == {name}


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv", "plugins.lock.json"])
def test_a_file_that_was_cut_short_is_broken(run, check, name):
    (run / name).write_bytes((run / name).read_bytes()[:-10])
    assert check()[1][name] == "broken"
    (run / name).write_bytes(b"")
    assert check()[1][name] == ("whole" if name == "metrics.jsonl" else "broken")


@pytest.mark.parametrize("name", ["plugins.lock.json", "environment.json"])
def test_a_file_that_every_run_has_may_not_be_absent(run, check, name):
    (run / name).unlink()
    code, verdicts, _ = check()
    assert (code, verdicts[name]) == (1, "broken")


def test_a_damaged_checkpoint_is_broken_and_the_one_before_it_resumes(run, check):
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    code, verdicts, found = check()
    assert code == 1
    assert {what for what, verdict in verdicts.items() if verdict == "broken"} == {"checkpoints/last.pt"}
    assert found["exact"]
    assert found["answer"].startswith(
        "would resume exactly, from epoch 1, batch 0, step 3 (run/checkpoints/last.pt: damaged"
    )


def test_without_checkpoints_it_would_not_resume(run, check):
    shutil.rmtree(run / "checkpoints")
    code, verdicts, found = check()
    assert (code, verdicts["checkpoints/last.pt"], found["whole"]) == (1, "absent", True)
    assert found["answer"].startswith("would not: run/checkpoints/last.pt: no checkpoint")


def test_another_version_and_a_plugin_that_is_gone_differ(run, check):
    lock = json.loads((run / "plugins.lock.json").read_text())
    lock[3]["version"] = "9.9"
    lock[4]["name"] = "unicorn"
    (run / "plugins.lock.json").write_text(json.dumps(lock))
    code, verdicts, found = check()
    assert code == 1
    assert {what for what, verdict in verdicts.items() if verdict == "differs"} == {"plugin sgd", "plugin unicorn"}
    details = {f["what"]: f["detail"] for f in found["findings"]}
    assert details["plugin sgd"].startswith("was trainkit-sgd 9.9, is trainkit-sgd ")
    assert details["plugin unicorn"].endswith("is not installed")


def test_a_changed_recipe_would_not_resume_exactly(run, check):
    edit(run / "recipe.yaml", "batch_size: 4", "batch_size: 2")
    edit(run / "recipe.yaml", "lr: 0.1", "lr: 0.2")
    code, verdicts, found = check()
    assert code == 1
    assert set(verdicts.values()) == {"whole"}
    changes = "batch_size was 4 and is 2; plugins.sgd.lr was 0.1 and is 0.2"
    assert found["answer"] == f"would not: {changes}"


def test_changed_data_would_not_resume_exactly(run, check):
    (path,) = run.parent.rglob("3.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).save(path)
    code, _, found = check()
    assert code == 1
    assert found["answer"].startswith("would not: data.splits.train.content was")


def test_data_that_cannot_be_opened_are_a_reason(run, check):
    shutil.rmtree(run.parent / "images")
    code, _, found = check()
    assert (code, found["whole"]) == (1, True)
    assert found["answer"].startswith("would not: plugin 'image_folder'")
    assert "images" in found["answer"]


def test_rows_that_the_checkpoint_counted_must_be_there(run, check):
    log = run / "metrics.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[:-1]))
    assert (
        check()[2]["answer"]
        == f"would not: metrics.jsonl has {len(rows) - 1} rows and the checkpoint counted {len(rows)}"
    )
    log.write_text("".join([*rows, rows[-1]]))  # as a run leaves that is killed after a checkpoint
    assert check()[0] == 0


def test_a_run_that_another_process_writes_would_not_resume(run, check):
    with RunDir(run).exclusive():
        code, _, found = check()
    assert (code, found["whole"]) == (1, True)
    assert "another process is writing" in found["answer"]


@pytest.mark.parametrize("name", ["result.json", "data.json", "metrics.jsonl", "metrics.csv", "recipe.yaml"])
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "deep"])
def test_no_file_of_a_run_blocks_a_command_or_ends_it_with_a_traceback(runs, capsys, name, kind):
    path = runs / "a" / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "deep":
        path.write_text("[" * 5000 + "]" * 5000)
    else:
        path.symlink_to(kind)
    for arguments in (["list"], ["show", "runs/small/a"], ["compare", "runs/small/a", "runs/small/b"]):
        code = main(["runs", *arguments])
        said = capsys.readouterr()
        assert code in (0, 1, 2)
        assert "Error" not in said.err
        assert "--traceback" not in said.err


def test_a_link_that_leads_nowhere_is_no_run(runs, ask):
    (runs / "c").mkdir()
    (runs / "c" / "recipe.yaml").symlink_to("recipe.yaml")
    assert len(ask("runs", "list")[1]) == 2


def test_an_integer_beyond_float_is_shown(runs, capsys):
    (runs / "a" / "result.json").write_text('{"status": "completed", "epochs": 1' + "0" * 400 + "}")
    assert main(["runs", "list"]) == 0

import json
import shutil

import pytest
from PIL import Image

from trainkit.cli import main
from trainkit.rundir import RunDir

RECIPE = """\
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
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for n in range(16):
        path = folder / "images" / ("train" if n < 12 else "test") / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * n, 0, 0)).save(path)
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "small.yaml", "--run-dir", "run"]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A real run that has ended, in the current directory, and beside it its data."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
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
    assert found["answer"] == "would not: batch_size was 4 and is 2; plugins.sgd.lr was 0.1 and is 0.2"


def test_changed_data_would_not_resume_exactly(run, check):
    (path,) = run.parent.rglob("3.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).save(path)
    code, _, found = check()
    assert code == 1
    assert found["answer"].startswith("would not: environment.data.train.fingerprint was")


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


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["runs", "check", str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["runs", "check", "--help"])
    assert "trainkit runs check" in capsys.readouterr().out.split("examples:")[1]

"""Nothing is lost: a run that is interrupted in any way continues to the same end, bit for bit."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
import torch

from trainkit.cli import main
from trainkit.rundir import RunDir, pack_state

from .processes import Process

EVERY = ["plugins.checkpoint.every_steps=1"]
# A schedule that is made for more epochs than a run has at first, so that the run may become longer.
LONG = "plugins.cosine_annealing_lr.t_max=9"
FILES = ["metrics.jsonl", "metrics.csv"]


@pytest.fixture
def whole(small):
    """A run that nothing interrupts, to compare with."""
    assert main(["run", str(small), "--run-dir", "whole", *EVERY]) == 0
    return small.parent / "whole"


def assert_same_end(run_dir, whole):
    mine, theirs = RunDir(run_dir).load_state("last"), RunDir(whole).load_state("last")
    for key in ("model", "optimizer", "schedules", "history", "position"):
        assert plain(mine[key]) == plain(theirs[key]), key
    for name in FILES:
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    assert plain(RunDir(run_dir).load_state("best")["model"]) == plain(RunDir(whole).load_state("best")["model"])


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_prints_the_command_that_continues(small, number, code):
    with Process("run", small, "--run-dir", "out", "epochs=500") as process:
        wait_for(small.parent / "out" / "checkpoints" / "last.pt")
        process.send_signal(number)
        printed = process.wait()
    assert process.returncode == code
    assert "trainkit resume out" in printed
    result = json.loads((small.parent / "out" / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("stopped", number.name)


def time_of(path):
    """Return when a file was changed, or 0 while there is none: last.pt is gone for a moment as it is replaced."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_killed_at_a_dozen_random_moments_a_run_reaches_the_identical_end(small):
    arguments = [str(small), "epochs=20", *EVERY]  # 120 steps: room for all in one and the same run
    assert main(["run", *arguments, "--run-dir", "whole"]) == 0
    chance = random.Random(0)
    out = small.parent / "out"
    saved = out / "checkpoints" / "last.pt"
    command = ["run", *arguments, "--run-dir", "out"]
    positions = []
    for _ in range(12):
        before = time_of(saved)
        with Process(*command) as process:
            while process.poll() is None and time_of(saved) in (0, before):
                time.sleep(0.001)
            time.sleep(chance.random() * 0.03)  # inside a step, or while a file is being written
            process.kill()
            printed = process.wait()
        assert process.returncode == -signal.SIGKILL, printed
        positions.append(RunDir(out).load_latest()[0]["position"]["step"])
        command = ["resume", "out"]
    assert positions == sorted(positions)
    assert len(set(positions)) > 9, positions
    assert main(command) == 0
    assert_same_end(out, small.parent / "whole")


@pytest.mark.parametrize("damage", [lambda d: d[:-50], lambda d: b"", lambda d: d[:99] + bytes([d[99] ^ 1]) + d[100:]])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(small, capsys, damage):
    out = small.parent / "out"
    assert main(["run", str(small), "--run-dir", "out", *EVERY, "max_steps=9"]) == 0
    last = out / "checkpoints" / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    assert main(["resume", "out", "max_steps=null"]) == 0
    printed = capsys.readouterr().out
    assert "damaged" in printed
    assert "previous.pt" in printed


def test_both_damaged_is_one_error(small, capsys):
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    for name in ("last", "previous"):
        (small.parent / "out" / "checkpoints" / f"{name}.pt").write_bytes(b"")
    capsys.readouterr()
    assert main(["resume", "out"]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_a_moved_run_continues(small, whole):
    with Process("run", small, "--run-dir", "out", *EVERY) as process:
        wait_for(small.parent / "out" / "checkpoints" / "last.pt")
        process.kill()
    shutil.move(small.parent / "out", small.parent / "elsewhere")
    assert main(["resume", "elsewhere"]) == 0
    assert_same_end(small.parent / "elsewhere", whole)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("plugins.sgd.lr=0.2", "plugins.sgd.lr was 0.1 and is 0.2"),
        ("plugins.lookahead=false", "plugins.lookahead was dropped"),
        ("plugins.grad_clip={}", "plugins.grad_clip was added"),
        ("seed=4", "seed was 0 and is 4"),
        ("batch_size=128", "batch_size was 256 and is 128"),
        ("plugins.digits.test_fraction=0.3", "data.splits.train.content was"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(small, capsys, override, said):
    assert main(["run", str(small), "--run-dir", "out", "epochs=1", LONG]) == 0
    capsys.readouterr()
    assert main(["resume", "out", override, "epochs=2"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "--allow-changes" in captured.err


def test_allowed_changes_are_recorded(small):
    assert main(["run", str(small), "--run-dir", "out", "epochs=1", LONG]) == 0
    assert main(["resume", "out", "plugins.grad_clip={}", "epochs=2", "--allow-changes"]) == 0
    result = json.loads((small.parent / "out" / "result.json").read_text())
    changes = ["plugins.grad_clip was added", "epochs was 1 and is 2"]
    assert result["resumed"] == [{"epoch": 1, "step": 6, "changes": changes}]
    assert result["epochs"] == 2


@pytest.mark.parametrize("option", ["sgd.lr=0.2", "cosine_annealing_lr.eta_min=0.01"])
def test_a_change_that_the_checkpoint_would_undo_is_never_recorded(small, capsys, option):
    assert main(["run", str(small), "--run-dir", "out", "epochs=1", LONG]) == 0
    before = {p.name: p.read_bytes() for p in (small.parent / "out").glob("*.*")}
    assert main(["resume", "out", f"plugins.{option}", "epochs=2", "--allow-changes"]) == 2
    assert f"plugins.{option.partition('=')[0]} was" in (said := capsys.readouterr().err)
    assert "would not reach them" in said
    assert {p.name: p.read_bytes() for p in (small.parent / "out").glob("*.*")} == before


@pytest.mark.parametrize("override", ["epochs=1", "plugins.grad_clip={}", "max_steps=3"])
def test_a_finished_run_keeps_its_record(small, capsys, override):
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    before = {p.name: p.read_bytes() for p in (small.parent / "out").glob("*.*")}
    assert main(["resume", "out", override, "--allow-changes"]) == 2
    assert "nothing is left to train: it has completed 2 epochs and 12 steps" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (small.parent / "out").glob("*.*")} == before


def test_more_epochs_than_a_schedule_was_made_for_are_refused(small, capsys):
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    assert main(["resume", "out", "epochs=4"]) == 2
    assert "the schedule was made for 2 epochs and the run would last 4" in capsys.readouterr().err


def test_more_epochs_extend_a_finished_run(small):
    assert main(["run", str(small), "--run-dir", "out", LONG]) == 0
    assert main(["resume", "out", "epochs=4"]) == 0
    result = json.loads((small.parent / "out" / "result.json").read_text())
    assert result["resumed"] == [{"epoch": 2, "step": 12, "changes": ["epochs was 2 and is 4"]}]
    rows = [json.loads(line) for line in (small.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows if "test_loss" in r] == [1, 2, 3, 4]


def limit_files(size):
    """Let this process write no file of more bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before_it(small, capsys):
    assert main(["run", str(small), "--run-dir", "out", "epochs=1", LONG]) == 0
    size = (small.parent / "out" / "checkpoints" / "last.pt").stat().st_size
    before = (small.parent / "out" / "checkpoints" / "last.pt").read_bytes()

    with Process("resume", "out", "epochs=2", before=partial(limit_files, size // 2)) as process:
        printed = process.wait()
    assert process.returncode == 1
    assert "File too large" in printed
    assert (small.parent / "out" / "checkpoints" / "last.pt").read_bytes() == before
    assert main(["resume", "out"]) == 0


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, which can be made read-only; only a superuser may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_directory_is_one_clear_error(small, disk, capsys):
    assert main(["run", str(small), "--run-dir", "disk/out", "epochs=1", LONG]) == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert main(["resume", "disk/out", "epochs=2"]) == 1
    assert "Read-only file system" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert main(["resume", "disk/out", "epochs=2"]) == 0


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(small, disk, capsys):
    assert main(["run", str(small), "--run-dir", "disk/out", "epochs=1", LONG]) == 0
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - 4096))
    assert main(["resume", "disk/out", "epochs=2"]) != 0
    assert "No space left" in capsys.readouterr().err
    (disk / "filler").unlink()
    assert main(["resume", "disk/out", "epochs=2"]) == 0
    rows = [json.loads(line) for line in (disk / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows if "test_loss" in r] == [1, 2]


@pytest.mark.slow
def test_a_second_process_on_one_directory_is_refused(small):
    with Process("run", small, "--run-dir", "out", "epochs=1000") as process:
        wait_for(small.parent / "out" / "checkpoints" / "last.pt")
        with Process("resume", "out") as second:
            printed = second.wait()
        process.kill()
    assert second.returncode == 2
    assert "another process" in printed


def test_a_strangers_checkpoint_runs_nothing(small, capsys):
    class Evil:
        def __reduce__(self):
            return (open, ("owned", "w"))

    assert main(["run", str(small), "--run-dir", "out", "epochs=1", LONG]) == 0
    for name in ("last", "previous", "best"):
        RunDir(small.parent / "out").write(f"checkpoints/{name}.pt", pack_state({"model": Evil()}))
    assert main(["resume", "out"]) == 2
    assert main(["evaluate", "out"]) == 2
    assert "refused" in capsys.readouterr().err
    assert not (small.parent / "owned").exists()


def test_a_completed_run_says_so_whatever_has_changed_since(small, capsys, monkeypatch):
    out = small.parent / "out"
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # what the record holds of this machine is another one now
    capsys.readouterr()
    assert main(["resume", "out"]) == 0
    assert "nothing is left to train: 2 epochs and 12 steps are completed" in capsys.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert main(["resume", "out", "epochs=3"]) == 2
    assert "environment.variables.ONEDNN_MAX_CPU_ISA was" in capsys.readouterr().err

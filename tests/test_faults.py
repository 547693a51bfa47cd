"""Faults from outside: data that vanish, workers that die, clocks that go back, folders that cannot be written."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from trainkit.cli import main
from trainkit.rundir import RunDir

from .processes import Process

STREAMED = """\
name: streamed
epochs: 1000
batch_size: 4
device: cpu
plugins:
  image_folder: {root: pictures, size: 16, in_memory: false, workers: 2}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.01}
  metrics:
  metric_log:
  checkpoint: {every_steps: 2}
"""


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "streamed.yaml").write_text(STREAMED)
    return tmp_path


def begin(folder):
    process = Process("run", "streamed.yaml", "--run-dir", "out", before=os.setsid)
    deadline = time.monotonic() + 60
    while not (folder / "out" / "checkpoints" / "previous.pt").exists():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def workers_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(pid) for pid in children.read().split()]


def finish(process):
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def resumes(folder):
    step = RunDir(folder / "out").load_state("last")["position"]["step"]
    assert main(["resume", "out", f"max_steps={step + 2}"]) == 0
    assert json.loads((folder / "out" / "result.json").read_text())["steps"] == step + 2


@pytest.mark.slow
def test_a_picture_that_vanishes_is_named_and_nothing_is_lost(streamed):
    process = begin(streamed)
    picture = streamed / "pictures" / "train" / "dog" / "7.png"
    picture.rename(streamed / "away.png")
    printed = finish(process)
    assert process.returncode == 1
    assert "7.png" in printed
    assert "Traceback" not in printed
    assert "trainkit resume out" in printed
    (streamed / "away.png").rename(picture)
    resumes(streamed)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers through /proc")
def test_a_killed_worker_ends_the_run_with_one_message(streamed):
    process = begin(streamed)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    printed = finish(process)
    assert process.returncode == 1
    assert "a process that decodes images died" in printed
    assert "trainkit resume out" in printed
    resumes(streamed)


@pytest.mark.slow
def test_an_interrupt_of_the_whole_group_saves_as_one_of_the_run_does(streamed):
    process = begin(streamed)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    printed = finish(process)
    assert process.returncode == 130, printed
    assert "trainkit resume out" in printed
    resumes(streamed)


@pytest.mark.slow
def test_a_clock_that_goes_back_changes_nothing(small, monkeypatch):
    assert main(["run", str(small), "--run-dir", "straight"]) == 0
    moments = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    assert main(["run", str(small), "--run-dir", "back", "plugins.checkpoint.every_minutes=0.001"]) == 0
    straight, back = (small.parent / name / "metrics.jsonl" for name in ("straight", "back"))
    assert straight.read_bytes() == back.read_bytes()


def test_a_directory_that_cannot_be_made_is_one_error(small, capsys):
    (small.parent / "runs").touch()
    assert main(["run", str(small)]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.slow
def test_a_class_label_with_terminal_escapes_reaches_the_terminal_as_text(streamed, capfd):
    for split in ("train", "test"):
        (streamed / "pictures" / split / "dog").rename(streamed / "pictures" / split / "\x1b]0;owned\x07dog")
    assert main(["run", "streamed.yaml", "--run-dir", "out", "max_steps=1", "plugins.progress={}"]) == 0
    assert main(["runs", "show", "out"]) == 0
    (streamed / "pictures" / "test" / "\x1b]0;owned\x07dog" / "0.png").write_bytes(b"no picture")
    assert main(["evaluate", "out"]) == 2
    printed = capfd.readouterr()
    assert "owned" in printed.err
    assert "\x1b" not in printed.out + printed.err

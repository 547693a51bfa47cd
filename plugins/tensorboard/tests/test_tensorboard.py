import csv
import math
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainkit.cli import main

RECIPE = """\
name: watched
epochs: 3
batch_size: 256
device: cpu
plugins:
  digits:
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics: {every: 1}
  metric_log:
  tensorboard:
  checkpoint: {every_steps: 1}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watched.yaml").write_text(RECIPE)
    return tmp_path


def curves(folder):
    """What TensorBoard itself reads: for each curve the values by step."""
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def epochs(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_as_the_table(folder):
    found = curves(folder)
    for row in epochs(folder):
        for name, tag in (("test_accuracy", "accuracy/test"), ("train_loss", "loss/train"), ("lr", "lr")):
            assert math.isclose(found[tag][int(row["step"])], float(row[name]), rel_tol=1e-6)
    return found


def test_tensorboard_reads_every_record_and_the_recipe(recipe):
    assert main(["run", "watched.yaml", "--run-dir", "out"]) == 0
    found = assert_same_as_the_table(recipe / "out")
    assert set(found) == {"loss", "lr", "loss/train", "loss/test", "accuracy/train", "accuracy/test"}
    assert len(found["accuracy/test"]) == 3
    steps = int(epochs(recipe / "out")[-1]["step"])
    assert sorted(found["loss"]) == list(range(1, steps + 1))
    accumulator = EventAccumulator(str(recipe / "out" / "tensorboard")).Reload()
    (text,) = accumulator.Tensors("recipe/text_summary")
    assert b"    name: watched" in text.tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_same_curves(recipe):
    assert main(["run", "watched.yaml", "--run-dir", "out", "max_steps=8"]) == 0
    # As after a kill: what lies beyond the checkpoint is not there again.
    assert main(["resume", "out", "max_steps=18"]) == 0
    found = assert_same_as_the_table(recipe / "out")
    assert sorted(found["loss"]) == list(range(1, 19))


def test_a_dry_run_leaves_nothing(recipe):
    assert main(["run", "watched.yaml", "--dry-run"]) == 0
    assert [path.name for path in recipe.iterdir()] == ["watched.yaml"]


@contextmanager
def server(folder, log):
    """Serve a folder of runs with TensorBoard, and yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"at (http://127\.0\.0\.1:\d+/)", log.read_text())):
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        started.terminate()
        started.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_every_curve_and_its_last_value(recipe, tmp_path_factory):
    assert main(["run", "watched.yaml", "--run-dir", "runs/watched/a"]) == 0
    home = tmp_path_factory.mktemp("browser")
    options = ["--headless", "--no-sandbox", "--disable-background-networking", "--dump-dom", "--window-size=1500,2500"]
    options += [f"--user-data-dir={home / 'profile'}", "--enable-logging=stderr", "--v=0"]
    options += ["--virtual-time-budget=20000"]  # ms that the page believes to have, until all has been fetched
    with server(recipe / "runs", home / "log") as address:
        command = ["chromium", *options, address]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    groups = re.findall(r'class="group-title"[^>]*>([^<]+)<', ended.stdout)
    charts = re.findall(r'class="tag"[^>]*title="([^"]+)"', ended.stdout)
    assert [group.strip() for group in groups if group.strip() != "Pinned"] == ["accuracy", "loss", "lr"]
    # TensorBoard opens the first two groups.
    assert sorted(charts) == ["accuracy/test", "accuracy/train", "loss", "loss/test", "loss/train"]
    shown = re.sub(r"<[^>]*>", " ", ended.stdout)
    assert "watched/a/tensorboard" in shown
    for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        assert re.search(rf"\b{float(epochs(recipe / 'runs/watched/a')[-1][name]):.5g}\b", shown), name
    said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    known = ("Multiple instances of Three.js", "WebGL")  # TensorBoard 2.21, Chromium without a GPU
    assert [line for line in said if not any(each in line for each in known)] == []

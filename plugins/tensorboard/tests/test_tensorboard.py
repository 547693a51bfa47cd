import csv
import math

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

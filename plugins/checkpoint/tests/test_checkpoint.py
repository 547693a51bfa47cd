import pytest
import torch

from trainkit import fit
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import RunDir
from trainkit.testing import build_run
from trainkit_checkpoint import Checkpoint


@plugin
class Scores:
    """Reports the test accuracies that a test wants."""

    values: list[float]
    epoch: int = 0

    @hookimpl
    def metrics(self, run, split):
        return {"accuracy": self.values[run.epoch]} if split == "test" else None


@plugin
class StopAt:
    step: int

    @hookimpl
    def step_end(self, run):
        if run.step == self.step:
            run.stop("enough")


def train(folder, checkpoint, epochs=3, **others):
    run = build_run({"checkpoint": checkpoint, **others}, epochs=epochs)
    fit(run, folder)
    return run, RunDir(folder)


def steps(run_dir, name):
    return run_dir.load_state(name)["position"]["step"]


def test_keeps_last_previous_and_best(tmp_path):
    run, kept = train(tmp_path, Checkpoint(), scores=Scores(values=[50.0, 70.0, 60.0]))
    assert run.step == 12
    assert {name: steps(kept, name) for name in ("last", "previous", "best")} == {"last": 12, "previous": 8, "best": 8}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_a_loss_is_best_when_least(tmp_path):
    @plugin
    class Losses:
        @hookimpl
        def metrics(self, run, split):
            return {"loss": [3.0, 1.0, 2.0][run.epoch]} if split == "test" else None

    _, kept = train(tmp_path, Checkpoint(best="test_loss"), losses=Losses())
    assert steps(kept, "best") == 8


def test_torch_loads_the_file_without_code_and_the_model_is_the_runs(tmp_path):
    run, _ = train(tmp_path, Checkpoint())
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    for name, value in run.model.state_dict().items():
        assert torch.equal(state["model"][name], value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_epochs": 2}, 12),  # epochs 2, and 3 because it is the end
        ({"every_epochs": 0, "every_steps": 5}, 12),
        ({"every_epochs": 0}, 12),
    ],
)
def test_the_end_is_always_saved(tmp_path, options, expected):
    _, kept = train(tmp_path, Checkpoint(**options))
    assert steps(kept, "last") == expected


def test_every_steps_saves_inside_an_epoch(tmp_path):
    _, kept = train(tmp_path, Checkpoint(every_epochs=0, every_steps=5))
    position = kept.load_state("previous")["position"]
    assert position == {"epoch": 2, "step": 10, "batch_index": 2}


def test_every_minutes_saves_by_the_clock(tmp_path):
    _, kept = train(tmp_path, Checkpoint(every_epochs=0, every_minutes=1e-9))
    assert kept.load_state("previous")["position"]["step"] == 12  # after the last step; `last` is after its epoch


def test_a_stopped_run_is_saved_at_once(tmp_path):
    run, kept = train(tmp_path, Checkpoint(every_epochs=0), stop=StopAt(step=6))
    assert kept.load_state("last")["position"] == {"epoch": 1, "step": 6, "batch_index": 2}
    assert run.stop_reason == "enough"


def test_unknown_metric_is_said_once_and_nothing_is_lost(tmp_path, capsys):
    _, kept = train(tmp_path, Checkpoint(best="test_f1"), scores=Scores(values=[1.0, 2.0, 3.0]))
    assert steps(kept, "last") == 12
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    printed = capsys.readouterr().out
    assert printed.count("test_f1") == 1
    assert "test_accuracy" in printed


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
    assert steps(kept, "last") == 8

"""Fit, evaluate, resume: what a run leaves behind, how it stops and goes on, and what it says of its result."""

import json
import math
import multiprocessing
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import field

from trainkit import Data, Metric, evaluate, fit, resume
from trainkit.cli import main
from trainkit.errors import CheckpointError, RunError, UsageError
from trainkit.plugin import hookimpl, plugin, recipe_file
from trainkit.provenance import options_of
from trainkit.rundir import RunDir
from trainkit.session import reopen
from trainkit.testing import build_run, fake_data, parameters_of
from trainkit.trainer import Trainer

Checkpoint = pytest.importorskip("trainkit_checkpoint").Checkpoint
EarlyStopping = pytest.importorskip("trainkit_early_stopping").EarlyStopping
Metrics = pytest.importorskip("trainkit_metrics").Metrics


def assert_same_weights(first, second):
    for a, b in zip(parameters_of(first), parameters_of(second), strict=True):
        assert torch.equal(a, b)


@plugin
class StopAt:
    """Asks for a stop at a step."""

    step: int

    @hookimpl
    def step_end(self, run):
        if run.step == self.step:
            run.stop("enough")


@plugin
class Interrupts:
    """Sends signals to this process at a step."""

    numbers: list[int]
    step: int = 2

    @hookimpl
    def gradients_ready(self, run):
        if run.step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


# What is left behind


@plugin
class Reports:
    """Reports one value as the loss of every split."""

    value: Any
    better: str | None = "less"

    @hookimpl
    def metrics(self):
        return {"loss": Metric(self.value, better=self.better)}


def test_the_run_directory_says_what_produced_the_result(tmp_path):
    run = build_run({"m": Reports(value=float("nan"))}, seed=5)
    result = fit(run, tmp_path / "run")
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert found == {"recipe.yaml", "plugins.lock.json", "environment.json", "data.json", "result.json"}
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["status"] == "completed"
    assert written["final"]["test_loss"] is None
    assert written["parameters"] == sum(p.numel() for p in run.model.parameters())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["splits"]["train"] == {"images": 32, "content": fake_data().train.fingerprint()}
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert result.path == tmp_path / "run"
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "run").iterdir())


def test_what_a_plugin_declares_is_in_the_record(tmp_path):
    @plugin
    class Declares:
        path: Path

        @hookimpl
        def provenance(self):
            return {"teacher": self.path, "temperature": 2.0}

    def declared(folder, content):
        (tmp_path / "teacher.pt").write_text(content)
        fit(build_run({"d": Declares(path=tmp_path / "teacher.pt")}), tmp_path / folder)
        return json.loads((tmp_path / folder / "environment.json").read_text())["declared"]["d"]

    first, second = declared("first", "one"), declared("second", "two")
    assert first["temperature"] == 2.0
    assert first["teacher"].startswith("blake2b:")
    assert first["teacher"] != second["teacher"]


@plugin
class Spender:
    """Lets a made clock go on: each thing that is done takes a time of its own."""

    now: float = field(init=False, default=0.0)

    def spend(self, seconds):
        self.now += seconds

    @hookimpl
    def transform_batch(self, run, batch):
        self.spend(10 if run.split == "train" else 1000)
        return batch

    @hookimpl
    def optimizer_step(self, run):
        self.spend(0.5)

    @hookimpl
    def epoch_end(self):
        self.spend(100_000)


@plugin
class Folder:
    """Names a folder beside the recipe, of which the texts are needed."""

    path: Path = recipe_file(files=lambda folder: folder.rglob("*.txt"))


def test_of_a_folder_beside_the_recipe_what_is_needed_is_kept_and_recorded(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name, text in (("a.txt", "a"), ("inner/b.txt", "b"), ("large.bin", "c")):
        (folder / name).write_text(text)
    fit(build_run({"folder": Folder(path=folder)}), tmp_path / "run")
    kept = tmp_path / "run" / "files" / "folder" / "folder"
    assert {p.relative_to(kept).as_posix(): p.read_text() for p in kept.rglob("*.txt")} == {
        "a.txt": "a",
        "inner/b.txt": "b",
    }
    assert not (kept / "large.bin").exists()
    assert "path: files/folder/folder\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    before = options_of(Folder(path=folder))
    assert options_of(Folder(path=kept)) == before
    (folder / "large.bin").write_text("another")
    assert options_of(Folder(path=folder)) == before
    (folder / "inner" / "b.txt").write_text("another")
    assert options_of(Folder(path=folder)) != before


def test_time_is_that_of_training_of_evaluation_and_in_total(tmp_path, monkeypatch):
    spender = Spender()
    for module in ("run", "session"):
        monkeypatch.setattr(f"trainkit.{module}.perf_counter", lambda: spender.now)
    result = fit(build_run({"spender": spender}), tmp_path / "run")  # 4 training batches of 8 images, 2 test batches
    assert result.seconds == {"train": 42.0, "evaluation": 2000.0, "total": 102_042.0}
    assert result.images_per_second == round(32 / 42, 1)


def test_a_pass_lasts_until_the_gpu_is_done(tmp_path, monkeypatch):
    spender = Spender()
    monkeypatch.setattr("trainkit.run.perf_counter", lambda: spender.now)
    monkeypatch.setattr("trainkit.provenance.gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "default_generators", [torch.default_generator])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: spender.spend(0.25))  # at both ends of a pass
    run = build_run({"spender": spender})
    run.device = torch.device("cuda", 0)  # the tensors stay where they are
    seconds = fit(run, tmp_path / "run").seconds
    assert (seconds["train"], seconds["evaluation"]) == (42.25, 2000.25)


# Failures


def test_a_failing_hook_fails_the_run_and_still_tears_down(tmp_path):
    @plugin
    class Fails:
        ended: list = field(factory=list)

        @hookimpl
        def gradients_ready(self, run):
            raise ValueError("no")

        @hookimpl
        def fit_end(self, run, error):
            self.ended.append(type(error))

    fails = Fails()
    run = build_run({"fails": fails})
    with pytest.raises(RunError, match="plugin 'fails' failed in gradients_ready: ValueError: no"):
        fit(run, tmp_path)
    assert fails.ended == [RunError]
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    with pytest.raises(UsageError, match=r"has failed.*continue it from its last checkpoint with trainkit.resume"):
        fit(run)
    assert evaluate(run) == {}  # what is there can still be looked at


def test_fit_end_fires_for_all_in_reverse_and_keeps_the_first_error(tmp_path):
    @plugin
    class Ends:
        name: str
        fails: bool = False

        @hookimpl
        def fit_end(self, run, error):
            ended.append((self.name, type(error).__name__))
            if self.fails:
                raise ValueError(self.name)

    ended = []
    run = build_run({"a": Ends(name="a"), "b": Ends(name="b", fails=True), "c": Ends(name="c")})
    with pytest.raises(RunError, match="plugin 'b' failed in fit_end"):
        fit(run, tmp_path)
    assert ended == [("c", "NoneType"), ("b", "NoneType"), ("a", "RunError")]


@pytest.mark.parametrize("fails", [False, True])
def test_result_written_sees_the_result_on_the_disk_after_a_failure_too(tmp_path, fails):
    @plugin
    class Hands:
        @hookimpl
        def fit_end(self):
            seen.append("fit_end")
            if fails:
                raise ValueError("no")

        @hookimpl
        def result_written(self, run, result):
            seen.append(result.status)
            assert json.loads((run.dir.path / "result.json").read_text()) == result.to_dict()

    seen = []
    with pytest.raises(RunError, match="failed in fit_end: ValueError: no") if fails else nullcontext():
        fit(build_run({"hands": Hands()}), tmp_path)
    assert seen == ["fit_end", "failed" if fails else "completed"]


def test_a_failing_result_written_fails_the_command_and_leaves_the_result(tmp_path):
    @plugin
    class Fails:
        @hookimpl
        def result_written(self):
            raise ValueError("no")

    with pytest.raises(RunError, match="plugin 'fails' failed in result_written: ValueError: no"):
        fit(build_run({"fails": Fails()}), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"


# Stopping, and going on in the same process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_safe_point_and_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    run = build_run({"p": Interrupts(numbers=[number])})
    result = fit(run, tmp_path)
    assert (result.status, result.reason, result.steps) == ("stopped", number.name, 3)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_acts_at_once_and_the_run_has_failed(tmp_path):
    run = build_run({"p": Interrupts(numbers=[signal.SIGINT, signal.SIGINT]), "m": Metrics()})
    with pytest.raises(KeyboardInterrupt):
        fit(run, tmp_path)
    assert run.step == 2
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"
    assert set(evaluate(run)) == {"test_loss", "test_accuracy"}
    with pytest.raises(UsageError, match="build it again"):
        fit(run)


@pytest.mark.parametrize(
    ("stops", "reason"),
    [
        ({"stop": StopAt(step=2)}, "enough"),
        ({"interrupts": Interrupts(numbers=[signal.SIGINT])}, "SIGINT"),
        ({"early_stopping": EarlyStopping(metric="constant", patience=1)}, "early_stopping"),
    ],
)
def test_a_run_that_was_stopped_can_be_evaluated_and_goes_on_to_the_same_end(tmp_path, stops, reason):
    @plugin
    class Constant:
        @hookimpl
        def metrics(self, split):
            return {"constant": Metric(1.0, better="less")} if split == "test" else None

    parts = {"constant": Constant(), "m": Metrics()}
    whole = build_run(dict(parts), epochs=4)
    fit(whole, tmp_path / "whole")
    run = build_run({"constant": Constant(), "m": Metrics(), **stops}, epochs=4)
    first = fit(run, tmp_path / "run")
    assert (first.status, first.reason.partition(":")[0]) == ("stopped", reason)
    before = parameters_of(run)
    metrics = evaluate(run)
    assert set(metrics) == {"test_loss", "test_accuracy", "test_constant"}
    assert evaluate(run) == metrics
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(run), before, strict=True))
    with pytest.raises(UsageError, match="this run writes to .*run, and a run keeps its directory"):
        fit(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    while fit(run).status == "stopped":
        pass
    assert (run.step, run.epoch) == (16, 4)
    assert_same_weights(run, whole)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"


class Decoded:
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index, dtype=torch.uint8), index % 4


@plugin
class Workers:
    @hookimpl
    def data(self):
        names = ("a", "b", "c", "d")
        return Data(train=Decoded(), test=Decoded(), classes=names, shape=(3, 8, 8), workers=2)


@pytest.mark.slow
def test_neither_fit_nor_evaluate_leaves_processes(tmp_path):
    before = multiprocessing.active_children()
    run = build_run({"workers": Workers(), "stop": StopAt(step=1), "m": Metrics()})
    assert set(evaluate(run)) == {"test_loss", "test_accuracy"}
    assert set(multiprocessing.active_children()) <= set(before)
    fit(run, tmp_path)
    assert set(multiprocessing.active_children()) <= set(before)
    evaluate(run, "train", eval_batches=1)
    assert set(multiprocessing.active_children()) <= set(before)


def test_evaluate_takes_any_split_and_names_those_there_are():
    run = build_run({"m": Metrics()})
    assert set(evaluate(run, "train")) == {"train_loss", "train_accuracy"}
    with pytest.raises(UsageError, match="no split 'validation'; the data have train, test"):
        evaluate(run, "validation")


# Splits


@plugin
class HoldOut:
    """Holds every fourth training image out."""

    @hookimpl
    def transform_data(self, data):
        held = torch.arange(0, len(data.train), 4)
        kept = torch.tensor([i for i in range(len(data.train)) if i % 4])
        return data.replace(train=data.train.subset(kept), validation=data.train.subset(held))


@plugin
class Evaluations:
    """Notes which splits are evaluated, when; reports how good each epoch is made to be."""

    better: list = field(factory=lambda: [1.0, 3.0, 2.0])
    seen: list = field(init=False, factory=list)

    @hookimpl
    def eval_start(self, run):
        self.seen.append((run.split, run.epoch))

    @hookimpl
    def metrics(self, run, split):
        return {"score": Metric(self.better[run.epoch], better="more")} if split == "validation" else None


def test_the_test_split_is_evaluated_once_at_the_end_on_the_selected_weights(tmp_path):
    evaluations = Evaluations()
    parts = {"hold_out": HoldOut(), "m": Metrics(), "evaluations": evaluations, "checkpoint": Checkpoint(best="score")}
    run = build_run(parts, epochs=3)
    result = fit(run, tmp_path)
    assert evaluations.seen == [("validation", 0), ("validation", 1), ("validation", 2), ("test", 2)]
    assert result.best["validation_score"] == {"value": 3.0, "epoch": 2}
    assert [name for name in run.history[-1] if name.startswith("test")] == []
    selected = build_run({"hold_out": HoldOut(), "m": Metrics()}, epochs=3)
    selected.load_state_dict(RunDir(tmp_path).load_state("best"))
    assert evaluate(selected) == run.tested == {n: result.final[n] for n in ("test_loss", "test_accuracy")}
    last = RunDir(tmp_path).load_state("last")
    assert (run.epoch, run.step) == (last["position"]["epoch"], last["position"]["step"]) == (3, 9)
    assert all(torch.equal(value, last["model"][name]) for name, value in run.model.state_dict().items())
    assert not torch.equal(run.model[0].weight, selected.model[0].weight)


def test_without_a_best_checkpoint_the_last_weights_are_tested(tmp_path):
    run = build_run({"hold_out": HoldOut(), "m": Metrics()}, epochs=2)
    fit(run, tmp_path)
    assert run.tested == evaluate(run)


def test_a_run_that_goes_on_is_tested_again_at_its_new_end(tmp_path):
    evaluations = Evaluations()
    parts = {"hold_out": HoldOut(), "m": Metrics(), "evaluations": evaluations, "stop": StopAt(step=3)}
    run = build_run({**parts, "checkpoint": Checkpoint(best="score")}, epochs=3)
    assert fit(run, tmp_path).status == "stopped"
    assert ("test", 1) not in evaluations.seen[:-1]
    fit(run)
    assert evaluations.seen[-1] == ("test", 2)


def test_an_interrupted_run_is_not_tested(tmp_path):
    evaluations = Evaluations()
    parts = {"hold_out": HoldOut(), "evaluations": evaluations, "stop": Interrupts(numbers=[signal.SIGINT])}
    fit(build_run(parts, epochs=3), tmp_path)
    assert "test" not in [split for split, _ in evaluations.seen]


# What is not finite, and what is best


@plugin
class NotANumber:
    @hookimpl
    def model(self):
        class Gives(torch.nn.Sequential):
            def forward(self, images):
                return super().forward(images) * math.nan

        return Gives(torch.nn.Flatten(), torch.nn.Linear(192, 4))


def test_a_network_of_nan_is_right_about_no_image():
    """Argmax calls a row of NaN class 0, of which a quarter of the images are."""
    metrics = evaluate(build_run({"nan": NotANumber(), "m": Metrics()}))
    assert metrics["test_accuracy"] == 0
    assert math.isnan(metrics["test_loss"])


@pytest.mark.parametrize(
    ("overrides", "bad", "best"),
    [
        (["plugins.sgd.lr=1e20"], [1, 2, 3], None),
        (["plugins.multi_step_lr={milestones: [1], gamma: 1e30}"], [2, 3], 1),
    ],
)
def test_an_epoch_that_is_not_finite_is_never_the_best_and_the_command_says_so(small, capsys, overrides, bad, best):
    plain = ["epochs=3", "plugins.cosine_annealing_lr=false", "plugins.lookahead=false"]
    assert main(["run", str(small), "--run-dir", "out", *plain, *overrides]) == 0
    assert f"weights or metrics are not finite since epoch {bad[0]}" in capsys.readouterr().out
    result = json.loads((small.parent / "out" / "result.json").read_text())
    assert result["non_finite"] == bad
    assert {row["epoch"] for row in result["best"].values()} == ({best} if best else set())
    if best is None:
        assert not (small.parent / "out" / "checkpoints" / "best.pt").exists()
        return
    state = RunDir(small.parent / "out").load_state("best")
    assert state["position"]["epoch"] == best
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_training_metric_may_choose_the_best_checkpoint(tmp_path):
    @plugin
    class Train:
        @hookimpl
        def metrics(self, run, split):
            return {"fit": Metric([1.0, 3.0, 2.0][run.epoch], better="more")} if split == "train" else None

    run = build_run({"train": Train(), "checkpoint": Checkpoint(best="train_fit")}, epochs=3)
    assert fit(run, tmp_path).best == {"train_fit": {"value": 3.0, "epoch": 2}}
    assert RunDir(tmp_path).load_state("best")["position"]["epoch"] == 2


# Resuming, through the command line and through Python

PLAIN = ["plugins.cosine_annealing_lr=false", "batch_size=80", "epochs=9"]  # 18 steps an epoch


def model_of(folder):
    return RunDir(folder).load_state("last")["model"]


def test_more_steps_of_a_resumed_run_are_those_of_a_longer_one(small):
    """The run ends inside an epoch both times, with an evaluation that the longer one does not make."""
    assert main(["run", str(small), "--run-dir", "whole", *PLAIN, "max_steps=46"]) == 0
    assert main(["run", str(small), "--run-dir", "out", *PLAIN, "max_steps=30"]) == 0
    result = resume("out", ["max_steps=46"])
    assert (result.status, result.steps, result.epochs) == ("completed", 46, 2)
    whole, parts = model_of(small.parent / "whole"), model_of(small.parent / "out")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_another_batch_size_inside_an_epoch_is_refused_whatever_is_allowed(small, capsys):
    assert main(["run", str(small), "--run-dir", "out", *PLAIN, "max_steps=30"]) == 0
    for allowed in ([], ["--allow-changes"]):
        assert main(["resume", "out", "batch_size=40", "max_steps=46", *allowed]) == 2
    said = r"the checkpoint lies within an epoch, after \d+ batches with batch_size 80, and it is 40 now"
    assert re.search(said, capsys.readouterr().err)
    with pytest.raises(CheckpointError, match="images would be seen twice or never"):
        reopen("out", ["batch_size=40", "max_steps=46"], allow_changes=True)


def test_an_interrupt_before_the_first_step_saves_and_names_the_command_that_continues(small, capsys, monkeypatch):
    train = Trainer.train

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        assert main(["run", str(small), "--run-dir", "out"]) == 130
    assert "stopped by SIGINT; continue with: trainkit resume out" in capsys.readouterr().out
    assert RunDir(small.parent / "out").load_state("last")["position"]["step"] == 0
    assert main(["resume", "out"]) == 0
    assert main(["run", str(small), "--run-dir", "whole"]) == 0
    whole, parts = model_of(small.parent / "whole"), model_of(small.parent / "out")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_reopened_run_is_evaluated_before_it_goes_on(small):
    assert main(["run", str(small), "--run-dir", "out", "max_steps=9"]) == 0
    run = reopen("out", ["max_steps=12"])
    assert (run.step, run.dir.path) == (9, Path("out"))
    assert evaluate(run)["test_accuracy"] == run.history[-1]["test_accuracy"]
    assert fit(run).steps == 12

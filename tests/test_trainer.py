"""The loop: which hook fires when, what it sees, and that the numbers are those of a plain loop."""

import json
import os
import signal
from collections import Counter
from typing import Any

import pytest
import torch
from attrs import field
from torch.nn.functional import cross_entropy

from trainkit import Batch, Data, Schedule, TensorSplit, evaluate, fit
from trainkit.data import epoch_permutation
from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import torch_seed
from trainkit.testing import build_run, fake_data, parameters_of, run_steps


@plugin
class Recorder:
    """Notes every hook of a fit."""

    seen: list = field(factory=list)

    def note(self, name, run):
        self.seen.append((name, run.split, run.epoch, run.batch_index, run.step))

    @hookimpl
    def fit_start(self, run):
        self.note("fit_start", run)

    @hookimpl
    def fit_end(self, run, error):
        self.note("fit_end", run)

    @hookimpl
    def epoch_start(self, run):
        self.note("epoch_start", run)

    @hookimpl
    def epoch_end(self, run, metrics):
        self.note("epoch_end", run)

    @hookimpl
    def transform_batch(self, run, batch):
        self.note("transform_batch", run)
        return batch

    @hookimpl
    def forward_end(self, run, batch, output, loss):
        self.note("forward_end", run)

    @hookimpl
    def gradients_ready(self, run):
        self.note("gradients_ready", run)

    @hookimpl
    def step_end(self, run):
        self.note("step_end", run)

    @hookimpl
    def safe_point(self, run):
        self.note("safe_point", run)

    @hookimpl
    def metrics(self, run, split):
        self.note("metrics", run)

    @hookimpl
    def log(self, run, record):
        self.note("log", run)


def step(epoch, index, number):
    before, after = ("train", epoch, index, number), ("train", epoch, index + 1, number)
    done = ("train", epoch, index + 1, number + 1)
    return [
        ("transform_batch", *before),
        ("forward_end", *before),
        ("gradients_ready", *after),
        ("step_end", *done),
        ("safe_point", *done),
    ]


def test_hooks_fire_in_the_documented_order(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=2, batch_size=16)
    fit(run, tmp_path)
    expected = [("fit_start", "train", 0, 0, 0)]
    for epoch in range(2):
        at_end = (epoch, 2, 2 * epoch + 2)
        expected += [("epoch_start", "train", epoch, 0, 2 * epoch)]
        expected += step(epoch, 0, 2 * epoch) + step(epoch, 1, 2 * epoch + 1)
        expected += [("metrics", "train", *at_end)]
        expected += [("transform_batch", "test", *at_end), ("forward_end", "test", *at_end)]
        expected += [("metrics", "test", *at_end), ("epoch_end", "train", *at_end), ("log", "train", *at_end)]
        expected += [("safe_point", "train", epoch + 1, 0, 2 * epoch + 2)]
    assert recorder.seen == [*expected, ("fit_end", "train", 2, 0, 4)]


def test_parameters_are_those_of_a_plain_loop():
    run = run_steps({}, steps=7)
    data, seed = fake_data(), 0
    fresh = build_run({})
    model = fresh.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = 0
    for epoch in range(2):
        for index in epoch_permutation(seed, epoch, len(data.train)).split(8):
            if taken == 7:
                break
            torch.manual_seed(torch_seed(seed, "step", epoch, 0))
            optimizer.zero_grad()
            cross_entropy(model(data.train.images[index].float() / 255), data.train.targets[index]).backward()
            optimizer.step()
            taken += 1
    for ours, plain in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_observers_do_not_change_a_result():
    class Noisy(Recorder):
        def note(self, name, run):
            torch.rand(3)

    plain, watched = run_steps({}, 6), run_steps({"noisy": Noisy()}, 6)
    for a, b in zip(parameters_of(plain), parameters_of(watched), strict=True):
        assert torch.equal(a, b)


@plugin
class Dropout:
    @hookimpl
    def model(self, run):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 8 * 8, 4))


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_a_run_continues_exactly_from_every_safe_point(tmp_path, stop_after):
    @plugin
    class Stop:
        @hookimpl
        def safe_point(self, run):
            if len(points) == stop_after - 1:
                run.stop("here")
            points.append(run.step)

    points = []
    whole = build_run({"dropout": Dropout()}, epochs=2, batch_size=10)
    fit(whole, tmp_path / "whole")
    first = build_run({"dropout": Dropout(), "stop": Stop()}, epochs=2, batch_size=10)
    assert fit(first, tmp_path / "first").status == "stopped"
    second = build_run({"dropout": Dropout()}, epochs=2, batch_size=10)
    second.load_state_dict(first.state_dict())
    fit(second, tmp_path / "second")
    assert (second.epoch, second.step) == (2, 8)
    assert second.history == whole.history
    for a, b in zip(parameters_of(whole), parameters_of(second), strict=True):
        assert torch.equal(a, b)


def test_epoch_start_is_not_fired_again_inside_an_epoch(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=1)
    run.batch_index = 2
    fit(run, tmp_path)
    counts = Counter(name for name, *_ in recorder.seen)
    assert counts["epoch_start"] == 0
    assert counts["step_end"] == 2


def test_max_steps_ends_inside_an_epoch_with_an_evaluation(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=3, max_steps=6)
    result = fit(run, tmp_path)
    assert (result.status, result.steps, result.epochs) == ("completed", 6, 2)
    assert Counter(name for name, *_ in recorder.seen)["epoch_end"] == 2


def test_schedulers_step_by_their_unit(tmp_path):
    @plugin
    class Schedules:
        unit: str
        lrs: list = field(factory=list)

        @hookimpl
        def scheduler(self, run, optimizer):
            return Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), self.unit)

        @hookimpl
        def gradients_ready(self, run):
            self.lrs.append(run.optimizer.param_groups[0]["lr"])

    by_epoch, by_step = Schedules(unit="epoch"), Schedules(unit="step")
    fit(build_run({"s": by_epoch}, epochs=2, batch_size=16), tmp_path / "epoch")
    fit(build_run({"s": by_step}, epochs=2, batch_size=16), tmp_path / "step")
    assert by_epoch.lrs == [0.1, 0.1, 0.05, 0.05]
    assert by_step.lrs == [0.1, 0.05, 0.025, 0.0125]


def test_backward_false_delays_the_step_until_gradients_are_complete(tmp_path):
    @plugin
    class EverySecond:
        @hookimpl
        def backward(self, run, loss):
            (loss / 2).backward()
            return run.batch_index % 2 == 1

    recorder = Recorder()
    run = build_run({"p": EverySecond(), "recorder": recorder}, epochs=1)
    result = fit(run, tmp_path)
    counts = Counter(name for name, *_ in recorder.seen)
    assert (result.steps, counts["gradients_ready"], counts["forward_end"]) == (2, 2, 6)


def test_eval_model_chooses_what_is_evaluated():
    @plugin
    class Constant:
        @hookimpl
        def eval_model(self, run):
            class Always(torch.nn.Module):
                def forward(self, images):
                    return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 4).float()

            return Always()

        @hookimpl
        def forward_end(self, run, batch, output):
            outputs.append(output)

    outputs = []
    run = build_run({"p": Constant()})
    evaluate(run)
    assert all((o.argmax(1) == 0).all() for o in outputs)
    assert len(outputs) == 2


def test_evaluation_restores_training_mode_and_ignores_gradients():
    run = build_run({})
    run.model.train()
    evaluate(run)
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


@plugin
class Metric:
    value: Any

    @hookimpl
    def metrics(self, run, split):
        return {"loss": self.value}


def test_metrics_come_to_the_host_under_the_splits_name(tmp_path):
    run = build_run({"m": Metric(value=torch.tensor(1.5))})
    result = fit(run, tmp_path)
    assert result.final == {"lr": 0.1, "train_loss": 1.5, "test_loss": 1.5}
    assert result.best == {"test_loss": {"value": 1.5, "epoch": 1}}


def test_a_metric_that_two_plugins_report_names_both(tmp_path):
    run = build_run({"one": Metric(value=1.0), "two": Metric(value=2.0)})
    with pytest.raises(RunError, match="plugin 'one' and plugin 'two' both report the metric 'loss'"):
        fit(run, tmp_path)


def test_records_keep_their_step_and_arrive_before_the_epochs_record(tmp_path):
    @plugin
    class Logs:
        records: list = field(factory=list)

        @hookimpl
        def forward_end(self, run, loss):
            if run.split == "train":
                run.log({"batch_loss": loss})

        @hookimpl
        def log(self, run, record):
            self.records.append(record)

    logs = Logs()
    fit(build_run({"logs": logs}, epochs=1), tmp_path)
    assert [(r["step"], "batch_loss" in r) for r in logs.records] == [*((i, True) for i in range(4)), (4, False)]
    assert all(type(v) in (int, float) for r in logs.records for v in r.values())


def test_the_run_directory_says_what_produced_the_result(tmp_path):
    run = build_run({"m": Metric(value=float("nan"))}, seed=5)
    result = fit(run, tmp_path / "run")
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert found == {"recipe.yaml", "plugins.lock.json", "environment.json", "result.json"}
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["status"] == "completed"
    assert written["final"]["test_loss"] is None
    assert written["parameters"] == sum(p.numel() for p in run.model.parameters())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["data"]["train"] == {"images": 32, "fingerprint": fake_data().train.fingerprint()}
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert result.path == tmp_path / "run"
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "run").iterdir())


def test_a_failing_hook_fails_the_run_and_still_tears_down(tmp_path):
    @plugin
    class Fails:
        @hookimpl
        def gradients_ready(self, run):
            raise ValueError("no")

    recorder = Recorder()
    run = build_run({"recorder": recorder, "fails": Fails()})
    with pytest.raises(RunError, match="plugin 'fails' failed in gradients_ready: ValueError: no"):
        fit(run, tmp_path)
    assert recorder.seen[-1][0] == "fit_end"
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_safe_point_and_handlers_come_back(tmp_path, number):
    @plugin
    class Interrupts:
        @hookimpl
        def gradients_ready(self, run):
            if run.step == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    run = build_run({"p": Interrupts()})
    result = fit(run, tmp_path)
    assert (result.status, result.reason, result.steps) == ("stopped", number.name, 3)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_acts_at_once(tmp_path):
    @plugin
    class Impatient:
        @hookimpl
        def gradients_ready(self, run):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            unreachable.append(run)

    unreachable = []
    with pytest.raises(KeyboardInterrupt):
        fit(build_run({"p": Impatient()}), tmp_path)
    assert not unreachable
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_a_stop_while_testing_repeats_the_test_on_resuming(tmp_path):
    @plugin
    class StopInTest:
        @hookimpl
        def forward_end(self, run):
            if run.split == "test":
                run.stop("in test")

    recorder = Recorder()
    run = build_run({"p": StopInTest(), "recorder": recorder}, epochs=2)
    fit(run, tmp_path)
    assert recorder.seen[-2] == ("safe_point", "train", 0, 4, 4)
    assert run.history == []


@plugin
class Spender:
    """Lets a made clock go on: each thing that is done takes a time of its own."""

    now: float = field(init=False, default=0.0)

    def spend(self, seconds):
        self.now += seconds

    @hookimpl
    def transform_model(self, model):
        model.register_forward_hook(lambda module, inputs, output: self.spend(0.001 if module.training else 100))
        return model

    @hookimpl
    def transform_batch(self, run, batch):
        self.spend(10 if run.split == "train" else 1000)
        return batch

    @hookimpl
    def optimizer_step(self, run):
        self.spend(0.002)

    @hookimpl
    def epoch_end(self):
        self.spend(100_000)


def test_time_is_told_apart_by_what_it_was_spent_on(tmp_path, monkeypatch):
    spender = Spender()
    monkeypatch.setattr("trainkit.trainer.perf_counter", lambda: spender.now)
    result = fit(build_run({"spender": spender}), tmp_path / "run")  # 4 training batches of 8 images, 2 test batches
    spent = {part: seconds for part, seconds in result.seconds.items() if seconds}
    plugins, evaluation = 4 * 10 + 100_000, 2 * (100 + 1000)
    total = pytest.approx(plugins + evaluation + 0.012)
    assert spent == {
        "forward": 0.004,
        "plugins": plugins,
        "optimizer": 0.008,
        "evaluation": evaluation,
        "total": total,
    }
    assert result.images_per_second == round(32 / 0.012, 1)


def test_what_a_gpu_still_does_after_a_pass_counts_as_that_pass(tmp_path, monkeypatch):
    spender = Spender()
    monkeypatch.setattr("trainkit.trainer.perf_counter", lambda: spender.now)
    monkeypatch.setattr(torch.cuda, "default_generators", [torch.default_generator])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: spender.spend(0.5))  # once after either split
    run = build_run({"spender": spender})
    run.device = torch.device("cuda", 0)  # the tensors stay where they are
    seconds = fit(run, tmp_path / "run").seconds
    assert seconds["backward"] == 0.5
    assert seconds["evaluation"] == 2 * (100 + 1000) + 0.5


def test_splits_that_are_not_in_memory_train_too():
    class Lazy:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.full((3, 8, 8), index * 20, dtype=torch.uint8), index % 4

    @plugin
    class LazyData:
        @hookimpl
        def data(self):
            return Data(train=Lazy(), test=Lazy(), classes=("a", "b", "c", "d"), shape=(3, 8, 8))

    @plugin
    class InMemory:
        @hookimpl
        def data(self):
            pairs = [Lazy()[i] for i in range(12)]
            split = TensorSplit(torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))
            return Data(train=split, test=split, classes=("a", "b", "c", "d"), shape=(3, 8, 8))

    lazy, memory = run_steps({"d": LazyData()}, 4), run_steps({"d": InMemory()}, 4)
    for a, b in zip(parameters_of(lazy), parameters_of(memory), strict=True):
        assert torch.equal(a, b)


def test_transform_batch_may_replace_the_batch(tmp_path):
    @plugin
    class Soft:
        @hookimpl
        def transform_batch(self, run, batch):
            return Batch(batch.images, torch.nn.functional.one_hot(batch.targets, 4).float())

        @hookimpl
        def forward_end(self, batch):
            shapes.add(batch.targets.shape[1:])

    shapes = set()
    fit(build_run({"p": Soft()}), tmp_path)
    assert shapes == {(4,)}

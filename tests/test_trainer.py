"""The loop: which hook fires when, what it sees, and that the numbers are those of a plain loop."""

import math
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from attrs import field
from torch.nn.functional import cross_entropy

from trainkit import Batch, Data, Metric, Schedule, TensorSplit, evaluate, fit
from trainkit.data import epoch_permutation
from trainkit.errors import PluginError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import torch_seed
from trainkit.testing import build_run, fake_data, parameters_of, run_steps


@plugin
class Recorder:
    """Notes the hooks of a fit, with the position at which they fired."""

    seen: list = field(factory=list)

    def note(self, name, run):
        self.seen.append((name, run.split, run.epoch, run.batch_index, run.step))

    def count(self, name):
        return Counter(name for name, *_ in self.seen)[name]

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
    def train_start(self, run):
        assert run.forward.training
        self.note("train_start", run)

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
    def transform_loss(self, run, loss):
        self.note("transform_loss", run)
        return loss

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
    def eval_start(self, run):
        assert not run.forward.training
        self.note("eval_start", run)

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
        ("transform_loss", *before),
        ("gradients_ready", *after),
        ("step_end", *done),
        ("safe_point", *done),
    ]


def assert_same_weights(first, second):
    for a, b in zip(parameters_of(first), parameters_of(second), strict=True):
        assert torch.equal(a, b)


def test_hooks_fire_in_the_documented_order(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=2, batch_size=16)
    fit(run, tmp_path)
    expected = [("fit_start", "train", 0, 0, 0)]
    for epoch in range(2):
        at_end = (epoch, 2, 2 * epoch + 2)
        expected += [(name, "train", epoch, 0, 2 * epoch) for name in ("epoch_start", "train_start")]
        expected += step(epoch, 0, 2 * epoch) + step(epoch, 1, 2 * epoch + 1)
        expected += [("metrics", "train", *at_end)]
        expected += [(name, "test", *at_end) for name in ("eval_start", "transform_batch", "forward_end", "metrics")]
        expected += [("epoch_end", "train", *at_end), ("log", "train", *at_end)]
        expected += [("safe_point", "train", epoch + 1, 0, 2 * epoch + 2)]
    assert recorder.seen == [*expected, ("fit_end", "train", 2, 0, 4)]


def test_parameters_are_those_of_a_plain_loop():
    run = run_steps({}, steps=7)
    data, model = fake_data(), build_run({}).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [index for epoch in range(2) for index in epoch_permutation(0, epoch, len(data.train)).split(8)]
    for index in batches[:7]:
        optimizer.zero_grad()
        cross_entropy(model(data.train.images[index].float() / 255), data.train.targets[index]).backward()
        optimizer.step()
    for ours, plain in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_observers_do_not_change_a_result():
    class Noisy(Recorder):
        def note(self, name, run):
            torch.rand(3)

    assert_same_weights(run_steps({}, 6), run_steps({"noisy": Noisy()}, 6))


@plugin
class Dropout:
    """A network that draws random numbers, from a batch of each epoch on, and none before it."""

    begins: int = 0
    dropout: torch.nn.Dropout = field(init=False, factory=torch.nn.Dropout)

    @hookimpl
    def model(self, run):
        return torch.nn.Sequential(torch.nn.Flatten(), self.dropout, torch.nn.Linear(3 * 8 * 8, 4))

    @hookimpl
    def transform_batch(self, run, batch):
        self.dropout.p = 0.5 if run.batch_index >= self.begins else 0.0
        return batch


@plugin
class StopAfter:
    """Stops at a safe point, counted from 1."""

    number: int
    passed: int = field(init=False, default=0)

    @hookimpl
    def safe_point(self, run):
        self.passed += 1
        if self.passed == self.number:
            run.stop("here", exit_code=143)  # to be continued


@pytest.mark.parametrize("begins", [0, 1])
@pytest.mark.parametrize("stop_after", range(1, 9))
def test_a_run_continues_exactly_from_every_safe_point(tmp_path, stop_after, begins):
    """Generators that are seeded once an epoch would not: what was drawn before the stop is not drawn again."""
    whole = build_run({"dropout": Dropout(begins=begins)}, epochs=2, batch_size=10)
    fit(whole, tmp_path / "whole")
    first = build_run({"dropout": Dropout(begins=begins), "s": StopAfter(number=stop_after)}, epochs=2, batch_size=10)
    assert fit(first, tmp_path / "first").status == "stopped"
    second = build_run({"dropout": Dropout(begins=begins)}, epochs=2, batch_size=10)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(5)  # another process has drawn other numbers by now
    fit(second, tmp_path / "second")
    assert (second.epoch, second.step) == (2, 8)
    assert second.history == whole.history
    assert_same_weights(whole, second)


def test_the_numbers_of_a_step_depend_on_its_position_alone(tmp_path):
    @plugin
    class Seeds:
        found: list = field(factory=list)

        @hookimpl
        def forward_end(self, run):
            if run.split == "train":
                self.found.append(torch.initial_seed())

    seeds = Seeds()
    fit(build_run({"seeds": seeds}, epochs=2, batch_size=16, seed=3), tmp_path)
    assert seeds.found == [torch_seed(3, "step", epoch, batch) for epoch in range(2) for batch in range(2)]


def test_inside_an_epoch_training_starts_again_and_the_epoch_does_not(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=1)
    run.batch_index = 2
    fit(run, tmp_path)
    assert (recorder.count("epoch_start"), recorder.count("train_start"), recorder.count("step_end")) == (0, 1, 2)


def test_a_part_put_back_into_evaluation_mode_stays_there_after_a_resume(tmp_path):
    @plugin
    class Frozen:
        """Keeps the statistics of batch norm, and freezes its weights, which stay in the optimizer."""

        @hookimpl
        def train_start(self, run):
            run.model[1].eval().requires_grad_(False)

    run = build_run({"frozen": Frozen(), "stop": StopAfter(number=2)})
    before = {name: value.clone() for name, value in run.model[1].state_dict().items()}
    fit(run, tmp_path / "first")
    again = build_run({"frozen": Frozen()})
    again.load_state_dict(run.state_dict())
    fit(again, tmp_path / "second")
    assert again.step == 4
    for name, value in again.model[1].state_dict().items():
        assert torch.equal(value, before[name])


def test_max_steps_inside_an_epoch_evaluates_and_keeps_the_position(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder}, epochs=3, max_steps=6)
    result = fit(run, tmp_path)
    assert (result.status, result.steps, result.epochs) == ("completed", 6, 1)
    assert (run.epoch, run.batch_index) == (1, 2)
    assert [row["epoch"] for row in run.history] == [1, 1.5]
    assert recorder.count("epoch_end") == 2


def test_max_steps_at_the_end_of_an_epoch_completes_it(tmp_path):
    run = build_run({}, epochs=3, max_steps=8)
    assert fit(run, tmp_path).epochs == 2
    assert [row["epoch"] for row in run.history] == [1, 2]


@plugin
class LearningRate:
    """Lowers the learning rate in its unit, and notes it."""

    unit: str
    lrs: list = field(factory=list)

    @hookimpl
    def scheduler(self, run, optimizer):
        length = run.total_steps if self.unit == "step" else run.total_epochs
        return Schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=0.01), self.unit)

    @hookimpl
    def gradients_ready(self, run):
        self.lrs.append(run.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("unit", "changes", "steps"),
    [("epoch", [4], 8), ("step", [1, 2, 3, 4, 5, 6, 7], 8), ("step", [1, 2, 3, 4, 5], 6), ("epoch", [4], 6)],
)
def test_schedulers_step_by_their_unit_over_the_length_of_the_run(tmp_path, unit, changes, steps):
    lr = LearningRate(unit=unit)
    run = build_run({"lr": lr}, epochs=5, max_steps=steps)
    fit(run, tmp_path)
    assert [n for n in range(1, steps) if lr.lrs[n] != lr.lrs[n - 1]] == changes
    if unit == "step" or steps == 8:
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@plugin
class Plateau:
    """Lowers the learning rate when a made metric no longer becomes better."""

    metric: str = "score"
    values: list = field(factory=lambda: [3.0, 2.0, 2.0, 1.0])

    @hookimpl
    def scheduler(self, optimizer):
        reduce = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return Schedule(reduce, "epoch", metric=self.metric)

    @hookimpl
    def metrics(self, run, split):
        return {"score": Metric(self.values[run.epoch], better="less")} if split == "test" else None


def test_reduce_lr_on_plateau_looks_at_a_metric(tmp_path):
    run = build_run({"plateau": Plateau()}, epochs=4)
    fit(run, tmp_path)
    assert [row["lr"] for row in run.history] == [0.1, 0.1, 0.1, 0.05]


def test_reduce_lr_on_plateau_waits_for_an_evaluation(tmp_path):
    run = build_run({"plateau": Plateau()}, epochs=4, eval_every=2)
    fit(run, tmp_path)
    assert ["test_score" in row for row in run.history] == [False, True, False, True]
    assert run.schedules[0].scheduler.last_epoch == 2


def test_a_metric_that_nothing_reports_is_named(tmp_path):
    run = build_run({"plateau": Plateau(metric="scores")})
    with pytest.raises(RunError, match="plugin 'plateau', scheduler: no plugin reports the metric 'test_scores'.*scor"):
        fit(run, tmp_path)


@plugin
class Accumulate:
    """Makes one step of several batches, each weighted by its part of the step's images."""

    n: int = 2
    completes: list = field(factory=list)

    @hookimpl
    def batches_per_step(self, run):
        return self.n

    @hookimpl
    def transform_loss(self, run, loss):
        return loss / self.n

    @hookimpl
    def backward(self, run, loss):
        self.completes.append(run.completes_step)
        loss.backward()


def test_a_step_takes_its_batches_and_the_last_one_what_is_left(tmp_path):
    recorder, accumulate = Recorder(), Accumulate(n=3)
    run = build_run({"p": accumulate, "recorder": recorder}, epochs=1)
    result = fit(run, tmp_path)
    assert (run.steps_per_epoch, run.total_steps, result.steps) == (2, 2, 2)
    assert accumulate.completes == [False, False, True, True]
    assert (recorder.count("gradients_ready"), recorder.count("safe_point"), recorder.count("forward_end")) == (2, 3, 6)


@plugin
class Linear:
    """A network without batch statistics: two halves of a batch give the gradients of the whole."""

    @hookimpl
    def model(self, run):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))


def test_two_half_batches_make_the_step_of_a_whole_one():
    halves = run_steps({"linear": Linear(), "p": Accumulate()}, steps=6, batch_size=4)
    whole = run_steps({"linear": Linear()}, steps=6, batch_size=8)
    for a, b in zip(parameters_of(halves), parameters_of(whole), strict=True):
        torch.testing.assert_close(a, b)


def test_a_changed_loss_is_trained_and_not_reported():
    @plugin
    class Terms:
        reported: list = field(factory=list)

        @hookimpl
        def transform_loss(self, run, loss):
            assert run.output.shape == (8, 4)
            return 0 * loss + sum(p.square().sum() for p in run.model.parameters())

        @hookimpl
        def forward_end(self, loss):
            self.reported.append(loss.item())

    terms = Terms()
    before = parameters_of(build_run({"linear": Linear()}))
    run = run_steps({"linear": Linear(), "terms": terms}, steps=1)
    for a, b in zip(parameters_of(run), before, strict=True):
        torch.testing.assert_close(a, 0.8 * b)  # a step of 0.1 along 2 p
    assert terms.reported[0] == pytest.approx(math.log(4), abs=0.3)


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
    evaluate(build_run({"p": Constant()}))
    assert all((o.argmax(1) == 0).all() for o in outputs)
    assert len(outputs) == 2


def test_eval_start_fires_once_the_network_that_is_evaluated_is_in_evaluation_mode():
    @plugin
    class Average:
        modes: list = field(factory=list)
        average: Any = None

        @hookimpl
        def built(self, run):
            self.average = torch.optim.swa_utils.AveragedModel(run.model)

        @hookimpl
        def eval_model(self):
            return self.average

        @hookimpl
        def eval_start(self, run):
            self.modes.append((run.split, self.average.training))

    average = Average()
    evaluate(build_run({"average": average}))
    assert average.modes == [("test", False)]


def test_evaluation_restores_training_mode_and_ignores_gradients():
    run = build_run({})
    run.model.train()
    evaluate(run)
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_eval_every_evaluates_some_epochs_and_the_last(tmp_path):
    recorder = Recorder()
    run = build_run({"recorder": recorder, "m": Reports(value=1.0)}, epochs=5, eval_every=2)
    fit(run, tmp_path)
    assert [row["epoch"] for row in run.history if "test_loss" in row] == [2, 4, 5]
    assert recorder.count("eval_start") == 3


@plugin
class Reports:
    """Reports one value as the loss of every split."""

    value: Any

    @hookimpl
    def metrics(self, run, split):
        return {"loss": self.value}


def test_metrics_come_to_the_host_under_the_splits_name(tmp_path):
    run = build_run({"m": Reports(value=Metric(torch.tensor(1.5), better="less"))})
    result = fit(run, tmp_path)
    assert result.final == {"lr": 0.1, "train_loss": 1.5, "test_loss": 1.5}
    assert result.best == {name: {"value": 1.5, "epoch": 1} for name in ("train_loss", "test_loss")}


def test_a_metric_without_a_direction_has_no_best(tmp_path):
    result = fit(build_run({"m": Reports(value=torch.tensor(1.5))}), tmp_path)
    assert result.final["test_loss"] == 1.5
    assert result.best == {}


def test_a_metric_that_two_plugins_report_names_both(tmp_path):
    run = build_run({"one": Reports(value=1.0), "two": Reports(value=2.0)})
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


def test_what_a_plugin_amends_in_the_record_of_an_epoch_is_what_later_ones_see(tmp_path):
    @plugin
    class Amends:
        @hookimpl
        def epoch_end(self, run, metrics):
            metrics["images"] = torch.tensor(float(run.images))

    run = build_run({"amends": Amends()})
    fit(run, tmp_path)
    assert run.history[-1]["images"] == 32.0


def test_a_stop_while_testing_repeats_the_test_on_resuming(tmp_path):
    @plugin
    class StopInTest:
        @hookimpl
        def forward_end(self, run):
            if run.split == "test" and not stopped:
                stopped.append(run.step)
                run.stop("in test")

    stopped, recorder = [], Recorder()
    run = build_run({"p": StopInTest(), "recorder": recorder}, epochs=1)
    fit(run, tmp_path)
    assert recorder.seen[-2] == ("safe_point", "train", 0, 4, 4)
    assert run.history == []
    assert fit(run).status == "completed"
    assert (run.epoch, run.step, len(run.history)) == (1, 4, 1)


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

    assert_same_weights(run_steps({"d": LazyData()}, 4), run_steps({"d": InMemory()}, 4))


def test_transform_batch_may_replace_the_batch(tmp_path):
    @plugin
    class Soft:
        @hookimpl
        def transform_batch(self, run, batch):
            return Batch(batch.images, torch.nn.functional.one_hot(batch.targets, 4).float(), batch.indices)

        @hookimpl
        def forward_end(self, batch):
            shapes.add(batch.targets.shape[1:])

    shapes = set()
    fit(build_run({"p": Soft()}), tmp_path)
    assert shapes == {(4,)}


@plugin
class Order:
    """Draws the images of an epoch with repetition, `n` of them; `more` in every later epoch."""

    n: int = 24
    more: int = 0
    seen: list = field(factory=list)

    @hookimpl
    def epoch_order(self, run):
        n = self.n + (self.more if run.epoch else 0)
        return torch.from_numpy(run.rng("order").integers(0, 8, n))

    @hookimpl
    def forward_end(self, run, batch):
        if run.split == "train":
            assert torch.equal(batch.targets, run.data.train.targets[batch.indices])
            self.seen.append((run.epoch, batch.indices.tolist()))


def test_epoch_order_chooses_the_images_that_an_epoch_sees(tmp_path):
    order = Order(n=20)
    run = build_run({"order": order}, epochs=2)
    assert (run.images_per_epoch, run.batches_per_epoch, run.total_steps) == (20, 3, 6)
    fit(run, tmp_path / "whole")
    assert [(epoch, len(indices)) for epoch, indices in order.seen] == [(0, 8), (0, 8), (0, 4), (1, 8), (1, 8), (1, 4)]
    assert len({*chain.from_iterable(indices for epoch, indices in order.seen if epoch == 0)}) < 20  # some come twice
    assert run.images == 40
    stopped, continued = Order(n=20), Order(n=20)
    first = build_run({"order": stopped, "stop": StopAfter(number=2)}, epochs=2)
    fit(first, tmp_path / "first")
    second = build_run({"order": continued}, epochs=2)
    second.load_state_dict(first.state_dict())
    fit(second, tmp_path / "second")
    assert stopped.seen + continued.seen == order.seen
    assert_same_weights(run, second)


@pytest.mark.parametrize(("more", "drop_last"), [(8, False), (-1, False), (8, True)])
def test_an_epoch_of_another_length_is_refused(tmp_path, more, drop_last):
    run = build_run({"order": Order(n=24, more=more)}, epochs=2, drop_last=drop_last)
    with pytest.raises(RunError, match=rf"plugin 'order', epoch_order: epoch 2 has {24 + more} images.*of 24"):
        fit(run, tmp_path)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (torch.tensor([0, 32]), "indices go from 0 to 32, and the training split has the images 0 to 31"),
        (torch.tensor([-1]), "indices go from -1 to -1"),
        (torch.arange(4).view(2, 2), r"expected int64 \[n\] with n > 0, got int64 \[2, 2\]"),
        (torch.zeros(4), r"expected int64 \[n\] with n > 0, got float32 \[4\]"),
        (torch.zeros(0, dtype=torch.int64), r"got int64 \[0\]"),
    ],
)
def test_an_order_that_is_none_is_refused_at_build(order, said):
    @plugin
    class Wrong:
        @hookimpl
        def epoch_order(self, run):
            return order

    with pytest.raises(PluginError, match=f"plugin 'wrong', epoch_order: .*{said}"):
        build_run({"wrong": Wrong()})


def test_an_epochs_batches_come_with_their_indices(tmp_path):
    @plugin
    class Indices:
        seen: list = field(factory=list)

        @hookimpl
        def forward_end(self, run, batch):
            self.seen.append((run.split, batch.indices.tolist()))

    indices = Indices()
    fit(build_run({"indices": indices}), tmp_path)
    for split, expected in (("train", epoch_permutation(0, 0, 32).tolist()), ("test", list(range(16)))):
        assert [index for name, found in indices.seen if name == split for index in found] == expected


@plugin
class Regression:
    """Data whose targets are no classes: one row of numbers an image; and a loss for them."""

    shape: tuple[int, ...] = (4,)

    @hookimpl
    def data(self):
        data = fake_data()

        def split(other):
            targets = torch.linspace(0, 1, len(other) * math.prod(self.shape)).view(-1, *self.shape)
            return TensorSplit(other.images, targets)

        return Data(train=split(data.train), test=split(data.test), classes=("a", "b", "c", "d"), shape=data.shape)

    @hookimpl
    def loss(self):
        return lambda output, targets: (output.mean(1) - targets.reshape(len(targets), -1).mean(1)).square().mean()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_targets_may_have_any_shape(tmp_path, shape):
    run = build_run({"regression": Regression(shape=shape)}, epochs=1)
    assert not run.data.has_class_targets
    fit(run, tmp_path)
    assert run.batch.targets.shape == (8, *shape)

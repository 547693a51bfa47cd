"""The parts of a run: its length and position, its state, its log, and batches outside its counters."""

import enum
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import field
from hypothesis import given
from hypothesis import strategies as st

from trainkit import Data, Map, Metric, fit
from trainkit.errors import CheckpointError, RunError, TrainkitError
from trainkit.plugin import hookimpl, plugin
from trainkit.run import MetricInfo, best_of, is_better, to_host
from trainkit.rundir import RunDir, pack_state
from trainkit.testing import build_run, fake_data, parameters_of
from trainkit.transforms import to_float

# Length and position


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({"epochs": 3}, (4, 4, 12, 3)),
        ({"epochs": 3, "batch_size": 10}, (4, 4, 12, 3)),
        ({"epochs": 3, "batch_size": 10, "drop_last": True}, (3, 3, 9, 3)),
        ({"epochs": 3, "max_steps": 6}, (4, 4, 6, 2)),
        ({"epochs": 3, "max_steps": 100}, (4, 4, 12, 3)),
    ],
)
def test_the_length_of_a_run(keys, length):
    run = build_run({}, **keys)
    assert (run.batches_per_epoch, run.steps_per_epoch, run.total_steps, run.total_epochs) == length


def test_a_run_says_in_one_short_line_what_it_is(tmp_path):
    run = build_run({}, epochs=3, max_steps=5)
    fit(run, tmp_path)
    assert repr(run) == "<Run 'test' on cpu: epoch 1 of 3, step 5>"


# State


@plugin
class State:
    """Has the state that it is given."""

    value: Any = None

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return RunDir(tmp_path_factory.mktemp("states"))


holder = State()
stateful = build_run({"holder": holder})


def saved(run_dir, value):
    """Return what becomes of a plugin's state when a run is saved and loaded again."""
    holder.value = value
    state = stateful.state_dict()
    run_dir.write("checkpoints/x.pt", pack_state(state))
    stateful.load_state_dict(run_dir.load_state("x"))
    return holder.value


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.sampled_from([np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("x"), np.array([1.0])]),
    st.sampled_from([torch.arange(3), torch.tensor(1.5), torch.float16, torch.device("cpu"), torch.Size([1, 2])]),
    st.sampled_from([Path("x"), enum.Enum("E", "A").A, object(), 1 + 2j]),
)
tuples = st.tuples(st.integers(), st.text()) | st.just((np.float64(0.5),)) | st.just((Path("x"),))
keys = st.one_of(st.text(), st.integers(), st.booleans(), tuples, st.binary())
values = st.deferred(
    lambda: st.one_of(
        scalars,
        st.lists(values, max_size=3),
        st.tuples(values, values),
        st.sets(st.integers() | st.text() | st.tuples(st.integers()), max_size=3),
        st.frozensets(st.integers(), max_size=3),
        st.dictionaries(keys, values, max_size=3),
        st.dictionaries(st.text(), values, max_size=3).map(OrderedDict),
        st.lists(st.text(), max_size=3).map(Counter),
    )
)


def same(a, b):
    """Tell whether two values are equal, a number of numpy's and Python's included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and not isinstance(a, torch.Size):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | complex | np.floating) and a != a:
        return b != b
    return a == b


@given(value=values)
def test_a_state_is_refused_or_loads_again_equal(folder, value):
    try:
        again = saved(folder, value)
    except RunError as error:
        assert str(error).startswith("plugin 'holder', state_dict: ")  # noqa: PT017
        return
    assert same(value, again)


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros(2), "'value' is a numpy.ndarray"),
        ({"a": [1, np.zeros(2)]}, "'value.a.1' is a numpy.ndarray"),
        ({"a": Colour.RED}, "'value.a' is a tests.Colour"),
        (Number.ONE, "'value' is a tests.Number"),
        (Path("x"), "'value' is a pathlib.PosixPath"),
        (State(), "'value' is a tests.State"),
        (len, "'value' is a builtins.builtin_function_or_method"),
        ({b"a": 1}, "value has a key"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_with_its_key(value, said):
    holder.value = value
    with pytest.raises(RunError, match=f"plugin 'holder', state_dict: {said}"):
        stateful.state_dict()
    holder.value = None


@plugin
class Saves:
    """Saves the run at each safe point."""

    @hookimpl
    def safe_point(self, run):
        run.dir.write("checkpoints/last.pt", pack_state(run.state_dict()))


def test_a_state_that_cannot_be_saved_writes_nothing_and_names_the_plugin(tmp_path):
    run = build_run({"state": State(value=np.zeros(2)), "saves": Saves()})
    with pytest.raises(RunError, match="^plugin 'state', state_dict: 'value' is a numpy.ndarray"):
        fit(run, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@plugin
class Numpy:
    """Uses numpy's numbers wherever a plugin may give numbers."""

    @hookimpl
    def metrics(self, split):
        return {"double": np.float64(0.5), "single": Metric(np.float32(0.5), better="less"), "whole": np.int64(2)}

    @hookimpl
    def epoch_end(self, run, metrics):
        metrics["amended"] = np.float64(0.25)
        run.log({"logged": np.float32(0.5)})

    @hookimpl
    def gradients_ready(self, run):
        for group in run.optimizer.param_groups:
            group["lr"] = np.float64(0.01)


def test_numpys_numbers_become_pythons_before_they_are_saved(tmp_path):
    run = build_run({"numpy": Numpy(), "saves": Saves()})
    fit(run, tmp_path)
    record = run.history[-1]
    assert (record["test_double"], record["test_single"], record["test_whole"], record["amended"]) == (
        0.5,
        0.5,
        2,
        0.25,
    )
    assert {type(value) for value in record.values()} == {int, float}
    again = build_run({"numpy": Numpy()})
    again.load_state_dict(RunDir(tmp_path).load_state("last"))
    assert again.history == run.history
    assert type(again.optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("value", ["high", [1.0], None, np.zeros(2), torch.zeros(2)])
@pytest.mark.parametrize("hook", ["metrics", "epoch_end", "log"])
def test_what_is_no_number_is_refused_by_plugin_and_name(tmp_path, hook, value):
    @plugin
    class Wrong:
        @hookimpl
        def metrics(self, run):
            return {"wrong": value} if hook == "metrics" else None

        @hookimpl
        def epoch_end(self, run, metrics):
            if hook == "epoch_end":
                metrics["wrong"] = value

        @hookimpl
        def gradients_ready(self, run):
            if hook == "log":
                run.log({"wrong": value})

    named = "gradients_ready" if hook == "log" else hook
    with pytest.raises(RunError, match=f"plugin 'p', {named}: expected a number or a scalar tensor as 'wrong', got"):
        fit(build_run({"p": Wrong(), "saves": Saves()}), tmp_path)
    if hook == "metrics":
        assert RunDir(tmp_path).load_state("last")["history"] == []


def test_a_state_of_another_run_is_refused_as_a_checkpoint_that_does_not_fit():
    @plugin
    class Other:
        @hookimpl
        def model(self):
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))

    with pytest.raises(CheckpointError, match="the checkpoint does not fit the recipe"):
        build_run({"other": Other()}).load_state_dict(build_run({}).state_dict())


def test_state_that_cannot_be_taken_names_its_plugin():
    @plugin
    class Fails:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise KeyError("average")

    run = build_run({"p": Fails()})
    with pytest.raises(TrainkitError, match="plugin 'p' failed in load_state_dict: KeyError: 'average'"):
        run.load_state_dict(run.state_dict())


# Metrics


def test_a_metrics_key_is_that_of_the_selection_split(tmp_path):
    run = build_run({"numpy": Numpy()})
    assert run.metric_key("accuracy") == "test_accuracy"
    assert run.metric_key("train_loss") == "train_loss"
    fit(run, tmp_path)
    assert run.metric_info["test_single"] == MetricInfo("less", progress=False)
    assert run.metric_info["train_double"] == MetricInfo(None, progress=False)
    assert run.metric_key("amended") == "amended"


def test_the_best_epoch_of_each_metric_that_says_what_is_better():
    run = build_run({})
    run.metric_info = {"a": MetricInfo("less", False), "b": MetricInfo("more", False), "c": MetricInfo(None, False)}
    rows = [(1, 3.0, 1.0), (2, math.nan, 2.0), (3, 2.0, 2.0), (4, 1.0, 9.0)]
    run.history = [{"epoch": epoch, "a": a, "b": b, "c": 0.0} for epoch, a, b in rows]
    run.non_finite = [4]
    assert best_of(run) == {"a": {"value": 2.0, "epoch": 3}, "b": {"value": 2.0, "epoch": 2}}
    assert not is_better("less", math.nan, 1.0)
    assert not is_better("more", math.nan, 1.0)


def test_records_come_to_the_host_in_one_copy_and_keep_their_types():
    records = [{"a": torch.tensor(1.5), "b": 2}, {"a": np.float32(0.5), "c": torch.tensor(3)}]
    assert to_host(records) == [{"a": 1.5, "b": 2}, {"a": 0.5, "c": 3.0}]
    assert to_host([]) == []


# Batches outside the counters


class Decoded:
    """Draws each image anew, as a data set that crops for itself does."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), index % 4


class Brighten(Map):
    def draw(self, rng, n, size):
        return {"amount": rng.random(n, dtype=np.float32)}

    def apply(self, images, params):
        return to_float(images) + params["amount"].view(-1, 1, 1, 1)


@plugin
class Random:
    """Data, transforms, batches and an order that are drawn anew in each epoch; keeps what training sees."""

    decoded: bool = False
    workers: int = 0
    seen: dict = field(init=False, factory=dict)

    @hookimpl
    def data(self):
        data = fake_data()
        train = Decoded() if self.decoded else data.train
        return Data(train=train, test=data.test, classes=data.classes, shape=data.shape, workers=self.workers)

    @hookimpl
    def transforms(self):
        return Brighten()

    @hookimpl
    def transform_batch(self, run, batch):
        batch.images = batch.images * float(run.rng("scale").random())
        return batch

    @hookimpl
    def forward_end(self, run, batch):
        if run.split == "train":
            self.seen.setdefault(run.epoch, []).append((batch.images.clone(), batch.targets, batch.indices))


@plugin
class Iterates:
    """Looks at all batches of an epoch at one of its hooks."""

    hook: str
    split: str = "train"
    seen: dict = field(init=False, factory=dict)

    def look(self, run, hook):
        if hook == self.hook:
            before = run.split, run.batch_index, run.batch, run.step, run.images
            self.seen[run.epoch] = [(b.images.clone(), b.targets, b.indices) for b in run.iterate(self.split)]
            assert before == (run.split, run.batch_index, run.batch, run.step, run.images)

    @hookimpl
    def epoch_start(self, run):
        self.look(run, "epoch_start")

    @hookimpl
    def step_end(self, run):
        self.look(run, "step_end")

    @hookimpl
    def epoch_end(self, run):
        self.look(run, "epoch_end")


def assert_same_batches(a, b):
    for mine, theirs in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("hook", ["epoch_start", "step_end", "epoch_end"])
@pytest.mark.parametrize(("decoded", "workers"), [(False, 0), (True, 0), pytest.param(True, 2, marks=pytest.mark.slow)])
def test_iterate_gives_what_training_sees_and_changes_nothing(tmp_path, hook, decoded, workers):
    def trained(folder, **more):
        data = Random(decoded=decoded, workers=workers)
        run = build_run({"random": data, **more}, epochs=2)
        fit(run, tmp_path / folder)
        return run, data

    iterates = Iterates(hook=hook)
    plain, _ = trained("plain")
    watched, data = trained("watched", iterates=iterates)
    for epoch in range(2):
        assert_same_batches(iterates.seen[epoch], data.seen[epoch])
    assert watched.history == plain.history
    for a, b in zip(parameters_of(plain), parameters_of(watched), strict=True):
        assert torch.equal(a, b)


def test_iterate_gives_other_splits_in_their_order():
    run = build_run({})
    assert torch.cat([batch.indices for batch in run.iterate("test")]).tolist() == list(range(16))
    assert (run.split, run.batch) == ("train", None)

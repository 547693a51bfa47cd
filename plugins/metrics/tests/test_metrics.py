import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainkit import Batch, TensorSplit, TrainkitError, fit
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_metrics import Metrics

ALONE = SimpleNamespace(world=1)


def started(**options):
    """Return the plugin at the start of an epoch's training and of an evaluation."""
    plugin = Metrics(**options)
    plugin.epoch_start(SimpleNamespace(device=torch.device("cpu")))
    begin(plugin, "test")
    return plugin


def begin(plugin, split):
    plugin.eval_start(SimpleNamespace(world=1, split=split, device=torch.device("cpu")))


def feed(plugin, split, outputs, targets, loss):
    run = SimpleNamespace(world=1, split=split)
    batch = Batch(torch.zeros(len(targets), 1, 1, 1), torch.as_tensor(targets))
    plugin.forward_end(run, batch, torch.as_tensor(outputs), torch.as_tensor(loss))


def values(plugin, split):
    return {name: float(metric.value) for name, metric in plugin.metrics(ALONE, split).items()}


logits = st.integers(-2, 2).map(float) | st.sampled_from([math.nan, math.inf, -math.inf])  # few values: ties are common
batches = st.lists(
    st.tuples(
        st.lists(st.tuples(st.lists(logits, min_size=3, max_size=3), st.integers(0, 2)), min_size=1, max_size=5),
        st.floats(0, 100, width=32),
    ),
    min_size=1,
    max_size=6,
)


@given(batches)
@settings(max_examples=40)
def test_means_are_over_images_ties_go_to_the_first_class_and_what_is_not_finite_is_wrong(batches):
    metrics = started()
    losses, hits = [], []
    for images, loss in batches:
        feed(metrics, "test", [row for row, _ in images], [target for _, target in images], loss)
        losses += [loss] * len(images)
        hits += [all(map(math.isfinite, row)) and row.index(max(row)) == target for row, target in images]
    assert metrics.metrics(ALONE, "test")["loss"].value.dtype == torch.float64
    found = values(metrics, "test")
    assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-14)
    assert found["accuracy"] == 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("row", [[math.nan] * 2, [math.inf, 0.0], [0.0, -math.inf], [math.nan, 0.0]])
def test_an_output_that_is_not_finite_is_a_wrong_prediction(row):
    metrics = started()
    feed(metrics, "test", [row, row, [1.0, 0.0], [3e38, 3e38]], [0, 1, 0, 0], math.nan)
    assert values(metrics, "test")["accuracy"] == 50  # great logits are finite
    assert math.isnan(values(metrics, "test")["loss"])


def test_a_network_that_diverged_has_no_accuracy_of_class_0():
    broken = watch(transform_model=lambda model: model.append(torch.nn.Threshold(math.inf, math.nan)))
    (row,) = run_steps({"metrics": Metrics(), "broken": broken}, steps=99, epochs=1).history
    assert row["train_accuracy"] == row["test_accuracy"] == 0


def test_a_loss_that_float32_could_not_add_up():
    metrics = started()
    for loss in [2.0**24, 1.0, 1.0]:
        feed(metrics, "test", [[1.0, 0.0]], [0], loss)
    assert values(metrics, "test")["loss"] == (2.0**24 + 2) / 3


def test_probabilities_count_as_their_most_probable_class():
    metrics = started()
    feed(metrics, "train", [[3.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]], 1.0)
    assert values(metrics, "train")["accuracy"] == pytest.approx(100 * 2 / 3)


def test_splits_are_apart_and_each_begins_anew():
    metrics = started()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    feed(metrics, "test", [[1.0, 0.0]], [1], 2.0)
    reported = metrics.metrics(ALONE, "train")
    assert values(metrics, "test") == {"loss": 2.0, "accuracy": 0.0}
    begin(metrics, "test")
    assert metrics.metrics(ALONE, "test") is None
    assert metrics.metrics(ALONE, "validation") is None
    assert values(metrics, "train") == {"loss": 4.0, "accuracy": 100.0}
    metrics.epoch_start(SimpleNamespace(device=torch.device("cpu")))
    assert metrics.metrics(ALONE, "train") is None
    assert [float(metric.value) for metric in reported.values()] == [4.0, 100.0]  # what was reported stays


def test_an_evaluation_that_was_interrupted_leaves_nothing_behind(tmp_path):
    seen = []
    stop = watch(forward_end=lambda run: run.split == "test" and seen.append(1) is None and run.stop("enough"))
    run = build_run({"metrics": Metrics(), "stop": stop}, epochs=2)
    fit(run, tmp_path / "run")
    assert (len(seen), run.history) == (1, [])
    state = run.state_dict()
    rest = build_run({"metrics": Metrics()}, epochs=2)
    rest.load_state_dict(state)
    fit(rest, tmp_path / "rest")
    assert rest.history == run_steps({"metrics": Metrics()}, steps=8, epochs=2).history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_and_loss_of_any_precision(dtype):
    metrics = started()
    feed(metrics, "test", torch.eye(3, dtype=dtype), [0, 1, 0], torch.tensor(0.5, dtype=dtype))
    assert values(metrics, "test") == {"loss": 0.5, "accuracy": pytest.approx(200 / 3)}


def test_a_run_with_uneven_batches_reports_what_a_plain_count_gives():
    rows = []

    def count(run, batch, output):
        each = F.cross_entropy(output, batch.targets, reduction="none").double()
        hits = (output.argmax(1) == batch.targets).sum()
        rows.append((run.epoch, run.split, float(each.detach().sum()), int(hits), len(batch)))

    run = run_steps({"metrics": Metrics(), "count": watch(forward_end=count)}, steps=14, batch_size=5)  # 7 an epoch
    assert len(run.history) == 2
    for row in run.history:
        for split, n in (("train", 32), ("test", 16)):
            seen = [r for r in rows if r[:2] == (row["epoch"] - 1, split)]
            assert sum(r[4] for r in seen) == n
            assert row[f"{split}_loss"] == pytest.approx(sum(r[2] for r in seen) / n, rel=1e-6)
            assert row[f"{split}_accuracy"] == 100 * sum(r[3] for r in seen) / n


def test_loss_is_better_less_accuracy_more_and_progress_shows_both():
    run = run_steps({"metrics": Metrics()}, steps=4)
    assert {name: tuple(info) for name, info in run.metric_info.items()} == {
        f"{split}_{name}": (better, True)
        for split in ("train", "test")
        for name, better in (("loss", "less"), ("accuracy", "more"))
    }


@pytest.mark.parametrize(("every", "steps"), [(0, []), (3, [3, 6])])
def test_batch_losses_are_recorded(every, steps):
    records, losses = [], []
    noted = watch(
        log=lambda record: records.append(record) if "loss" in record else None,
        forward_end=lambda run, loss: losses.append(float(loss.detach())) if run.split == "train" else None,
    )
    run_steps({"metrics": Metrics(every=every), "noted": noted}, steps=8)
    assert [(r["step"], r["loss"]) for r in records] == [(step, losses[step - 1]) for step in steps]


def several_labels(data):
    change = lambda split: TensorSplit(split.images, F.one_hot(split.targets, 4).float())  # noqa: E731
    return data.replace(train=change(data.train), test=change(data.test))


def test_targets_that_are_no_classes_need_accuracy_false():
    plugins = {
        "data": watch(transform_data=several_labels),
        "loss": watch(loss=lambda: F.binary_cross_entropy_with_logits),
    }
    with pytest.raises(RecipeError, match=r"'metrics', built: .*float32 \[4\]; set plugins.metrics.accuracy=false"):
        build_run({**plugins, "metrics": Metrics()})
    (row,) = run_steps({**plugins, "metrics": Metrics(accuracy=False)}, steps=99, epochs=1).history
    assert {"train_loss", "test_loss"} <= set(row)
    assert not {"train_accuracy", "test_accuracy"} & set(row)


def test_a_kept_state_does_not_change_with_the_run():
    metrics, other = started(), Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    state = metrics.state_dict()
    feed(metrics, "train", [[1.0, 0.0]], [1], 2.0)
    other.load_state_dict(state)
    assert values(other, "train") == {"loss": 4.0, "accuracy": 100.0}


def test_a_loaded_state_moves_to_the_device_of_the_run():
    metrics, other = started(), Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    other.load_state_dict(metrics.state_dict())
    other.fit_start(SimpleNamespace(device=torch.device("meta")))
    assert other.metrics(ALONE, "train")["loss"].value.device.type == "meta"


def test_every_cannot_be_negative():
    assert_refuses(Metrics, "every", -1)


def test_two_of_the_same_names_are_an_error(tmp_path):
    run = build_run({"metrics": Metrics(), "again": Metrics()})
    with pytest.raises(TrainkitError, match=r"'metrics'.*'again'.*'loss'"):
        fit(run, tmp_path / "run")

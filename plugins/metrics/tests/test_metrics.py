import io
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import Batch, TrainkitError, fit
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, run_steps
from trainkit_metrics import Metrics


def feed(plugin, split, outputs, targets, loss):
    run = SimpleNamespace(split=split)
    batch = Batch(torch.zeros(len(targets), 1, 1, 1), torch.as_tensor(targets))
    plugin.forward_end(run, batch, torch.as_tensor(outputs), torch.as_tensor(loss))


logits = st.integers(-2, 2).map(float)  # few values: ties are common
batches = st.lists(
    st.tuples(
        st.lists(st.tuples(st.lists(logits, min_size=3, max_size=3), st.integers(0, 2)), min_size=1, max_size=5),
        st.floats(0, 100, width=32),
    ),
    min_size=1,
    max_size=6,
)


@given(batches)
def test_means_are_over_images_and_ties_go_to_the_first_class(batches):
    metrics = Metrics()
    losses, hits = [], []
    for images, loss in batches:
        feed(metrics, "test", [row for row, _ in images], [target for _, target in images], loss)
        losses += [loss] * len(images)
        hits += [row.index(max(row)) == target for row, target in images]
    found = metrics.metrics("test")
    assert found["loss"].dtype == torch.float64
    assert float(found["loss"]) == pytest.approx(math.fsum(losses) / len(losses), rel=1e-14)
    assert float(found["accuracy"]) == 100 * sum(hits) / len(hits)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=200), st.data())
@settings(deadline=None)
def test_bits_do_not_depend_on_where_a_run_was_interrupted(sizes, data):
    generator = torch.Generator().manual_seed(0)
    uniform = data.draw(st.booleans())  # batches of one size, as nearly always
    fed = [
        (torch.randn(n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator), torch.rand(()))
        for n in ([4] * len(sizes) if uniform else sizes)
    ]
    cut = data.draw(st.integers(0, len(fed)))
    whole, first, second = Metrics(), Metrics(), Metrics()
    for batch in fed:
        feed(whole, "train", *batch)
    for batch in fed[:cut]:
        feed(first, "train", *batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for batch in fed[cut:]:
        feed(second, "train", *batch)
    expected, found = whole.metrics("train"), second.metrics("train")
    assert [v.item() for v in found.values()] == [v.item() for v in expected.values()]
    correct = sum(int((output.argmax(1) == targets).sum()) for output, targets, _ in fed)
    images = sum(len(targets) for _, targets, _ in fed)
    assert found["accuracy"].item() == correct * 100 / images
    mean = math.fsum(float(loss) * len(targets) for _, targets, loss in fed) / images
    assert found["loss"].item() == pytest.approx(mean, rel=1e-13)


def test_a_loss_that_float32_could_not_add_up():
    metrics = Metrics()
    for loss in [2.0**24, 1.0, 1.0]:
        feed(metrics, "test", [[1.0, 0.0]], [0], loss)
    assert float(metrics.metrics("test")["loss"]) == (2.0**24 + 2) / 3


def test_probabilities_count_as_their_most_probable_class():
    metrics = Metrics()
    feed(metrics, "train", [[3.0, 1.0], [0.0, 1.0], [0.0, 1.0]], [[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]], 1.0)
    assert float(metrics.metrics("train")["accuracy"]) == pytest.approx(100 * 2 / 3)


def test_splits_are_apart_and_an_evaluation_starts_from_nothing():
    metrics = Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    feed(metrics, "test", [[1.0, 0.0]], [1], 2.0)
    assert [float(v) for v in metrics.metrics("test").values()] == [2.0, 0.0]
    assert metrics.metrics("test") is None
    assert [float(v) for v in metrics.metrics("train").values()] == [4.0, 100.0]
    metrics.epoch_start()
    assert metrics.metrics("train") is None


def test_what_was_reported_does_not_change_later():
    metrics = Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    reported = metrics.metrics("train")
    feed(metrics, "train", [[1.0, 0.0]], [1], 2.0)
    assert [float(v) for v in reported.values()] == [4.0, 100.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_and_loss_of_any_precision(dtype):
    metrics = Metrics()
    feed(metrics, "test", torch.eye(3, dtype=dtype), [0, 1, 0], torch.tensor(0.5, dtype=dtype))
    assert [float(v) for v in metrics.metrics("test").values()] == [0.5, pytest.approx(200 / 3)]


@plugin
class Watch:
    """Evaluates the plain way beside the plugin, and keeps what was logged."""

    def __attrs_post_init__(self):
        Watch.rows, Watch.records, Watch.batch_losses = [], [], []

    @hookimpl
    def forward_end(self, run, batch, output, loss):
        each = torch.nn.functional.cross_entropy(output, batch.targets, reduction="none").double()
        self.rows.append(
            (run.epoch, run.split, each.detach().sum(), (output.argmax(1) == batch.targets).sum(), len(batch))
        )
        if run.split == "train":
            self.batch_losses.append(float(loss.detach()))

    @hookimpl
    def log(self, record):
        self.records.append(record)


def test_a_run_with_uneven_batches_reports_what_a_plain_count_gives():
    run = run_steps({"metrics": Metrics(), "watch": Watch()}, steps=14, batch_size=5)  # 32 = 6 * 5 + 2: 7 a epoch
    for row in run.history:
        for split, n in (("train", 32), ("test", 16)):
            seen = [r for r in Watch.rows if r[:2] == (row["epoch"] - 1, split)]
            assert sum(r[4] for r in seen) == n
            assert row[f"{split}_loss"] == pytest.approx(float(sum(r[2] for r in seen)) / n, rel=1e-6)
            assert row[f"{split}_accuracy"] == 100 * int(sum(r[3] for r in seen)) / n
    assert len(run.history) == 2


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6])])
def test_batch_losses_are_recorded(every, steps):
    run_steps({"metrics": Metrics(every=every), "watch": Watch()}, steps=8)
    found = [r for r in Watch.records if "loss" in r]
    assert [r["step"] for r in found] == steps
    assert [r["loss"] for r in found] == [Watch.batch_losses[s - 1] for s in steps]


@plugin
class StopAt:
    """Stops after a number of forward passes of a split."""

    split: str
    count: int

    @hookimpl
    def forward_end(self, run):
        if run.split == self.split:
            self.count -= 1
            if self.count == 0:
                run.stop("enough")


@pytest.fixture(scope="module")
def whole():
    return run_steps({"metrics": Metrics()}, steps=8, epochs=2).history


@pytest.mark.parametrize("stop", [("train", 2), ("train", 4), ("test", 1), ("test", 3)])
def test_a_stopped_and_resumed_run_reports_the_same(tmp_path, whole, stop):
    first = build_run({"metrics": Metrics(), "stop": StopAt(split=stop[0], count=stop[1])}, epochs=2)
    fit(first, tmp_path / "first")
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build_run({"metrics": Metrics()}, epochs=2)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fit(second, tmp_path / "second")
    assert second.history == whole
    assert len(second.history) == 2


def test_a_kept_state_does_not_change_with_the_run():
    metrics = Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    state = metrics.state_dict()
    for other in (metrics, Metrics()):
        other.load_state_dict(state)
        feed(other, "train", [[1.0, 0.0]], [1], 2.0)
        assert [float(v) for v in other.metrics("train").values()] == [3.0, 50.0]


def test_a_loaded_state_moves_to_the_device_of_the_run():
    metrics, other = Metrics(), Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], 4.0)
    other.load_state_dict(metrics.state_dict())
    other.fit_start(SimpleNamespace(device=torch.device("meta")))
    assert other.metrics("train")["loss"].device.type == "meta"


def test_nan_is_reported_as_such():
    metrics = Metrics()
    feed(metrics, "train", [[1.0, 0.0]], [0], float("nan"))
    assert math.isnan(metrics.metrics("train")["loss"])


def test_every_cannot_be_negative():
    with pytest.raises(ValueError, match="'every'"):
        Metrics(every=-1)


def test_two_of_the_same_names_are_an_error(tmp_path):
    run = build_run({"metrics": Metrics(), "again": Metrics()})
    with pytest.raises(TrainkitError, match=r"'metrics'.*'again'.*'loss'"):
        fit(run, tmp_path / "run")

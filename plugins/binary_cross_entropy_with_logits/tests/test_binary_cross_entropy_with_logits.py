import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import TensorSplit
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, build_run, fake_data, run_steps
from trainkit_autocast import Autocast
from trainkit_binary_cross_entropy_with_logits import BinaryCrossEntropyWithLogits
from trainkit_metrics import Metrics


@plugin
class Labels:
    """Fake data whose images have several of four labels; those with index 1 and 3 show in the brightness."""

    dtype: Any = torch.float32
    decoded: bool = False

    @hookimpl
    def data(self):
        data = fake_data()

        def labelled(split):
            bits = torch.stack([split.targets >> 1, split.targets & 1, split.targets * 0, split.targets % 3 == 0], 1)
            split = TensorSplit(split.images, bits.to(self.dtype))
            return [split[i] for i in range(len(split))] if self.decoded else split

        return data.replace(train=labelled(data.train), test=labelled(data.test))


@plugin
class Given:
    """Data with given targets."""

    targets: Any
    classes: tuple = ("a", "b", "c", "d")

    @hookimpl
    def data(self):
        data = fake_data()
        return data.replace(
            train=TensorSplit(data.train.images[: len(self.targets)], self.targets), classes=self.classes
        )


def loss_of(labels=Labels, **options):
    loss = BinaryCrossEntropyWithLogits(**options)
    return build_run({"data": labels if not isinstance(labels, type) else labels(), "loss": loss}).loss


def by_hand(logits, targets, weights):
    """The definition, in Python: the mean of -(w * y * log(p) + (1 - y) * log(1 - p))."""
    total = 0.0
    for row, wanted in zip(logits, targets, strict=True):
        for x, y, w in zip(row, wanted, weights, strict=True):
            log_p = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
            total -= w * y * log_p + (1 - y) * (log_p - x)
    return total / (len(logits) * 4)


rows = lambda values: st.lists(st.lists(values, min_size=4, max_size=4), min_size=5, max_size=5)  # noqa: E731
weights = st.none() | st.floats(0.1, 20) | st.lists(st.floats(0.1, 20), min_size=4, max_size=4)


@settings(max_examples=30)
@given(rows(st.floats(-30, 30)), rows(st.sampled_from([0, 1]) | st.floats(0, 1)), weights)
def test_it_is_the_definition(logits, targets, pos_weight):
    given = pos_weight if isinstance(pos_weight, list) else [1.0 if pos_weight is None else pos_weight] * 4
    loss = loss_of(pos_weight=pos_weight)(torch.tensor(logits), torch.tensor(targets, dtype=torch.float32))
    assert float(loss) == pytest.approx(by_hand(logits, targets, given), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pos_weight", [None, 3, [1.0, 2.0, 0.5, 4.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_it_is_torchs_module_for_targets_of_any_type(dtype, pos_weight):
    output, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float32)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=weight)(output, targets.float())
    assert torch.equal(loss_of(Labels(dtype=dtype), pos_weight=pos_weight)(output, targets.to(dtype)), expected)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_it_trains(dtype, decoded):
    plugins = {"data": Labels(dtype=dtype, decoded=decoded), "metrics": Metrics(accuracy=False)}
    run = run_steps({**plugins, "loss": BinaryCrossEntropyWithLogits()}, steps=40)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] - 0.1


def test_under_autocast_it_is_computed_in_float32():
    plugins = {
        "data": Labels(),
        "autocast": Autocast(dtype="bfloat16"),
        "loss": BinaryCrossEntropyWithLogits(pos_weight=2),
    }
    run = build_run(plugins)
    batch = run.prepare(next(run.batches["train"].iterate()))
    output, loss = run.compute_loss(batch)
    assert output.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(output.float(), batch.targets)
    torch.testing.assert_close(loss, expected)


def test_it_conforms():
    assert_conforms(BinaryCrossEntropyWithLogits, beside={"data": Labels()}, pos_weight=[1.0, 2.0, 3.0, 4.0])


def test_classes_are_refused_and_cross_entropy_is_named():
    with pytest.raises(RecipeError, match="'loss', loss: .*targets are classes, one an image; list cross_entropy"):
        build_run({"loss": BinaryCrossEntropyWithLogits()})


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (torch.zeros(8), r"a tensor of 4 numbers, one for each label, and the data's are float32 \[\]"),
        (torch.zeros(8, 3), r"a tensor of 4 numbers, one for each label, and the data's are float32 \[3\]"),
        (torch.zeros(8, 4, 4), r"a tensor of 4 numbers, one for each label, and the data's are float32 \[4, 4\]"),
        (torch.full((8, 4), 2), r"targets must be from 0 to 1, and the data's go from 2 to 2"),
        (torch.tensor([[0, 1, 0, 0], [0, -1, 0, 0]]), r"targets must be from 0 to 1, and the data's go from -1 to 1"),
        (torch.full((8, 4), torch.nan), r"targets must be from 0 to 1"),
    ],
)
def test_other_targets_are_refused(targets, said):
    with pytest.raises(RecipeError, match=said):
        loss_of(Given(targets=targets))


def test_a_weight_for_each_label():
    with pytest.raises(RecipeError, match="'pos_weight': 2 weights for 4 labels"):
        loss_of(pos_weight=[1.0, 2.0])


@pytest.mark.parametrize("pos_weight", [0, -1.0, [], [1.0, 0.0], float("nan")])
def test_weights_must_be_positive(pos_weight):
    with pytest.raises(ValueError, match="'pos_weight'"):
        BinaryCrossEntropyWithLogits(pos_weight=pos_weight)

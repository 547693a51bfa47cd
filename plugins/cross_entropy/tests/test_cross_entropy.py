import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import TensorSplit
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_cross_entropy import CrossEntropy


@st.composite
def batches(draw):
    n, classes = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(n, classes, generator=generator) * draw(st.floats(0, 20))
    return logits, torch.randint(classes, (n,), generator=generator)


def by_hand(logits, probabilities, smoothing):
    """The definition, in float64: smoothed targets times minus the log of the softmax, averaged over the batch."""
    logits, classes = logits.double(), logits.shape[1]
    targets = probabilities.double() * (1 - smoothing) + smoothing / classes
    log_softmax = logits - logits.exp().sum(1, keepdim=True).log()
    return -(targets * log_softmax).sum(1).mean().float()


@given(batches(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40)
def test_classes_and_probabilities(batch, smoothing, share):
    logits, targets = batch
    loss = CrossEntropy(label_smoothing=smoothing).loss(build_run({}))
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[1]).float()
    mixed = share * one_hot + (1 - share) * one_hot.flip(0)  # what mixup makes of targets
    for given_targets, probabilities in ((targets, one_hot), (mixed, mixed)):
        expected = by_hand(logits, probabilities, smoothing)
        torch.testing.assert_close(loss(logits, given_targets), expected, rtol=1e-4, atol=1e-5)


def test_trains_as_torchs_own_loss_and_smoothing_changes_it():
    own = parameters_of(run_steps({}))  # the loss that stands in is torch's
    plain = parameters_of(run_steps({"cross_entropy": CrossEntropy()}))
    smooth = parameters_of(run_steps({"cross_entropy": CrossEntropy(label_smoothing=0.1)}))
    assert all(map(torch.equal, own, plain))
    assert not all(map(torch.equal, own, smooth))


def with_targets(make):
    """Return a plugin that makes other targets of the classes."""
    change = lambda split: TensorSplit(split.images, make(split.targets))  # noqa: E731
    return watch(transform_data=lambda data: data.replace(train=change(data.train), test=change(data.test)))


def probabilities(targets):
    return torch.nn.functional.one_hot(targets, 4).float()


def test_probabilities_in_the_data_train_as_the_classes_that_they_are():
    soft = {"data": with_targets(probabilities), "cross_entropy": CrossEntropy(targets="probabilities")}
    hard = {"cross_entropy": CrossEntropy()}
    for a, b in zip(parameters_of(run_steps(soft)), parameters_of(run_steps(hard)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (probabilities, {}, r"takes classes, and the data's targets are float32 \[4\]; .*targets=probabilities"),
        (lambda t: probabilities(t).long(), {}, r"are int64 \[4\]; list binary_cross_entropy_with_logits"),
        (lambda t: t.float(), {}, r"are float32 \[\]"),
        (lambda t: t, {"targets": "probabilities"}, r"'targets': probabilities are floats \[4\], and the data's are"),
        (lambda t: probabilities(t).long(), {"targets": "probabilities"}, r"floats \[4\], and .* int64 \[4\]"),
        (lambda t: probabilities(t)[:, :3], {"targets": "probabilities"}, r"floats \[4\], and .* float32 \[3\]"),
    ],
)
def test_other_targets_are_refused_with_the_cure(make, options, message):
    with pytest.raises(RecipeError, match=f"'cross_entropy', loss: .*{message}") as caught:
        build_run({"data": with_targets(make), "cross_entropy": CrossEntropy(**options)})
    assert "\n" not in str(caught.value)


def test_label_smoothing_must_be_a_share():
    assert_refuses(CrossEntropy, "label_smoothing", -0.1, 1.1, float("nan"))

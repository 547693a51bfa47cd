import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.testing import parameters_of, run_steps
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


@given(batches(), st.floats(0, 1))
def test_classes(batch, smoothing):
    logits, targets = batch
    loss = CrossEntropy(label_smoothing=smoothing).loss()(logits, targets)
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[1])
    torch.testing.assert_close(loss, by_hand(logits, one_hot, smoothing), rtol=1e-4, atol=1e-5)


@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_probabilities(batch, smoothing, share):
    logits, targets = batch
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[1]).float()
    mixed = share * one_hot + (1 - share) * one_hot.flip(0)  # what mixup makes of targets
    loss = CrossEntropy(label_smoothing=smoothing).loss()(logits, mixed)
    torch.testing.assert_close(loss, by_hand(logits, mixed, smoothing), rtol=1e-4, atol=1e-5)


def test_trains_as_torchs_own_loss_and_smoothing_changes_it():
    own = parameters_of(run_steps({}))  # the loss that stands in is torch's
    plain = parameters_of(run_steps({"cross_entropy": CrossEntropy()}))
    smooth = parameters_of(run_steps({"cross_entropy": CrossEntropy(label_smoothing=0.1)}))
    assert all(map(torch.equal, own, plain))
    assert not all(map(torch.equal, own, smooth))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_label_smoothing_must_be_a_share(value):
    with pytest.raises(ValueError, match="'label_smoothing'"):
        CrossEntropy(label_smoothing=value)

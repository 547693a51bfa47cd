import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from trainkit import TensorSplit
from trainkit.errors import PluginError, RecipeError
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_balanced_sampler import BalancedSampler
from trainkit_class_balance import ClassBalance, class_weights
from trainkit_metrics import Metrics
from trainkit_mixup import Mixup

COUNTS = torch.tensor([12, 8, 3, 1])


def imbalanced(counts=COUNTS, probabilities=False):
    """Return a plugin that leaves so many training images of each class."""

    def change(data):
        kept = [(data.train.targets == label).nonzero().flatten()[:1].repeat(n) for label, n in enumerate(counts)]
        indices = torch.cat(kept)
        targets = data.train.targets[indices]
        targets = one_hot(targets, 4).float() if probabilities else targets
        return data.replace(train=TensorSplit(data.train.images[indices], targets))

    return watch(transform_data=change)


def by_hand(logits, probabilities, counts, beta, smoothing):
    """The paper's weights and the definition of a weighted mean, in float64."""
    effective = torch.tensor([sum(beta**k for k in range(n)) for n in counts.tolist()]).double()
    weight = 1 / effective
    smooth = probabilities.double() * (1 - smoothing) + smoothing / logits.shape[1]
    losses = -(smooth * logits.double().log_softmax(1) * weight).sum(1)
    return (losses.sum() / (probabilities.double() @ weight).sum()).float()


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 30), min_size=4, max_size=4),
    st.floats(0, 0.9999),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_the_loss_is_the_weighted_mean_for_classes_and_for_mixtures(counts, beta, smoothing, share, seed):
    counts = torch.tensor(counts)
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(6, 4, generator=generator), torch.randint(4, (6,), generator=generator)
    plugin = ClassBalance(beta=beta, label_smoothing=smoothing)
    loss = plugin.loss(build_run({"imbalanced": imbalanced(counts)}))
    pure = one_hot(targets, 4).float()
    mixed = share * pure + (1 - share) * pure.flip(0)
    for given_targets, probabilities in ((targets, pure), (pure, pure), (mixed, mixed)):
        expected = by_hand(logits, probabilities, counts, beta, smoothing)
        torch.testing.assert_close(loss(logits, given_targets), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trains_as_torchs_loss_with_inverse_frequencies(smoothing):
    weight = 1 / COUNTS.float()
    torchs = torch.nn.CrossEntropyLoss(weight / weight.mean(), label_smoothing=smoothing)
    ours = ClassBalance(weights="inverse", label_smoothing=smoothing)
    ours, theirs = (run_steps({"few": imbalanced(), "loss": loss}) for loss in (ours, watch(loss=lambda: torchs)))
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_beta_goes_from_equal_weights_to_inverse_frequencies():
    assert torch.equal(class_weights(COUNTS, "effective", 0.0), torch.ones(4))
    inverse = class_weights(COUNTS, "inverse", 0.0)
    torch.testing.assert_close(class_weights(COUNTS, "effective", 1 - 1e-9), inverse)
    torch.testing.assert_close(inverse * COUNTS, inverse[3].expand(4))


def test_mixtures_are_weighted_by_their_shares_in_a_run():
    seen = []

    def note(run, batch, output, loss):
        if run.split == "train":
            seen.append((loss.detach(), output.detach(), batch.targets))

    plugins = {"few": imbalanced(), "mixup": Mixup(), "loss": ClassBalance(beta=0.9), "note": watch(forward_end=note)}
    run_steps(plugins, steps=6)
    assert len(seen) == 6
    for loss, output, targets in seen:
        torch.testing.assert_close(loss, by_hand(output, targets, COUNTS, 0.9, 0.0))


def test_evaluation_is_not_weighted():
    run = run_steps({"few": imbalanced(), "loss": ClassBalance(), "metrics": Metrics()}, steps=3)
    with torch.no_grad():
        output = run.model.eval()(run.data.test.images / 255)
    expected = cross_entropy(output, run.data.test.targets)
    assert run.history[-1]["test_loss"] == pytest.approx(float(expected))


def test_a_class_without_images_is_an_error():
    with pytest.raises(RecipeError, match="the class 'class 2' has no training images.*list cross_entropy in place"):
        build_run({"few": imbalanced(torch.tensor([3, 3, 0, 3])), "loss": ClassBalance()})


def test_other_targets_than_classes_are_refused():
    with pytest.raises(RecipeError, match=r"balances classes, and the data's targets are float32 \[4\]; list another"):
        build_run({"few": imbalanced(probabilities=True), "loss": ClassBalance()})


def test_classes_are_not_balanced_twice():
    with pytest.raises(PluginError, match="'class_balance' cannot run beside plugin 'balanced_sampler'"):
        build_run({"class_balance": ClassBalance(), "balanced_sampler": BalancedSampler()})


def test_options_are_in_their_ranges():
    assert_refuses(ClassBalance, "beta", 1, -0.1, float("nan"))
    assert_refuses(ClassBalance, "label_smoothing", -0.1, 1.1)
    assert_refuses(ClassBalance, "weights", "none")

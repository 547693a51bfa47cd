from typing import Any

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainkit import evaluate, fit
from trainkit.errors import CheckpointError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_ema import EMA
from trainkit_metrics import Metrics


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@plugin
class Reference:
    """torch's own average, beside the plugin."""

    decay: float
    average_by: Any = None  # of two tensors and the number of updates, in place of the decay
    average: AveragedModel = field(init=False)

    @hookimpl
    def fit_start(self, run):
        together = None if self.average_by else get_ema_multi_avg_fn(self.decay)
        self.average = AveragedModel(run.model, avg_fn=self.average_by, multi_avg_fn=together, use_buffers=True)

    @hookimpl
    def step_end(self, run):
        self.average.update_parameters(run.model)


@settings(max_examples=6)
@given(st.floats(0.1, 0.9999), st.integers(1, 12))
def test_with_a_warm_up_the_decay_grows_to_its_value(decay, steps):
    def tensorflows(average, weights, updates):  # tf.train.ExponentialMovingAverage(decay, num_updates)
        kept = min(decay, (1 + updates) / (10 + updates))
        return kept * average + (1 - kept) * weights

    ema, reference = EMA(decay=decay, warmup=True), Reference(decay=decay, average_by=tensorflows)
    run_steps({"ema": ema, "reference": reference}, steps=steps)
    theirs = reference.average.module.parameters()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(ema.eval_model().parameters(), theirs, strict=True))


@plugin
class SharedKernels:
    """A network in which two convolutions are one parameter."""

    channels_last: bool = False

    @hookimpl
    def model(self, run):
        model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.BatchNorm2d(3), nn.Flatten())
        model.append(nn.Linear(192, len(run.data.classes)))
        model[2].weight = model[0].weight
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


@settings(max_examples=10)
@given(st.floats(0.01, 0.9999), st.integers(1, 9), st.booleans())
def test_every_bit_is_that_of_torchs_averaged_model(decay, steps, shared):
    ema, reference = EMA(decay=decay), Reference(decay=decay)
    network = {"network": SharedKernels()} if shared else {}
    run = run_steps({**network, "ema": ema, "reference": reference}, steps=steps)
    ours, theirs = ema.eval_model(), reference.average.module
    assert same(ours.parameters(), theirs.parameters())
    ours, theirs, trained = (model[3 if shared else 1].running_var for model in (ours, theirs, run.model))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, trained) == (steps == 1)


def test_buffers_of_whole_numbers_are_those_of_the_trained_network():
    ema = EMA(decay=0.9)
    run = run_steps({"ema": ema}, steps=5)
    assert ema.eval_model()[1].num_batches_tracked == run.model[1].num_batches_tracked == 5


def test_the_formula_by_hand():
    ema = EMA(decay=0.75)
    run = build_run({"ema": ema})
    weight = run.model[0].weight
    for value, expected in [(4.0, 4.0), (8.0, 5.0), (1.0, 4.0)]:  # the initial weights do not count
        nn.init.constant_(weight, value)
        ema.step_end()
        assert torch.equal(ema.eval_model()[0].weight, torch.full_like(weight, expected))


def test_the_average_is_evaluated_and_training_does_not_see_it(tmp_path):
    with_ema = build_run({"ema": (ema := EMA(decay=0.9)), "metrics": Metrics()}, epochs=2)
    without = build_run({"metrics": Metrics()}, epochs=2)
    fit(with_ema, tmp_path / "with")
    fit(without, tmp_path / "without")
    assert same(with_ema.model.state_dict().values(), without.model.state_dict().values())
    losses = [row["test_loss"] for row in with_ema.history]
    assert losses != [row["test_loss"] for row in without.history]
    by_hand = [
        nn.functional.cross_entropy(ema.eval_model()(b.images.float() / 255), b.targets)
        for b in with_ema.batches["test"].iterate()
    ]
    assert losses[-1] == pytest.approx(float(torch.stack(by_hand).mean()))
    assert not any(module.training for module in ema.eval_model().modules())


def test_shared_kernels_stay_shared_and_are_averaged_once():
    ema = EMA(decay=0.5)
    run = run_steps({"network": SharedKernels(), "ema": ema}, steps=3)
    average = ema.eval_model()
    assert average[0].weight is average[2].weight
    assert average[0].weight is not run.model[0].weight
    assert sum(1 for _ in average.parameters()) == sum(1 for _ in run.model.parameters())


def test_memory_format_is_that_of_the_weights_also_after_loading():
    first, second = EMA(decay=0.5), EMA(decay=0.5)
    saved = run_steps({"network": SharedKernels(channels_last=True), "ema": first}).state_dict()
    build_run({"network": SharedKernels(channels_last=True), "ema": second}).load_state_dict(saved)
    for ema in (first, second):
        assert ema.eval_model()[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not ema.eval_model()[0].weight.is_contiguous()


def test_nothing_of_it_needs_gradients():
    ema = EMA()
    run_steps({"ema": ema})
    assert not any(p.requires_grad or p.grad is not None for p in ema.eval_model().parameters())


def test_a_checkpoint_is_evaluated_as_it_was_in_the_run(tmp_path):
    run = build_run({"ema": EMA(decay=0.9), "metrics": Metrics()}, epochs=2)
    fit(run, tmp_path / "run")
    loaded = build_run({"ema": EMA(decay=0.9), "metrics": Metrics()}, epochs=2)
    loaded.load_state_dict(run.state_dict())
    assert evaluate(loaded)["test_loss"] == run.history[-1]["test_loss"]


def test_the_saved_average_is_a_state_dict_of_the_plain_network():
    ema = EMA(decay=0.5)
    run = run_steps({"ema": ema}, steps=3)
    plain = build_run({}).model
    plain.load_state_dict(run.state_dict()["plugins"]["ema"]["state"]["model"])
    assert same(plain.state_dict().values(), ema.eval_model().state_dict().values())


def test_a_run_saved_without_it_is_evaluated_as_it_is_and_averaged_from_its_next_step(tmp_path):
    before = run_steps({"metrics": Metrics()}, steps=4, epochs=1)
    run = build_run({"ema": (ema := EMA(decay=0.9)), "metrics": Metrics()}, epochs=2, max_steps=5)
    run.load_state_dict(before.state_dict())
    assert evaluate(run)["test_loss"] == before.history[-1]["test_loss"]
    fit(run, tmp_path / "run")
    assert same(ema.eval_model().parameters(), parameters_of(run))  # one step


def test_the_average_of_another_network_is_refused():
    state = run_steps({"ema": EMA()}).state_dict()
    state["plugins"]["ema"]["state"]["model"].popitem()
    with pytest.raises(CheckpointError, match="'ema' failed in load_state_dict.*Missing key"):
        build_run({"ema": EMA()}).load_state_dict(state)


def test_the_validation_split_and_every_second_epoch_are_evaluated_on_the_average_too():
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    plugins = {"held_out": held_out, "ema": EMA(decay=0.5), "metrics": Metrics()}
    run = run_steps(plugins, steps=12, epochs=3, eval_every=2)
    assert ["validation_loss" in row for row in run.history] == [False, True, True]
    assert run.tested["test_loss"] == run.history[-1]["validation_loss"]  # the same images, the same average


def test_decay_must_be_between_0_and_1():
    assert_refuses(EMA, "decay", 0, 1, -0.5, 1.5, float("nan"))

import io
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit import fit
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, run_steps
from trainkit_accumulate import Accumulate
from trainkit_adamw import AdamW
from trainkit_ema import EMA
from trainkit_freeze import Freeze
from trainkit_grad_clip import GradClip
from trainkit_lookahead import Lookahead
from trainkit_sgd import SGD

OPTIMIZERS = {"sgd": lambda: SGD(lr=0.1, momentum=0.9, weight_decay=0.1), "adamw": lambda: AdamW(lr=0.01)}


@plugin
class Network:
    """Two blocks of convolution and batch normalization, and a head."""

    shared: bool = False

    @hookimpl
    def model(self, run):
        def block(channels):
            return nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(run.data.classes)))
        model = nn.Sequential()
        model.blocks = nn.Sequential(block(3), block(3))
        model.head = head
        if self.shared:
            model.blocks[1][0].weight = model.blocks[0][0].weight
        return model


@plugin
class Watch:
    """Keeps the state of the network after each step, and a checkpoint of one step in memory."""

    states: list = field(factory=list)
    save_at: int = -1
    file: Any = None

    @hookimpl
    def step_end(self, run):
        self.states.append({key: value.clone() for key, value in run.model.state_dict().items()})

    @hookimpl
    def safe_point(self, run):
        if run.step == self.save_at and self.file is not None and not self.file.tell():
            torch.save(run.state_dict(), self.file)


def trained(steps, *, optimizer="sgd", more=None, shared=False, **options):
    """Return the state of the network before training and after each step; an epoch has four steps."""
    watch = Watch()
    plugins = {"network": Network(shared=shared), "optimizer": OPTIMIZERS[optimizer](), **(more or {})}
    freeze = {"freeze": Freeze(**options)} if options else {}
    run = build_run({**plugins, **freeze, "watch": watch}, epochs=1000, max_steps=steps)
    first = {key: value.clone() for key, value in run.model.state_dict().items()}
    with TemporaryDirectory() as folder:
        fit(run, folder)
    return run, [first, *watch.states]


def moved(states, step):
    """Return what a step (from 1) changed."""
    before, after = states[step - 1 : step + 1]
    return {key for key in after if not torch.equal(before[key], after[key])}


STATE = set(Network().model(build_run({})).state_dict())


def of(prefix, *, statistics=True):
    """Return the keys of a part's state, with or without those of statistics."""
    return {key for key in STATE if key.startswith(prefix) and (statistics or key.endswith(("weight", "bias")))}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parts_do_not_move_and_all_others_do(optimizer):
    run, states = trained(6, optimizer=optimizer, modules=["blocks.0"])
    for step in range(1, 7):
        assert moved(states, step) == STATE - of("blocks.0.")
    held = {p for group in run.optimizer.param_groups for p in group["params"]}
    assert held == set(run.model.parameters())
    assert all(p.grad is None for p in run.model.blocks[0].parameters())
    assert run.parameters == sum(p.numel() for p in run.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_until_an_epoch(optimizer, epoch):
    _, states = trained(12, optimizer=optimizer, modules=["blocks.*"], epoch=epoch)
    for step in range(1, 13):
        assert moved(states, step) == (STATE - of("blocks.") if step <= 4 * epoch else STATE)


def test_batch_norms_may_go_on_averaging():
    _, states = trained(2, modules=["blocks.0"], batch_norm=False)
    assert moved(states, 2) == STATE - of("blocks.0.", statistics=False)


def by_hand(steps, optimizer, frozen, until, batch_norm):
    """The same in a plain loop: torch's optimizers are given only what they may move."""
    plugins = {"network": Network(), "optimizer": OPTIMIZERS[optimizer]()}
    run = build_run(plugins)
    model, optimizer = run.model, run.optimizer
    states = [{key: value.clone() for key, value in model.state_dict().items()}]
    for step in range(steps):
        run.epoch, batch_index = divmod(step, 4)
        if batch_index == 0:
            batches = list(run.iterate("train"))
            model.train()
            if run.epoch < until and batch_norm:
                for part in frozen:
                    model.get_submodule(part)[1].eval()
        batch = batches[batch_index]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.targets).backward()
        if run.epoch < until:
            for part in frozen:
                for p in model.get_submodule(part).parameters():
                    p.grad = None
        optimizer.step()
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([["blocks.0"], ["blocks.1"]]),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_bit_is_that_of_a_plain_loop_that_drops_gradients(optimizer, frozen, until, batch_norm):
    _, ours = trained(10, optimizer=optimizer, modules=frozen, epoch=until, batch_norm=batch_norm)
    theirs = by_hand(10, optimizer, frozen, until, batch_norm)
    for mine, other in zip(ours, theirs, strict=True):
        assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


@pytest.mark.parametrize("step", [2, 4, 5, 7, 8, 10])
def test_continues_exactly_from_a_checkpoint(step, tmp_path):
    file = io.BytesIO()

    def plugins(watch):
        freeze = Freeze(modules=["blocks.*"], epoch=2)
        return {"network": Network(), "optimizer": OPTIMIZERS["adamw"](), "freeze": freeze, "watch": watch}

    whole, rest = Watch(save_at=step, file=file), Watch()
    run_steps(plugins(whole), steps=12)
    run = build_run(plugins(rest), epochs=1000, max_steps=12)
    file.seek(0)
    run.load_state_dict(torch.load(file, weights_only=True))
    fit(run, tmp_path / "run")
    assert len(rest.states) == 12 - step
    for ours, theirs in zip(rest.states, whole.states[step:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("order", [("freeze@short", "freeze@long"), ("freeze@long", "freeze@short")])
def test_what_two_of_them_match_is_frozen_as_long_as_one_says_so(order):
    made = {
        "freeze@short": Freeze(modules=["blocks.0", "blocks.1"], epoch=1),
        "freeze@long": Freeze(modules=["blocks.0"], epoch=2),
    }
    _, states = trained(12, more={name: made[name] for name in order})
    assert moved(states, 4) == STATE - of("blocks.")
    assert moved(states, 5) == moved(states, 8) == STATE - of("blocks.0.")
    assert moved(states, 9) == STATE


def test_a_shared_kernel_is_frozen_wherever_it_is_used():
    _, states = trained(2, shared=True, modules=["blocks.1"])
    assert moved(states, 1) == STATE - of("blocks.1.") - {"blocks.0.0.weight"}


@pytest.mark.parametrize(
    "more",
    [
        {"accumulate": Accumulate(batches=2)},
        {"grad_clip": GradClip(limit=0.1)},
        {"lookahead": Lookahead()},
        {"ema": EMA(decay=0.5)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_beside_what_else_changes_weights(more):
    _, states = trained(6, more=more, modules=["blocks.0"])
    assert all(torch.equal(states[-1][key], states[0][key]) for key in of("blocks.0."))


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["block"], r"'freeze', built: 'modules': 'block' matches no module of the network; .*'blocks'"),
        (["blocks.*.2"], r"'modules': blocks\.\*\.2: no parameters there are trained"),
        (["blocks", "head"], r"'modules': blocks, head: no parameters are left to train"),
    ],
)
def test_modules_must_be_there_and_leave_something_to_train(modules, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"network": Network(), "freeze": Freeze(modules=modules)})


@pytest.mark.parametrize("options", [{"modules": []}, {"modules": ["a"], "epoch": 0}])
def test_wrong_values_are_refused(options):
    with pytest.raises(ValueError, match="modules|epoch"):
        Freeze(**options)

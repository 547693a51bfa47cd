import math
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

import trainkit_autocast
from trainkit.errors import PluginError, RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, parameters_of, run_steps, watch
from trainkit_accumulate import Accumulate
from trainkit_autocast import Autocast


@plugin
class Watch:
    """Records what convolutions give, and checks loss and gradients, of every step."""

    dtypes: Any
    losses: list

    @hookimpl
    def built(self, run):
        run.model[0].register_forward_hook(lambda module, inputs, output: self.dtypes.add((run.split, output.dtype)))

    @hookimpl
    def forward_end(self, run, output, loss):
        assert loss.dtype == torch.float32
        self.losses.append(loss.item())
        targets = run.batch.targets  # the loss of these very logits, computed in float32
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(output.float(), targets))

    @hookimpl
    def gradients_ready(self, run):
        assert all(p.grad.dtype == torch.float32 for p in run.model.parameters())


def train(autocast, steps=8, **plugins):
    watch = Watch(dtypes=set(), losses=[])
    return run_steps({"autocast": autocast, "watch": watch, **plugins}, steps=steps, epochs=steps // 4), watch


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(trainkit_autocast, "_has_bfloat16", lambda device: True)


def test_auto_computes_in_bfloat16_where_it_is_native_and_says_so(native, capsys):
    run, watch = train(Autocast())
    assert watch.dtypes == {("train", torch.bfloat16), ("test", torch.bfloat16)}
    assert capsys.readouterr().out.count("autocast: bfloat16 on cpu") == 1
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert all(math.isfinite(loss) for loss in watch.losses)


def test_auto_is_off_where_bfloat16_is_not_native_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(trainkit_autocast, "_has_bfloat16", lambda device: False)
    run, watch = train(Autocast())
    assert watch.dtypes == {("train", torch.float32), ("test", torch.float32)}
    assert "autocast: off" in capsys.readouterr().out
    for a, b in zip(parameters_of(run), parameters_of(run_steps({}, steps=8, epochs=2)), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_that_is_asked_for_is_used_wherever_it_runs(monkeypatch):
    monkeypatch.setattr(trainkit_autocast, "_has_bfloat16", lambda device: False)
    _, watch = train(Autocast(dtype="bfloat16"))
    assert watch.dtypes == {("train", torch.bfloat16), ("test", torch.bfloat16)}


def test_training_comes_near_that_in_float32(native):
    mixed, _ = train(Autocast(), steps=4)
    for a, b in zip(parameters_of(mixed), parameters_of(run_steps({}, steps=4, epochs=1)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("avx512", "avx512_bf16", "onednn", "expected"),
    [
        (True, True, True, True),
        (True, False, True, False),  # oneDNN would emulate it
        (False, False, True, True),  # such as an Arm processor with bfloat16
        (False, False, False, False),
    ],
)
def test_what_counts_as_native_on_a_processor(monkeypatch, avx512, avx512_bf16, onednn, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert trainkit_autocast._has_bfloat16(torch.device("cpu")) is expected


def test_a_processor_without_onednn_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert trainkit_autocast._has_bfloat16(torch.device("cpu")) is False


def test_float16_on_a_processor_is_an_error():
    with pytest.raises(RecipeError, match=r"'autocast'.*'dtype': float16 is for GPUs"):
        build_run({"autocast": Autocast(dtype="float16")})


def test_bfloat16_leaves_backward_to_others_and_float16_does_not(native):
    other = watch(backward=lambda loss: loss.backward())
    run_steps({"autocast": Autocast(), "other": other}, steps=1)
    with pytest.raises(PluginError, match=r"'backward' takes one provider.*'autocast'.*'other'"):
        build_run({"autocast": Autocast(dtype="float16"), "other": other})


# Loss scaling works on the processor, too, where only float16 itself is missing: the plugin's hooks and torch's scaler
# in a real run, in float32.


def scaled(monkeypatch, **options):
    monkeypatch.setattr(trainkit_autocast, "GradScaler", lambda device: GradScaler("cpu", **options))
    autocast = Autocast(dtype="float16")
    monkeypatch.setattr(Autocast, "contexts", hookimpl(contexts_in_float32))
    return autocast


def contexts_in_float32(self, run):
    self._scaling.scaler = trainkit_autocast.GradScaler(run.device.type)


@pytest.mark.parametrize("others", [{}, {"accumulate": Accumulate(batches=3)}], ids=["alone", "accumulate"])
def test_scaling_changes_no_gradient_and_no_parameter(monkeypatch, others):
    def train(**plugins):
        seen = []
        note = watch(gradients_ready=lambda run: seen.extend(p.grad.clone() for p in run.model.parameters()))
        return seen, parameters_of(run_steps({**plugins, **others, "note": note}, steps=3))

    plain, expected = train()
    scaled_gradients, found = train(autocast=scaled(monkeypatch, init_scale=1024.0))
    assert len(plain) == len(scaled_gradients) == 3 * len(found)
    for a, b in zip(plain + expected, scaled_gradients + found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_with_infinite_gradients_is_left_out_and_lowers_the_scale(monkeypatch, wrapped, batches):
    def spoil(run, output):
        if run.split == "train" and run.batch_index == 0 and run.step == 0:
            output.register_hook(lambda gradient: gradient * math.inf)

    def train(steps):
        start, autocast = [], scaled(monkeypatch, init_scale=1024.0)
        others = watch(
            fit_start=lambda run: start.extend(parameters_of(run)),
            transform_optimizer=lambda optimizer: Wrapped(optimizer) if wrapped else optimizer,
            forward_end=spoil,
        )
        run = run_steps({"autocast": autocast, "accumulate": Accumulate(batches=batches), "o": others}, steps=steps)
        assert autocast.state_dict()["scale"] == 512.0
        return all(map(torch.equal, parameters_of(run), start))

    assert train(steps=1)
    assert not train(steps=2)


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another one, whose parameter groups it shares, as Lookahead is."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups = base.param_groups
        self.state = base.state

    def step(self, closure=None):
        return self.base.step(closure)


def test_a_resumed_run_has_the_scale_it_had(monkeypatch):
    autocast = scaled(monkeypatch, init_scale=1024.0, growth_interval=2)
    state = run_steps({"autocast": autocast}, steps=3).state_dict()
    assert state["plugins"]["autocast"]["state"]["scale"] == 2048.0
    resumed = scaled(monkeypatch)
    build_run({"autocast": resumed}, epochs=1000).load_state_dict(state)
    assert resumed.state_dict() == autocast.state_dict()


def test_bfloat16_has_no_state(native):
    autocast = Autocast()
    run = build_run({"autocast": autocast})
    assert autocast.state_dict() == {}
    run.load_state_dict(run.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")
def test_float16_on_a_gpu():
    watch = Watch(dtypes=set(), losses=[])
    autocast = Autocast(dtype="float16")
    run = run_steps({"autocast": autocast, "watch": watch}, steps=8, epochs=2, device="cuda")
    assert watch.dtypes == {("train", torch.float16), ("test", torch.float16)}
    assert all(math.isfinite(loss) for loss in watch.losses)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())
    assert autocast.state_dict()["scale"] > 0

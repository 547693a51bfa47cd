import io
import math
from typing import Any

import pytest
import torch

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.session import fit
from trainkit.testing import build_run, parameters_of, run_steps
from trainkit_sgd import SGD

USUAL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


@plugin
class Plain:
    """torch's optimizer as a plain loop over parameters."""

    options: dict

    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(params, **self.options, foreach=False, fused=False)


@plugin
class Save:
    """Keeps a checkpoint of one step in memory."""

    step: int
    file: Any

    @hookimpl
    def safe_point(self, run):
        if run.step == self.step:
            torch.save(run.state_dict(), self.file)


@plugin
class ChannelsLast:
    @hookimpl
    def transform_model(self, model):
        return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    [
        USUAL,
        {"lr": 0.3},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.7},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
        {"lr": 0.0, "momentum": 0.9},
    ],
)
def test_trains_as_torchs_plain_loop(options):
    ours = parameters_of(run_steps({"sgd": SGD(**options)}, steps=6))
    plain = parameters_of(run_steps({"plain": Plain(options=options)}, steps=6))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_form_computes_what_the_plain_one_does(dtype):
    results = []
    for make in (SGD(**USUAL).optimizer, Plain(options=USUAL).optimizer):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (1, 7, 1000)]
        optimizer = make(params=params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((bool(optimizer.defaults["fused"]), [p.detach() for p in params]))
    (fused, ours), (not_fused, plain) = results
    assert fused is (dtype != torch.bfloat16)
    assert not not_fused
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, plain, **tolerance)


def test_fused_form_is_right_in_channels_last_memory():
    ours = run_steps({"format": ChannelsLast(), "sgd": SGD(**USUAL)}, steps=4)
    plain = run_steps({"format": ChannelsLast(), "plain": Plain(options=USUAL)}, steps=4)
    assert not ours.model[0].weight.is_contiguous()
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [USUAL, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}])
def test_a_first_step_that_a_gradient_scaler_leaves_out_leaves_nothing_behind(options):
    param = torch.nn.Parameter(torch.randn(1000))
    plain = torch.nn.Parameter(param.detach().clone())
    optimizer, expected = SGD(**options).optimizer([param]), Plain(options=options).optimizer([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (math.inf, 1.0, 2.0):
        gradient = torch.full((1000,), value)
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(value):
            plain.grad = gradient
            expected.step()
        optimizer.zero_grad()
    torch.testing.assert_close(param, plain)


@pytest.mark.parametrize("saved_in", [{}, {"format": ChannelsLast()}], ids=["contiguous", "channels_last"])
def test_a_state_of_another_memory_format_means_the_same(saved_in, tmp_path):
    """torch's fused kernels read the running sums in the order in which they lie in memory."""
    file = io.BytesIO()
    run_steps({**saved_in, "sgd": SGD(**USUAL), "save": Save(step=2, file=file)}, steps=3)
    results = []
    for fused in (True, False):
        file.seek(0)
        other = {} if saved_in else {"format": ChannelsLast()}
        plugins = {**other, "sgd": SGD(**USUAL), "save": Save(step=-1, file=file)}
        run = build_run(plugins, epochs=1000, max_steps=4)
        run.load_state_dict(torch.load(file, weights_only=True))
        run.optimizer.param_groups[0]["fused"] = fused
        fit(run, tmp_path / str(fused))
        results.append(parameters_of(run))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_no_fused_form_where_torch_has_none():
    assert not SGD().optimizer([torch.nn.Parameter(torch.zeros(2, device="meta"))]).defaults["fused"]
    assert not SGD().optimizer([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]).defaults["fused"]


def test_defaults_are_torchs():
    (ours,) = SGD().optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    (torchs,) = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).param_groups
    for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov"):
        assert ours[key] == torchs[key]


@pytest.mark.parametrize("model", [{}, {"format": ChannelsLast()}], ids=["contiguous", "channels_last"])
def test_continues_exactly_from_a_checkpoint_within_an_epoch(model, tmp_path):
    file = io.BytesIO()
    whole = run_steps({**model, "sgd": SGD(**USUAL), "save": Save(step=6, file=file)}, steps=10)
    file.seek(0)
    rest = build_run({**model, "sgd": SGD(**USUAL), "save": Save(step=-1, file=file)}, epochs=1000, max_steps=10)
    rest.load_state_dict(torch.load(file, weights_only=True))
    assert rest.batch_index == 2
    fit(rest, tmp_path / "run")
    assert all(map(torch.equal, parameters_of(whole), parameters_of(rest)))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lr": -1}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        ({"lr": "fast"}, "lr"),
    ],
)
def test_wrong_options_are_one_clear_error(options, key):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"sgd": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.sgd\.{key}"):
        make_options(recipe, "sgd", SGD)

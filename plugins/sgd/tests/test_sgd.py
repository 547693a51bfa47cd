import copy
import math
from functools import partial

import pytest
import torch

from trainkit.session import fit
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_sgd import SGD

USUAL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
CHANNELS_LAST = watch(transform_model=lambda model: model.to(memory_format=torch.channels_last))


def torchs(params, **options):
    """torch's optimizer as a plain loop over parameters."""
    return torch.optim.SGD(params, **options, foreach=False, fused=False)


def plain(**options):
    return watch(optimizer=lambda params: torchs(params, **options))


@pytest.mark.parametrize(
    "options",
    [
        USUAL,
        {"lr": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.7},
        {"lr": 0.0, "momentum": 0.9},
    ],
)
def test_trains_as_torchs_plain_loop(options):
    ours = parameters_of(run_steps({"sgd": SGD(**options)}, steps=6))
    expected = parameters_of(run_steps({"plain": plain(**options)}, steps=6))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_form_computes_what_the_plain_one_does(dtype):
    results = []
    for make in (SGD(**USUAL).optimizer, partial(torchs, **USUAL)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (1, 7, 1000)]
        optimizer = make(params=params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((bool(optimizer.defaults["fused"]), [p.detach() for p in params]))
    (fused, ours), (not_fused, expected) = results
    assert fused is (dtype != torch.bfloat16)
    assert not not_fused
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, expected, **tolerance)


def test_fused_form_is_right_in_channels_last_memory():
    ours = run_steps({"format": CHANNELS_LAST, "sgd": SGD(**USUAL)}, steps=4)
    expected = run_steps({"format": CHANNELS_LAST, "plain": plain(**USUAL)}, steps=4)
    assert not ours.model[0].weight.is_contiguous()
    torch.testing.assert_close(parameters_of(ours), parameters_of(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [USUAL, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}])
def test_a_first_step_that_a_gradient_scaler_leaves_out_leaves_nothing_behind(options):
    param = torch.nn.Parameter(torch.randn(1000))
    other = torch.nn.Parameter(param.detach().clone())
    optimizer, expected = SGD(**options).optimizer([param]), torchs([other], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (math.inf, 1.0, 2.0):
        gradient = torch.full((1000,), value)
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(value):
            other.grad = gradient
            expected.step()
        optimizer.zero_grad()
    torch.testing.assert_close(param, other)


@pytest.mark.parametrize("saved_in", [{}, {"format": CHANNELS_LAST}], ids=["contiguous", "channels_last"])
def test_a_state_of_another_memory_format_means_the_same(saved_in, tmp_path):
    """torch's fused kernels read the running sums in the order in which they lie in memory."""
    state = run_steps({**saved_in, "sgd": SGD(**USUAL)}, steps=2).state_dict()
    results = []
    for fused in (True, False):
        other = {} if saved_in else {"format": CHANNELS_LAST}
        plugins = {**other, "sgd": SGD(**USUAL)}
        run = build_run(plugins, epochs=1000, max_steps=4)
        run.load_state_dict(copy.deepcopy(state))
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


def test_wrong_options_are_one_clear_error():
    assert_refuses(SGD, "lr", -1, "fast")
    assert_refuses(SGD, "momentum", -0.1)
    assert_refuses(SGD, "weight_decay", -1)
    assert_refuses(SGD, "nesterov", True)
    assert_refuses(SGD, "nesterov", True, momentum=0.9, dampening=0.1)

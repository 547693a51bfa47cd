from functools import partial

import pytest
import torch

from trainkit.testing import assert_refuses, from_recipe, parameters_of, run_steps, watch
from trainkit_adamw import AdamW

USUAL = {"lr": 0.01, "weight_decay": 0.05}
CHANNELS_LAST = watch(transform_model=lambda model: model.to(memory_format=torch.channels_last))


def torchs(params, **options):
    """torch's optimizer as a plain loop over parameters."""
    return torch.optim.AdamW(params, **options, foreach=False, fused=False)


def plain(**options):
    return watch(optimizer=lambda params: torchs(params, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.05, "betas": (0.0, 0.0)},
        {"weight_decay": 0.1},
        {"lr": 0.05, "betas": (0.5, 0.5), "amsgrad": True},
    ],
)
def test_trains_as_torchs_plain_loop(options):
    # a large eps: without it the sign of gradients that are almost 0, which is rounding, decides
    options = {"lr": 0.01, "eps": 1e-3, **options}
    ours = parameters_of(run_steps({"adamw": AdamW(**options)}, steps=6))
    expected = parameters_of(run_steps({"plain": plain(**options)}, steps=6))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_form_computes_what_the_plain_one_does(dtype):
    results = []
    for make in (AdamW(**USUAL).optimizer, partial(torchs, **USUAL)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (1, 7, 1000)]
        optimizer = make(params=params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((bool(optimizer.defaults["fused"]), [p.detach() for p in params]))
    (fused, ours), (not_fused, expected) = results
    assert fused
    assert not not_fused
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, expected, **tolerance)


def test_fused_form_is_right_in_channels_last_memory():
    ours = run_steps({"format": CHANNELS_LAST, "adamw": AdamW(**USUAL)}, steps=4)
    expected = run_steps({"format": CHANNELS_LAST, "plain": plain(**USUAL)}, steps=4)
    assert not ours.model[0].weight.is_contiguous()
    torch.testing.assert_close(parameters_of(ours), parameters_of(expected), rtol=1e-4, atol=1e-5)


def test_no_fused_form_where_torch_has_none():
    assert not AdamW().optimizer([torch.nn.Parameter(torch.zeros(2, device="meta"))]).defaults["fused"]
    assert not AdamW().optimizer([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]).defaults["fused"]


def test_decay_is_apart_from_the_gradient():
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).optimizer([weight])
    weight.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0, -3.0]) * (1 - 0.1 * 0.5))


def test_defaults_are_torchs():
    (ours,) = AdamW().optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    (torchs,) = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).param_groups
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert ours[key] == torchs[key]


def test_wrong_options_are_one_clear_error():
    assert_refuses(AdamW, "lr", -1, "fast")
    assert_refuses(AdamW, "betas", [0.9, 1.0], [-0.1, 0.9], [0.9])
    assert_refuses(AdamW, "eps", -1e-8)
    assert_refuses(AdamW, "weight_decay", -1)


def test_betas_of_a_recipe_are_a_pair_of_numbers():
    assert from_recipe(AdamW, betas=[0, 0.99]).betas == (0.0, 0.99)

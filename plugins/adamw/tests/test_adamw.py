import io
from typing import Any

import pytest
import torch

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict, make_options
from trainkit.session import fit
from trainkit.testing import build_run, parameters_of, run_steps
from trainkit_adamw import AdamW

USUAL = {"lr": 0.01, "weight_decay": 0.05}


@plugin
class Plain:
    """torch's optimizer as a plain loop over parameters."""

    options: dict

    @hookimpl
    def optimizer(self, params):
        return torch.optim.AdamW(params, **self.options, foreach=False, fused=False)


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
        {},
        {"lr": 0.05},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"weight_decay": 0.1},
        {"lr": 0.05, "betas": (0.5, 0.5), "amsgrad": True},
    ],
)
def test_trains_as_torchs_plain_loop(options):
    # a large eps: without it the sign of gradients that are almost 0, which is rounding, decides
    options = {"lr": 0.01, "eps": 1e-3, **options}
    ours = parameters_of(run_steps({"adamw": AdamW(**options)}, steps=6))
    plain = parameters_of(run_steps({"plain": Plain(options=options)}, steps=6))
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_form_computes_what_the_plain_one_does(dtype):
    results = []
    for make in (AdamW(**USUAL).optimizer, Plain(options=USUAL).optimizer):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (1, 7, 1000)]
        optimizer = make(params=params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((bool(optimizer.defaults["fused"]), [p.detach() for p in params]))
    (fused, ours), (not_fused, plain) = results
    assert fused
    assert not not_fused
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, plain, **tolerance)


def test_fused_form_is_right_in_channels_last_memory():
    ours = run_steps({"format": ChannelsLast(), "adamw": AdamW(**USUAL)}, steps=4)
    plain = run_steps({"format": ChannelsLast(), "plain": Plain(options=USUAL)}, steps=4)
    assert not ours.model[0].weight.is_contiguous()
    torch.testing.assert_close(parameters_of(ours), parameters_of(plain), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("model", [{}, {"format": ChannelsLast()}], ids=["contiguous", "channels_last"])
def test_continues_exactly_from_a_checkpoint_within_an_epoch(model, tmp_path):
    file = io.BytesIO()
    whole = run_steps({**model, "adamw": AdamW(**USUAL), "save": Save(step=6, file=file)}, steps=10)
    file.seek(0)
    rest = build_run({**model, "adamw": AdamW(**USUAL), "save": Save(step=-1, file=file)}, epochs=1000, max_steps=10)
    rest.load_state_dict(torch.load(file, weights_only=True))
    assert rest.batch_index == 2
    fit(rest, tmp_path / "run")
    assert all(map(torch.equal, parameters_of(whole), parameters_of(rest)))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lr": -1}, "lr"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"betas": [-0.1, 0.9]}, "betas"),
        ({"betas": [0.9]}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"lr": "fast"}, "lr"),
    ],
)
def test_wrong_options_are_one_clear_error(options, key):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"adamw": options}})
    with pytest.raises(RecipeError, match=rf"plugins\.adamw\.{key}"):
        make_options(recipe, "adamw", AdamW)


def test_betas_of_a_recipe_are_a_pair_of_numbers():
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"adamw": {"betas": [0, 0.99]}}})
    assert make_options(recipe, "adamw", AdamW).betas == (0.0, 0.99)

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_lookahead import Lookahead
from trainkit_muon import Muon, orthogonalized
from trainkit_one_cycle_lr import OneCycleLR
from trainkit_parameter_groups import Group, ParameterGroups
from trainkit_weight_decay_groups import WeightDecayGroups


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_it_keeps_the_singular_vectors_and_makes_the_values_about_one(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator, dtype=torch.float64), full_matrices=False
    )
    values = torch.rand(min(rows, columns), generator=generator, dtype=torch.float64) * 0.9 + 0.1  # condition up to 10
    found = u.T @ orthogonalized(5 * u @ values.diag() @ v, 5, 1e-7) @ v.T
    assert torch.allclose(found, found.diag().diag(), atol=1e-9)  # the polar factor of the SVD would be the identity
    assert ((found.diag() > 0.65) & (found.diag() < 1.25)).all()


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalized(torch.zeros(3, 5), 5, 1e-7), torch.zeros(3, 5))


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_matrices_are_trained_as_by_torchs_muon(adjust_lr_fn, nesterov, shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's iterations in float32
    options = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours, torchs = Muon(matrices=True, **options).optimizer([mine]), torch.optim.Muon([theirs], **options)
    for _ in range(5):
        theirs.grad = torch.randn(shape)
        mine.grad = theirs.grad.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_convolution_is_trained_as_the_matrix_of_its_filters():
    torch.manual_seed(0)
    conv = nn.Parameter(torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(conv.detach().flatten(1).clone())
    plugin = Muon(matrices=True, momentum=0.8)
    one, other = plugin.optimizer([conv]), plugin.optimizer([matrix])
    for _ in range(3):
        matrix.grad = torch.randn(5, 12)
        conv.grad = matrix.grad.view(5, 3, 2, 2).to(memory_format=torch.channels_last)
        one.step()
        other.step()
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-6)
    assert conv.is_contiguous(memory_format=torch.channels_last)


def test_all_other_parameters_are_trained_as_by_torchs_sgd():
    def frozen_filters(params):
        ours = Muon(lr=0.0, sgd_lr=0.1, sgd_momentum=0.8, sgd_weight_decay=0.02).optimizer(params)
        assert [p.ndim for p in ours.param_groups[0]["params"]] == [4]
        return ours

    def torchs(params):
        return torch.optim.SGD(
            [{"params": params[:1], "lr": 0.0, "weight_decay": 0.0}, {"params": params[1:]}],
            lr=0.1,
            momentum=0.8,
            weight_decay=0.02,
            nesterov=True,
        )

    ours, theirs = (run_steps({"optimizer": watch(optimizer=make)}, steps=6) for make in (frozen_filters, torchs))
    assert all(
        torch.allclose(*pair, atol=1e-6) for pair in zip(parameters_of(ours), parameters_of(theirs), strict=True)
    )


def test_a_shared_kernel_is_updated_once_and_one_without_gradient_not_at_all():
    def tied():
        convs = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)]
        convs[1].weight = convs[0].weight
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(192, 4))

    freeze = watch(train_start=lambda run: run.model[2].weight.requires_grad_(False))
    listed = {"tied": watch(model=tied), "muon": Muon(lr=0.1), "freeze": freeze}
    before, run = build_run(listed), run_steps(listed, steps=1)
    filters = run.optimizer.param_groups[0]["params"]
    assert [p.shape for p in filters] == [(3, 3, 3, 3)] * 2
    change = (run.model[0].weight - before.model[0].weight).detach().flatten(1)
    assert 0.05 < torch.linalg.matrix_norm(change, 2) < 0.13  # of one step; two would have twice the length
    assert torch.equal(run.model[2].weight, before.model[2].weight)


def test_its_state_continues_exactly():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(4))]
    copied = [nn.Parameter(p.detach().clone()) for p in params]
    ours = Muon(momentum=0.7).optimizer(params)

    def step(optimizer, params, seed):
        for number, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + number))
        optimizer.step()

    step(ours, params, 0)
    for p, q in zip(params, copied, strict=True):
        q.data.copy_(p)
    other = Muon().optimizer(copied)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer, held in ((ours, params), (other, copied)):
        step(optimizer, held, 7)
    assert all(map(torch.equal, params, copied))


def test_schedules_and_groups_keep_the_proportion_of_its_rates():
    slow = ParameterGroups(groups=[Group(parameters=["0.weight"], lr_scale=0.5)])
    listed = {
        "muon": Muon(lr=0.02, sgd_lr=0.2, sgd_weight_decay=0.1),
        "slow": slow,
        "weight_decay_groups": WeightDecayGroups(),
        "lookahead": Lookahead(),
    }
    run = run_steps({**listed, "one_cycle_lr": OneCycleLR(max_lr=0.04, cycle_momentum=False)}, steps=4)
    groups = run.optimizer.param_groups
    assert [(group["orthogonalize"], group["weight_decay"]) for group in groups] == [
        (True, 0),
        (False, 0.1),
        (False, 0),
    ]
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1, 20, 20])


def test_a_network_without_filters_is_an_error():
    linear = watch(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(RecipeError, match="'matrices': the network has no convolutions to train; set matrices: true"):
        build_run({"linear": linear, "muon": Muon()})
    build_run({"linear": linear, "muon": Muon(matrices=True)})


def test_impossible_options_are_refused():
    for key, value in {"lr": -1, "momentum": 1, "ns_steps": 0, "eps": 0, "weight_decay": -1}.items():
        assert_refuses(Muon, key, value)
    for key, value in {"sgd_lr": -1, "sgd_momentum": 0, "sgd_weight_decay": -1, "adjust_lr_fn": "none"}.items():
        assert_refuses(Muon, key, value)

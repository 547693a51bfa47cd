import pytest
import torch
from torch import nn

from trainkit import Schedule
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, from_recipe, parameters_of, run_steps, watch
from trainkit_lookahead import Lookahead
from trainkit_one_cycle_lr import OneCycleLR
from trainkit_parameter_groups import ParameterGroups
from trainkit_weight_decay_groups import WeightDecayGroups

# The default network: 0.weight is a convolution, 1.* a batch norm, 5.* a linear layer.
BIASES = {"parameters": ["1.bias"], "lr_scale": 64, "weight_decay": 0.01}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3)


def plugins(*groups, make=sgd):
    chosen = from_recipe(ParameterGroups, groups=list(groups))
    return {"optimizer": watch(optimizer=lambda run, params: make(params)), "parameter_groups": chosen}


def groups(run):
    """Return the names of the parameters of each group, its rate and its weight decay."""
    names = {p: name for name, p in run.model.named_parameters()}
    found = run.optimizer.param_groups
    return [([names[p] for p in g["params"]], pytest.approx(g["lr"]), g.get("weight_decay")) for g in found]


def test_matched_parameters_have_their_own_rate_and_decay():
    head = {"parameters": ["5.*", "0.w*"], "lr_scale": 0.5}
    run = build_run(plugins(BIASES, head))
    assert groups(run) == [
        (["1.weight"], 0.1, 0.3),
        (["1.bias"], 6.4, 0.01),
        (["0.weight", "5.weight", "5.bias"], 0.05, 0.3),
    ]
    assert all(g["momentum"] == 0.9 and g["nesterov"] for g in run.optimizer.param_groups)


def test_it_trains_as_an_optimizer_that_is_given_the_groups():
    def by_hand(params):
        conv, scale, bias, *head = params
        others = {"params": [conv, scale, *head]}
        return sgd([others, {"params": [bias], "lr": 0.1 * 0.2, "weight_decay": 0.01}])

    ours = run_steps(plugins({**BIASES, "lr_scale": 0.2}), steps=6)
    theirs = run_steps({"optimizer": watch(optimizer=by_hand)}, steps=6)
    assert all(map(torch.equal, parameters_of(ours), parameters_of(theirs)))


def test_the_first_group_that_matches_a_parameter_has_it():
    run = build_run(plugins(BIASES, {"parameters": ["*.bias"], "lr_scale": 2}))
    assert groups(run)[1:] == [(["1.bias"], 6.4, 0.01), (["5.bias"], 0.2, 0.3)]


def test_a_group_of_all_parameters_changes_the_only_group():
    run = build_run(plugins({"parameters": ["*"], "lr_scale": 3}))
    assert [(rate, decay) for _, rate, decay in groups(run)] == [(pytest.approx(0.3), 0.3)]


def test_a_shared_kernel_is_found_by_any_of_its_names_and_belongs_to_one_group():
    def tied():
        convs = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)]
        convs[1].weight = convs[0].weight
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(192, 4))

    run = build_run({"tied": watch(model=tied), **plugins({"parameters": ["1.weight"], "lr_scale": 0.5})})
    assert groups(run) == [(["3.weight", "3.bias"], 0.1, 0.3), (["0.weight"], 0.05, 0.3)]


def test_weight_decay_groups_takes_the_decay_of_what_it_regrouped_and_keeps_the_rates():
    listed = plugins({"parameters": ["1.*"], "lr_scale": 64})
    run = build_run({**listed, "weight_decay_groups": WeightDecayGroups()})
    assert groups(run) == [
        (["0.weight", "5.weight"], 0.1, 0.3),
        (["1.weight", "1.bias"], 6.4, 0.0),
        (["5.bias"], 0.1, 0.0),
    ]


def halved(optimizer):
    return Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "step")


@pytest.mark.parametrize("schedule", [watch(scheduler=halved), OneCycleLR(max_lr=0.4)], ids=["factor", "one cycle"])
def test_schedules_keep_the_proportions_also_of_a_wrapped_optimizer(schedule):
    run = run_steps({**plugins(BIASES), "lookahead": Lookahead(), "schedule": schedule}, steps=3)
    rates = [g["lr"] for g in run.optimizer.param_groups]
    assert rates[1] == pytest.approx(64 * rates[0])
    assert rates[0] != 0.1


def test_what_matches_nothing_is_an_error_that_names_the_pattern():
    with pytest.raises(RecipeError, match=r"'groups\[1\]\.parameters': '5\.weigth' matches no .*mean '5\.weight'"):
        build_run(plugins(BIASES, {"parameters": ["5.weigth"], "lr_scale": 2}))
    with pytest.raises(RecipeError, match=r"'groups\[1\]\.parameters': earlier groups have all .* 1\.b\* matches"):
        build_run(plugins(BIASES, {"parameters": ["1.b*"], "lr_scale": 2}))


def test_an_optimizer_without_weight_decay_is_an_error():
    with pytest.raises(RecipeError, match="LBFGS has no weight decay; leave weight_decay out"):
        build_run(plugins({"parameters": ["*"], "weight_decay": 0.1}, make=torch.optim.LBFGS))


def test_wrong_groups_are_refused():
    assert_refuses(ParameterGroups, "groups", [], [{"parameters": [], "lr_scale": 2}], [{"parameters": ["*"]}])
    assert_refuses(ParameterGroups, "groups", [{"parameters": ["*"], "lr_scale": 0}])
    assert_refuses(ParameterGroups, "groups", [{"parameters": ["*"], "weight_decay": -1}])
    assert_refuses(ParameterGroups, "groups", [{"parameters": ["*"], "lr": 1}])

import pytest
import timm
import timm.optim
import torch
from torch import nn

from trainkit import Schedule
from trainkit.errors import PluginError, RecipeError
from trainkit.testing import assert_refuses, build_run, fake_data, parameters_of, run_steps, watch
from trainkit_layer_decay import LayerDecay
from trainkit_lookahead import Lookahead
from trainkit_one_cycle_lr import OneCycleLR
from trainkit_resnet import ResNet
from trainkit_weight_decay_groups import WeightDecayGroups

RESNET = {"stem": 4, "blocks": [1, 2], "channels": [4, 4]}


def adamw(lr=0.1):
    return watch(optimizer=lambda run, params: torch.optim.AdamW(params, lr=lr, weight_decay=0.3))


def settings_of(run):
    """Return learning rate and weight decay of each parameter, by name."""
    names = {p: name for name, p in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def rates_of(run):
    return {name: rate for name, (rate, _) in settings_of(run).items()}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_learning_rates_and_weight_decays_are_those_of_timm(name):
    kwargs = {"num_classes": 4, **({"img_size": 32} if "vit" in name else {})}
    images = watch(data=lambda: fake_data(size=32), model=lambda: timm.create_model(name, **kwargs))
    plugins = {"images": images, "adamw": adamw(), "decay": LayerDecay(decay=0.6), "groups": WeightDecayGroups()}
    run = build_run(plugins)
    theirs = timm.optim.param_groups_layer_decay(run.model, weight_decay=0.3, layer_decay=0.6)
    names = {p: name for name, p in run.model.named_parameters()}
    expected = {names[p]: (0.1 * g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    found = settings_of(run)
    assert found.keys() == expected.keys()
    assert len({rate for rate, _ in found.values()}) > 4
    for parameter, (rate, decay) in expected.items():
        assert found[parameter] == (pytest.approx(rate), decay)


def test_each_block_is_a_layer_and_a_normalization_is_of_the_layer_before_it():
    run = build_run({"resnet": ResNet(**RESNET), "adamw": adamw(), "decay": LayerDecay(decay=0.5)})
    layers = ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "fc"]
    for name, rate in rates_of(run).items():
        (layer,) = (number for number, prefix in enumerate(layers) if name.startswith(f"{prefix}."))
        assert rate == 0.1 * 0.5 ** (4 - layer)


class Tokens(nn.Module):
    """A network with a parameter of its own, two layers that share a kernel, and a normalization before all layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.flatten = nn.Flatten()
        self.first, self.second, self.head = nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 4)
        self.second.weight = self.first.weight
        self.token = nn.Parameter(torch.zeros(192))

    def forward(self, x):
        return self.head(self.second(self.first(self.flatten(self.norm(x)) + self.token)))


def test_what_is_of_no_layer_or_of_several_is_of_the_first():
    run = build_run({"network": watch(model=Tokens), "adamw": adamw(), "decay": LayerDecay(decay=0.5)})
    first, second, head = ["token", "norm.weight", "norm.bias", "first.weight", "first.bias"], ["second.bias"], "head."
    assert rates_of(run) == {
        **dict.fromkeys(first, 0.025),
        **dict.fromkeys(second, 0.05),
        **dict.fromkeys([head + "weight", head + "bias"], 0.1),
    }


def test_layers_may_be_named():
    groups = [["stem.*"], ["stages.1.0.*", "stages.0.*"], ["*"]]
    run = build_run({"resnet": ResNet(**RESNET), "adamw": adamw(), "decay": LayerDecay(decay=0.5, groups=groups)})
    for name, rate in rates_of(run).items():
        part = 0.25 if name.startswith("stem") else 0.5 if name.startswith(("stages.0", "stages.1.0")) else 1.0
        assert rate == 0.1 * part


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_trains_as_an_optimizer_that_is_given_the_groups(optimizer):
    def made(params):
        if optimizer == "adamw":
            return torch.optim.AdamW(params, lr=0.1)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)

    def by_hand(run, params):  # the default network: convolution, batch normalization, linear layer
        early, late = [p for p in params if len(p) == 8], [p for p in params if len(p) == 4]
        return made([{"params": late}, {"params": early, "lr": 0.1 * 0.5}])

    ours = run_steps({"optimizer": watch(optimizer=made), "decay": LayerDecay(decay=0.5)}, steps=6)
    theirs = run_steps({"optimizer": watch(optimizer=by_hand)}, steps=6)
    assert all(map(torch.equal, parameters_of(ours), parameters_of(theirs)))


@pytest.mark.parametrize(
    "order", [("decay", "groups", "slow"), ("groups", "decay", "slow"), ("slow", "groups", "decay")]
)
def test_order_beside_weight_decay_groups_and_a_wrapper_does_not_matter(order):
    plugins = {"decay": LayerDecay(decay=0.5), "groups": WeightDecayGroups(), "slow": Lookahead(k=2)}
    run = run_steps({"adamw": adamw(), **{name: plugins[name] for name in order}}, steps=3)
    assert settings_of(run) == {
        "0.weight": (0.05, 0.3),
        "1.weight": (0.05, 0.0),
        "1.bias": (0.05, 0.0),
        "5.weight": (0.1, 0.3),
        "5.bias": (0.1, 0.0),
    }
    assert run.history[-1]["lr"] == 0.1


def test_schedulers_scale_every_layer():
    halve = watch(scheduler=lambda optimizer: Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "step"))
    run = run_steps({"adamw": adamw(), "decay": LayerDecay(decay=0.5), "halve": halve}, steps=2)
    assert rates_of(run)["0.weight"] == 0.0125
    assert rates_of(run)["5.weight"] == 0.025


def test_a_schedule_that_gives_all_groups_one_learning_rate_is_refused():
    with pytest.raises(PluginError, match="'layer_decay' cannot run beside plugin 'one_cycle_lr'"):
        build_run({"adamw": adamw(), "layer_decay": LayerDecay(), "one_cycle_lr": OneCycleLR(max_lr=0.1)})


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([["0.*"], ["5.weigth"]], r"'groups': '5.weigth' matches no parameter; did you mean '5.weight'"),
        ([["0.*"], ["1.*"]], r"'groups': 5.weight is of no layer; name it, or end with .* \['\*'\]"),
        ([["*"]], "all parameters are of one layer.*name layers in 'groups'"),
    ],
)
def test_layers_that_do_not_fit_the_network_are_an_error(groups, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"decay": LayerDecay(groups=groups)})


def test_decay_must_be_a_part():
    assert_refuses(LayerDecay, "decay", 0, 1.1, -0.5, float("nan"))

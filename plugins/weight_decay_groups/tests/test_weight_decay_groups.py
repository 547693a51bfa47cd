import pytest
import torch

from trainkit import Schedule
from trainkit.errors import RecipeError
from trainkit.testing import build_run, parameters_of, run_steps, watch
from trainkit_weight_decay_groups import WeightDecayGroups

# The default network: 0.weight is a convolution, 1.* a batch norm, 5.* a linear layer.
MATRICES, VECTORS = ["0.weight", "5.weight"], ["1.weight", "1.bias", "5.bias"]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.3),
}


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer, as Lookahead does, with shared groups and slow weights that begin at the first step."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state
        self.slow = None

    @torch.no_grad()
    def step(self, closure=None):
        fast = [p for group in self.param_groups for p in group["params"]]
        self.slow = self.slow or [p.clone() for p in fast]
        self.base.step(closure)
        for slow, p in zip(self.slow, fast, strict=True):
            p.copy_(slow.lerp_(p, 0.5))


def made_by(make):
    return watch(optimizer=lambda run, params: make(params))


def plugins(make=OPTIMIZERS["sgd"], skip=()):
    return {"optimizer": made_by(make), "weight_decay_groups": WeightDecayGroups(skip=list(skip))}


def groups(run):
    """Return the names of the parameters of each group and its weight decay."""
    names = {p: name for name, p in run.model.named_parameters()}
    return [([names[p] for p in g["params"]], g["weight_decay"]) for g in run.optimizer.param_groups]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_vectors_go_to_a_group_without_decay_that_is_else_the_same(kind):
    plain, run = build_run({"optimizer": made_by(OPTIMIZERS[kind])}), build_run(plugins(OPTIMIZERS[kind]))
    assert groups(run) == [(MATRICES, 0.3), (VECTORS, 0.0)]
    assert type(run.optimizer) is type(plain.optimizer)
    (whole,) = plain.optimizer.param_groups
    for group in run.optimizer.param_groups:
        assert {**group, "params": None, "weight_decay": None} == {**whole, "params": None, "weight_decay": None}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_as_an_optimizer_that_is_given_two_groups(kind):
    def two_groups(params):
        matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
        return OPTIMIZERS[kind]([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    ours = run_steps(plugins(OPTIMIZERS[kind]), steps=6)
    by_hand = run_steps({"optimizer": made_by(two_groups)}, steps=6)
    assert all(map(torch.equal, parameters_of(ours), parameters_of(by_hand)))


@pytest.mark.parametrize(
    ("skip", "spared"),
    [
        (["5.weight"], ["5.weight"]),
        (["5.*"], ["5.weight"]),
        (["0.*", "*.weight"], ["0.weight", "5.weight"]),
        (["1.bias"], []),
    ],
)
def test_named_parameters_are_spared_too(skip, spared):
    run = build_run(plugins(skip=skip))
    order = [name for name, _ in run.model.named_parameters()]
    expected = [name for name in order if name in VECTORS or name in spared]
    rest = [name for name in order if name not in expected]
    assert groups(run) == ([(rest, 0.3), (expected, 0.0)] if rest else [(expected, 0.0)])


def test_a_shared_parameter_is_found_by_any_of_its_names():
    def tied():
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), *[torch.nn.Linear(4, 4)] * 2)
        model[3] = torch.nn.Linear(4, 4, bias=False)
        model[3].weight = model[2].weight
        return model

    run = build_run({"tied": watch(model=tied), **plugins(skip=["3.weight"])})
    assert groups(run) == [(["1.weight"], 0.3), (["1.bias", "2.weight", "2.bias"], 0.0)]


def test_each_group_is_split_and_one_without_decay_is_left_alone():
    def three_groups(p):  # in the model's order: 0.weight, 1.weight, 1.bias, 5.weight, 5.bias
        return torch.optim.SGD(
            [{"params": p[:2], "lr": 0.5}, {"params": p[2:3]}, {"params": p[3:], "weight_decay": 0.0}],
            lr=0.1,
            weight_decay=0.3,
        )

    run = build_run(plugins(three_groups))
    assert groups(run) == [
        (["0.weight"], 0.3),
        (["1.bias"], 0.0),
        (["5.weight", "5.bias"], 0.0),
        (["1.weight"], 0.0),
    ]
    assert [g["lr"] for g in run.optimizer.param_groups] == [0.5, 0.1, 0.1, 0.5]


@pytest.mark.parametrize("first", ["slow", "weight_decay_groups"])
def test_it_may_be_listed_on_either_side_of_a_wrapper(first):
    listed = {**plugins(), "slow": watch(transform_optimizer=lambda run, optimizer: Wrapper(optimizer))}
    order = sorted(listed, key=lambda name: (name != "optimizer", name != first))
    run = run_steps({name: listed[name] for name in order}, steps=5)
    assert groups(run) == [(MATRICES, 0.3), (VECTORS, 0.0)]
    other = run_steps({**plugins(), "slow": listed["slow"]}, steps=5)
    assert all(map(torch.equal, parameters_of(run), parameters_of(other)))


def test_schedulers_move_both_groups():
    halve = watch(scheduler=lambda optimizer: Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "step"))
    run = run_steps({**plugins(), "halve": halve}, steps=2)
    assert [g["lr"] for g in run.optimizer.param_groups] == [0.025, 0.025]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(RecipeError, match=r"'skip': '5\.weigth' matches no parameter; did you mean '5\.weight'"):
        build_run(plugins(skip=["0.*", "5.weigth"]))


def test_no_decay_to_take_away_is_an_error():
    with pytest.raises(RecipeError, match="no weight decay to take away"):
        build_run(plugins(lambda p: torch.optim.SGD(p, lr=0.1)))


def test_a_network_of_matrices_alone_has_nothing_to_regroup():
    network = watch(model=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4, bias=False)))
    decayed = plugins(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3))
    with pytest.raises(RecipeError, match="no weight decay to take away"):
        build_run({"network": network, **decayed})

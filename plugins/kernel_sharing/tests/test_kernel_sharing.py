import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_kernel_sharing import KernelSharing


def stage(*convs):
    return nn.Sequential(*(nn.Conv2d(*args, **kwargs) for args, kwargs in convs))


def three(in_channels=3):
    """Return a stage of which the last three convolutions are isomorphic."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))


def network():
    return nn.Sequential(three(), three(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Lines:
    def __init__(self):
        self.console, self.lines = self, []

    def print(self, line, **_):
        self.lines.append(line)


def share(model, *within):
    run = Lines()
    assert KernelSharing(within=list(within)).transform_model(run, model) is model
    return run.lines


def kernels(model):
    return len({conv.weight for conv in model.modules() if isinstance(conv, nn.Conv2d)})


def is_tied(model, path="0"):
    convs = model.get_submodule(path)
    return convs[1].weight is convs[2].weight is convs[3].weight and convs[0].weight is not convs[1].weight


def test_isomorphic_convolutions_share_the_first_kernel_and_keep_their_biases():
    model = network()
    first, biases = model[0][1].weight, [conv.bias for conv in model[0]]
    values = sum(p.numel() for p in model.parameters())
    lines = share(model, "0")
    assert all(conv.weight is first for conv in model[0][1:])
    assert [conv.bias for conv in model[0]] == biases
    assert sum(p.numel() for p in model.parameters()) == values - 2 * 4 * 4 * 9
    assert kernels(model[1]) == 4
    assert lines == ["kernel_sharing: 0: 3 convolutions 4->4 3x3 share one kernel (288 fewer parameters)"]


def test_matched_modules_share_nothing_with_each_other():
    model = network()
    assert len(share(model, "?")) == 2
    assert is_tied(model, "0")
    assert model[0][1].weight is not model[1][1].weight
    assert kernels(model) == 3  # the second stage's first convolution is isomorphic to the others


@settings(max_examples=20)
@given(
    st.lists(st.tuples(*[st.sampled_from([2, 4])] * 2, st.sampled_from([1, 3]), st.sampled_from([1, 2])), min_size=2)
)
def test_exactly_the_isomorphic_ones_share(kinds):
    model = nn.Sequential(stage(*((kind[:3], {"groups": kind[3]}) for kind in kinds)))
    if len(set(kinds)) == len(kinds):
        with pytest.raises(RecipeError, match="nothing to share"):
            share(model, "0")
        return
    share(model, "0")
    for a, kind in zip(model[0], kinds, strict=True):
        for b, other in zip(model[0], kinds, strict=True):
            assert (a.weight is b.weight) == (kind == other)


def test_strides_and_dilations_may_differ_and_groups_may_be_several():
    strided = [
        ((4, 4, 3), {"stride": 2}),
        ((4, 4, 3), {"dilation": 2}),
        ((4, 4, 3), {}),
        ((4, 2, 1), {}),
        ((4, 2, 1), {}),
    ]
    model = nn.Sequential(stage(*strided))
    lines = share(model, "0")
    assert [line.split(" share")[0] for line in lines] == [
        "kernel_sharing: 0: 3 convolutions 4->4 3x3",
        "kernel_sharing: 0: 2 convolutions 4->2 1x1",
    ]


def test_the_gradient_is_the_sum_over_all_uses():
    free = network().double()
    with torch.no_grad():
        for conv in free[0][2:]:
            conv.weight.copy_(free[0][1].weight)
    tied = copy.deepcopy(free)
    share(tied, "0")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(tied(x), free(x))
    tied(x).sum().backward()
    free(x).sum().backward()
    torch.testing.assert_close(tied[0][1].weight.grad, sum(conv.weight.grad for conv in free[0][1:]))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.to(torch.float64),
        lambda model: model.to(memory_format=torch.channels_last),
        pytest.param(
            lambda model: model.to("cuda"),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_the_kernel_stays_shared_when_the_network_is_moved_or_copied(change):
    model = network()
    share(model, "0")
    assert is_tied(change(model))


def test_the_kernel_stays_shared_through_a_saved_state():
    source, target = network(), network()
    share(source, "0")
    share(target, "0")
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert is_tied(target)
    assert torch.equal(target[0][1].weight, source[0][1].weight)
    assert list(source.state_dict()) == list(network().state_dict())


def test_a_run_trains_the_kernel_once_and_keeps_it_shared():
    plugins = {"model": watch(model=network), "kernel_sharing": KernelSharing(within=["0"])}
    start = build_run(plugins).model[0][1].weight.detach().clone()
    run = run_steps(plugins, steps=2)
    assert is_tied(run.model)
    optimized = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert sum(p is run.model[0][1].weight for p in optimized) == 1
    assert not torch.equal(run.model[0][1].weight, start)


def test_a_pattern_without_a_match_is_named_with_what_is_near():
    model = nn.ModuleDict({"stages": nn.Sequential(three(), three())})
    with pytest.raises(RecipeError, match=r"'stages\.2' matches no module.*'stages\.1'"):
        share(model, "stages.2")


@pytest.mark.parametrize("within", [["2"], ["0", "0"], ["0.*"]])
def test_a_pattern_that_shares_nothing_is_an_error(within):
    with pytest.raises(RecipeError, match="nothing to share within"):
        share(network(), *within)


def test_within_must_not_be_empty():
    assert_refuses(KernelSharing, "within", [])

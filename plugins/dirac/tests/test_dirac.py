import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, watch
from trainkit_dirac import Dirac


def start(conv, **options):
    """Return the convolution as a run starts with it, and a copy from before."""
    before = conv.weight.detach().clone()
    network = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    run = build_run({"network": watch(model=lambda: network), "dirac": Dirac(**({"modules": ["1"]} | options))})
    return run.model[1], before


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.booleans())
def test_the_first_channels_pass_and_the_others_are_as_they_were(inputs, outputs, groups, size, channels_last):
    conv = nn.Conv2d(inputs * groups, outputs * groups, size, padding=size // 2, groups=groups, bias=False)
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    conv, before = start(conv)
    images = torch.rand(2, inputs * groups, 6, 7)
    passed, otherwise = conv(images).detach(), nn.functional.conv2d(images, before, padding=size // 2, groups=groups)
    same = min(inputs, outputs)
    for number in range(groups):
        first = number * outputs
        assert torch.equal(passed[:, first : first + same], images[:, number * inputs : number * inputs + same])
        rest = slice(first + same, first + outputs)
        assert torch.allclose(passed[:, rest], otherwise[:, rest], atol=1e-6)


def test_with_as_many_outputs_as_inputs_it_is_torchs_dirac():
    conv, _ = start(nn.Conv2d(6, 6, 3, padding=1))
    assert torch.equal(conv.weight, nn.init.dirac_(torch.empty(6, 6, 3, 3)))


def test_convolutions_within_a_matched_module_count_and_others_do_not():
    def network():
        block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
        return nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    run = build_run({"network": watch(model=network), "dirac": Dirac(modules=["1"])})
    plain = build_run({"network": watch(model=network)})
    assert torch.equal(run.model[0].weight, plain.model[0].weight)
    assert torch.equal(run.model[1][0].weight, nn.init.dirac_(torch.empty(4, 4, 3, 3)))
    assert torch.equal(run.model[1][1][0].weight.flatten(1), torch.eye(4))


def test_a_module_without_convolutions_is_an_error():
    with pytest.raises(RecipeError, match="'modules': there is no convolution in what '1' matches"):
        build_run({"dirac": Dirac(modules=["0", "1"])})


def test_patterns_are_needed():
    assert_refuses(Dirac, "modules", [], "0")

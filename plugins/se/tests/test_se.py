from types import SimpleNamespace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit import Map
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_se import SE, SqueezeExcitation


def insert(model, *after, shape=(3, 32, 32), **options):
    return SE(after=list(after), **options).transform_model(SimpleNamespace(image_shape=shape), model)


def paths_of_se(model):
    return [path for path, module in model.named_modules() if isinstance(module, SqueezeExcitation)]


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_with_bias_it_is_torchvisions_two_convolutions(n, channels, squeezed, size):
    theirs = torchvision.ops.SqueezeExcitation(channels, squeezed)
    ours = SqueezeExcitation(channels, squeezed, bias=True)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.view_as(mine))
    x = torch.randn(n, channels, size, size + 1)
    torch.testing.assert_close(ours(x), theirs(x))


def test_without_bias_it_is_equations_2_to_4():
    se = SqueezeExcitation(6, 2)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    w1, w2 = (w.detach().double() for w in se.parameters())
    for image, result in zip(x, se.double()(x), strict=True):
        squeezed = torch.stack([channel.sum() / 20 for channel in image])
        gate = 1 / (1 + torch.exp(-(w2 @ (w1 @ squeezed).clamp(min=0))))
        torch.testing.assert_close(result, torch.stack([s * c for s, c in zip(gate, image, strict=True)]))


def test_no_channels_last_map_is_computed_in_another_order():
    orders = []

    class Orders(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (2, 8, 6, 6) and 0 not in result.stride():
                orders.append((str(func), result.is_contiguous(memory_format=torch.channels_last)))
            return result

    x, gradient = (torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last) for _ in range(2))
    se = SqueezeExcitation(8, 2)
    with Orders():
        se(x.requires_grad_()).backward(gradient)
    assert len(orders) >= 3  # the scaled map, and both parts of the gradient
    assert all(kept for _, kept in orders), orders


def test_torchvisions_resnet18_gets_one_after_each_matched_module():
    model = torchvision.models.resnet18(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = sum(p.numel() for p in model.parameters())
    insert(model, "layer*.*.bn2")
    assert paths_of_se(model) == [f"layer{i}.{j}.bn2.se" for i in (1, 2, 3, 4) for j in (0, 1)]
    added = sum(2 * 2 * width * (width // 16) for width in (64, 128, 256, 512))  # two blocks, two layers each
    assert sum(p.numel() for p in model.parameters()) == values + added
    after = model.state_dict()
    assert {"layer1.0.bn2.module.weight", "layer1.0.bn2.se.fc1.weight", "layer1.0.bn2.se.fc2.weight"} <= set(after)
    for name, value in before.items():  # neither weights nor statistics of batch normalization changed
        assert torch.equal(after[name.replace("bn2.", "bn2.module.")], value)


def test_an_open_gate_leaves_the_network_what_it_was():
    model = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    insert(model, "layer*.*.bn2", bias=True)
    for path in paths_of_se(model):
        nn.init.constant_(model.get_submodule(path).fc2.bias, 1e9)  # sigmoid(1e9) = 1
    assert torch.equal(model.eval()(x), expected)


def test_it_comes_after_the_module_and_before_what_follows():
    model = insert(small(), "1", reduction=4)
    conv, bn, se = model[0], model[1].module, model[1].se
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), F.relu(se(bn(conv(x)))).mean((2, 3)))


def test_channels_of_any_module_are_found_and_patterns_may_overlap():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten()))
    insert(model, "0.1", "0", "?.0", "0.*", reduction=2)
    assert set(paths_of_se(model)) == {"0.se", "0.module.0.se", "0.module.1.se", "1.0.se"}
    assert model.get_submodule("1.0.se").fc1.in_features == 4
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4 * 30 * 30)


def test_a_star_stands_for_one_component():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), nn.ReLU())
    assert paths_of_se(insert(model, "*")) == ["0.se", "1.se"]


@pytest.mark.parametrize(("reduction", "squeezed"), [(1, 8), (3, 2), (8, 1)])
def test_reduction_divides_the_channels(reduction, squeezed):
    se = insert(small(), "2", reduction=reduction)[2].se
    assert (se.fc1.out_features, se.fc2.in_features, se.fc2.out_features) == (squeezed, squeezed, 8)
    assert se.fc1.bias is None
    assert se.fc2.bias is None


def test_finding_channels_disturbs_neither_random_numbers_nor_modes():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, training=True)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Noisy(), nn.BatchNorm2d(8).eval(), nn.ReLU())
    torch.manual_seed(0)
    insert(model, "3", reduction=2)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    SqueezeExcitation(8, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True]
    assert not any(m._forward_hooks for m in model.modules())


def test_the_trial_image_has_the_size_that_transforms_give():
    class Half(Map):
        def out_size(self, size):
            return size[0] // 2, size[1] // 2

        def apply(self, images, params):
            return images[:, :, ::2, ::2]

    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 2 * 2, 4))  # takes no other size
    setup = watch(transforms=lambda run: Half(), model=lambda: network)
    run = build_run({"setup": setup, "se": SE(after=["0"])})
    assert paths_of_se(run.model) == ["0.se"]


def test_it_trains():
    start = build_run({"se": SE(after=["2"], reduction=2)}).model.state_dict()
    end = run_steps({"se": SE(after=["2"], reduction=2)}, steps=3).model.state_dict()
    assert not torch.equal(start["2.se.fc1.weight"], end["2.se.fc1.weight"])


def test_a_pattern_without_a_match_is_named_with_what_is_near():
    with pytest.raises(RecipeError, match=r"'layer\*\.\*\.bn3' matches no module.*'layer4\.1\.bn2'"):
        insert(torchvision.models.resnet18(), "layer*.*.bn2", "layer*.*.bn3")


@pytest.mark.parametrize(
    ("path", "gave"),
    [("fc", r"gave \(1, 1000\)"), ("layer1.0.relu", r"gave \(1, 64, 8, 8\) and \(1, 64, 8, 8\)")],
)
def test_only_feature_maps_that_a_module_gives_once(path, gave):
    with pytest.raises(RecipeError, match=gave):
        insert(torchvision.models.resnet18(), path)


def test_a_module_that_is_never_called_is_refused():
    class Skips(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    with pytest.raises(RecipeError, match="'1' gave nothing"):
        insert(Skips(nn.Conv2d(3, 16, 1), nn.ReLU()), "1")


def test_a_reduction_that_leaves_nothing_is_refused():
    with pytest.raises(RecipeError, match="'reduction' 16 leaves nothing of the 8 channels of '1'"):
        insert(small(), "1")


def test_wrong_options_are_named():
    assert_refuses(SE, "after", [])
    assert_refuses(SE, "reduction", 0, after=["x"])

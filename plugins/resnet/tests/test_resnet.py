from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

from trainkit.testing import assert_refuses, build_run, parameters_of, run_steps
from trainkit_resnet import BasicBlock, ResNet


def build(plugin, shape=(3, 32, 32), classes=10):
    return plugin.model(SimpleNamespace(data=SimpleNamespace(shape=shape, classes=("",) * classes)))


def copy_weights(source, target):
    """Copy by order: both register the same layers in the same order under other names."""
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


@pytest.mark.parametrize("training", [True, False])
def test_default_network_is_torchvisions_resnet18_with_a_small_stem(training):
    theirs = resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = build(ResNet())
    copy_weights(theirs, ours)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.train(training)(images), theirs.train(training)(images))


@pytest.mark.parametrize(("width", "stride"), [(8, 1), (8, 2), (16, 1), (16, 2)])
def test_block_is_torchvisions_block_whether_or_not_the_shape_changes(width, stride):
    changes = width != 8 or stride != 1
    shortcut = nn.Sequential(nn.Conv2d(8, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if changes else None
    theirs = TorchvisionBlock(8, width, stride, shortcut)
    ours = BasicBlock(8, width, stride=stride, kernel_size=3, shortcut_kernel_size=1, dropout=0.0)
    copy_weights(theirs, ours)
    x = torch.randn(4, 8, 7, 7)
    assert torch.equal(ours(x), theirs(x))


@settings(max_examples=10)
@given(st.data())
def test_any_stages_give_logits_and_the_sizes_that_their_strides_say(data):
    stages = data.draw(st.integers(1, 3))
    lists = {
        name: data.draw(st.lists(values, min_size=stages, max_size=stages))
        for name, values in {
            "blocks": st.integers(1, 2),
            "channels": st.integers(1, 5),
            "kernel_sizes": st.sampled_from([1, 3, 5]),
            "shortcut_kernel_sizes": st.sampled_from([1, 3]),
            "strides": st.integers(1, 3),
        }.items()
    }
    size = data.draw(st.integers(4, 9))
    model = build(ResNet(stem=4, **lists), shape=(1, size, size), classes=3)
    x = model.stem(torch.randn(2, 1, size, size))
    for stage, channels, stride in zip(model.stages, lists["channels"], lists["strides"], strict=True):
        size = -(-size // stride)
        x = stage(x)
        assert x.shape == (2, channels, size, size)
    assert model.fc(model.flatten(model.avgpool(x))).shape == (2, 3)
    kernels = [(block.conv1.kernel_size[0], block.conv2.kernel_size[0]) for s in model.stages for block in s]
    assert kernels == [(k, k) for k, n in zip(lists["kernel_sizes"], lists["blocks"], strict=True) for _ in range(n)]


def test_one_kernel_size_stands_for_all_stages_and_strides_default_to_halving():
    model = build(ResNet(stem=4, blocks=[1, 1, 1], channels=[4, 6, 8], kernel_sizes=[5], shortcut_kernel_sizes=[3]))
    assert [stage[0].conv2.kernel_size for stage in model.stages] == [(5, 5)] * 3
    assert [stage[0].conv1.stride for stage in model.stages] == [(1, 1), (2, 2), (2, 2)]
    assert isinstance(model.stages[0][0].shortcut, nn.Identity)
    assert [stage[0].shortcut.conv.kernel_size for stage in model.stages[1:]] == [(3, 3)] * 2


def test_dropout_acts_before_the_second_convolution_and_in_training_alone():
    block = BasicBlock(4, 4, stride=1, kernel_size=3, shortcut_kernel_size=1, dropout=0.5)
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(1)
    result = block(x)
    torch.manual_seed(1)
    inner = F.dropout(F.relu(block.bn1(block.conv1(x))), 0.5)
    assert torch.equal(result, F.relu(block.bn2(block.conv2(inner)) + x))
    block.eval()
    assert torch.equal(block(x), F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + x))
    assert any(isinstance(m, nn.Dropout) and m.p == 0.25 for m in build(ResNet(dropout=0.25)).modules())
    assert not any(isinstance(m, nn.Dropout) for m in build(ResNet()).modules())


def test_kaiming_normal_gives_normal_weights_of_variance_two_over_fan_in():
    model = build(ResNet(blocks=[1, 1], channels=[64, 128], init="kaiming_normal"))
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000):
        scaled = conv.weight.detach() / (2 / conv.weight[0].numel()) ** 0.5
        assert float(scaled.std()) == pytest.approx(1, abs=0.05)
        assert float(scaled.mean()) == pytest.approx(0, abs=0.05)
        assert float(scaled.abs().max()) > 3  # a uniform distribution of this variance ends at 1.73
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(bn.weight, torch.ones(bn.num_features))
        assert torch.equal(bn.bias, torch.zeros(bn.num_features))


def test_pytorch_leaves_the_default_uniform_weights():
    for conv in (m for m in build(ResNet(blocks=[1], channels=[64])).modules() if isinstance(m, nn.Conv2d)):
        bound = conv.weight[0].numel() ** -0.5
        assert 0.9 * bound < float(conv.weight.detach().abs().max()) <= bound


def test_weights_follow_from_the_seed():
    def weights(seed):
        return parameters_of(build_run({"resnet": ResNet(stem=4, blocks=[1], channels=[4])}, seed=seed))

    assert all(map(torch.equal, weights(1), weights(1)))
    assert not all(map(torch.equal, weights(1), weights(2)))


def test_it_fits_the_data_and_trains():
    start = parameters_of(build_run({"resnet": ResNet(stem=4, blocks=[1], channels=[4])}))
    run = run_steps({"resnet": ResNet(stem=4, blocks=[1], channels=[4])}, steps=2)
    assert run.model.fc.out_features == len(run.data.classes)
    assert not any(map(torch.equal, start, parameters_of(run)))


def test_wrong_options_are_named():
    assert_refuses(ResNet, "blocks", [], [2, 0, 2, 2])
    assert_refuses(ResNet, "stem", 0)
    assert_refuses(ResNet, "channels", [8, 8, 8, -1])
    assert_refuses(ResNet, "dropout", 1.0, -0.1)
    for options, message in [
        ({"channels": [8, 8]}, "'channels' has length 2 and 'blocks' 4"),
        ({"kernel_sizes": []}, "kernel_sizes"),
        ({"kernel_sizes": [3, 3]}, "'kernel_sizes' has length 2 and 'blocks' 4"),
        ({"kernel_sizes": [2]}, "'kernel_sizes' must be odd"),
        ({"shortcut_kernel_sizes": [0]}, "'shortcut_kernel_sizes' must be odd"),
        ({"strides": [1, 2]}, "'strides' has length 2 and 'blocks' 4"),
        ({"strides": [1, 2, 0, 2]}, "strides"),
    ]:
        with pytest.raises(ValueError, match=message):
            ResNet(**options)

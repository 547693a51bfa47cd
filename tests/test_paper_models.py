"""The paper's two networks: assembled from plugins, and written out plainly here; they must be the same function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.plugin import hookimpl, plugin
from trainkit.run import count_parameters
from trainkit.testing import build_run, fake_data

ResNet = pytest.importorskip("trainkit_resnet").ResNet
SE = pytest.importorskip("trainkit_se").SE
KernelSharing = pytest.importorskip("trainkit_kernel_sharing").KernelSharing
summarize = pytest.importorskip("trainkit_model_summary").summarize


@plugin
class Images:
    """Made images of CIFAR-10's shape."""

    @hookimpl
    def data(self):
        return fake_data(n=16, classes=10, size=32)


def dense(*shared):
    plugins = {
        "data": Images(),
        "resnet": ResNet(stem=16, blocks=[6, 6, 6], channels=[64, 128, 256], init="kaiming_normal"),
        "se": SE(after=["stages.*.*.bn2"], reduction=16, bias=False),
    }
    if shared:
        plugins["kernel_sharing"] = KernelSharing(within=list(shared))
    return build_run(plugins).model


def basic(after="stem.relu"):
    resnet = ResNet(stem=64, blocks=[4, 4, 3], channels=[64, 128, 256])
    return build_run({"data": Images(), "resnet": resnet, "se": SE(after=[after], reduction=16, bias=True)}).model


class DenseBlock(nn.Module):
    """SE of two linear layers without bias in every block; convolutions may be given, to be shared."""

    def __init__(self, c_in, c_out, stride, shared):
        super().__init__()
        is_shared = shared is not None and c_in == c_out
        self.conv1 = shared if is_shared else nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = shared or nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.down = nn.Linear(c_out, c_out // 16, bias=False)
        self.up = nn.Linear(c_out // 16, c_out, bias=False)
        if stride != 1 or c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.skip_bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1).flatten(1)))))
        y = y * gate.view(len(y), -1, 1, 1)
        return F.relu(y + (self.skip_bn(self.skip(x)) if hasattr(self, "skip") else x))


class DenseSEResNet(nn.Module):
    def __init__(self, shared_stages=()):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential()
        c_in = 16
        for stage, (c_out, stride) in enumerate([(64, 1), (128, 2), (256, 2)], start=1):
            shared = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False) if stage in shared_stages else None
            for block in range(6):
                self.blocks.append(DenseBlock(c_in, c_out, stride if block == 0 else 1, shared))
                c_in = c_out
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class BasicSEResNet(nn.Module):
    """One SE of two 1x1 convolutions with bias, after the first ReLU; average pool 8."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.down, self.up = nn.Conv2d(64, 4, 1), nn.Conv2d(4, 64, 1)
        blocks, c_in = [], 64
        for c_out, count, stride in [(64, 4, 1), (128, 4, 2), (256, 3, 2)]:
            for block in range(count):
                blocks.append(BasicBlock(c_in, c_out, stride if block == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.avg_pool2d(self.blocks(x), 8).flatten(1))


def assert_same(assembled, plain):
    """Give the plain network the other's weights, by order; then compare outputs and gradients."""
    state = zip(plain.state_dict().items(), assembled.state_dict().values(), strict=True)
    plain.load_state_dict({name: theirs.view_as(own) for (name, own), theirs in state})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = [model(images) for model in (assembled, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        F.cross_entropy(output, torch.tensor([3, 7])).backward()
    for ours, theirs in zip(assembled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.view_as(ours), rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # the statistics of batch normalization just became the same, too
        torch.testing.assert_close(assembled.eval()(images), plain.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "plain", "parameters"),
    [
        (dense, DenseSEResNet, 9_014_618),
        (lambda: dense("stages.2"), lambda: DenseSEResNet([3]), 3_116_378),
        (lambda: dense("stages.1", "stages.2"), lambda: DenseSEResNet([2, 3]), 1_641_818),
        (lambda: dense("stages.*"), lambda: DenseSEResNet([1, 2, 3]), 1_273_178),
        (basic, BasicSEResNet, 4_697_742),
        (lambda: basic(after="stem"), BasicSEResNet, 4_697_742),
    ],
)
def test_parameters(build, plain, parameters):
    assert count_parameters(build()) == count_parameters(plain()) == parameters


def test_dense_network_with_shared_kernels_is_the_papers():
    assert_same(dense("stages.2"), DenseSEResNet([3]))


@pytest.mark.parametrize("after", ["stem.relu", "stem"])
def test_basic_network_is_the_papers(after):
    assert_same(basic(after), BasicSEResNet())


def test_order_of_surgery_does_not_matter():
    resnet = {"stem": 16, "blocks": [2, 2], "channels": [16, 32]}
    se, sharing = {"after": ["stages.*.*.bn2"]}, {"within": ["stages.*"]}
    one, other = (
        build_run({"data": Images(), "resnet": ResNet(**resnet), **plugins}).model.eval()
        for plugins in (
            {"se": SE(**se), "kernel_sharing": KernelSharing(**sharing)},
            {"kernel_sharing": KernelSharing(**sharing), "se": SE(**se)},
        )
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize(("build", "giga"), [(basic, 4.79), (lambda: dense("stages.2"), 7.79)])
def test_operations_of_a_forward_and_backward_pass(build, giga):
    assert round(summarize(build(), (3, 32, 32)).flops / 1e9, 2) == giga

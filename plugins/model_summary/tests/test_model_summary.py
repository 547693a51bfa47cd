import copy
import io

import pytest
import torch
import torchvision
from rich.console import Console
from torch import nn

from trainkit import Map
from trainkit.testing import run_steps, watch
from trainkit_model_summary import ModelSummary, render, summarize


def printed(summary, title="title", width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(summary, title, width))
    return console.export_text()


def test_a_small_network_by_hand():
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
    model.add_module("down", nn.Conv2d(8, 4, 1, stride=2))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(4, 5))
    summary = summarize(model, (3, 6, 6))
    stem, down, pool, flatten, fc = summary.parts
    assert [part.path for part in summary.parts] == ["stem", "down", "pool", "flatten", "fc"]
    assert stem.layers == {"Conv2d": 1, "BatchNorm2d": 1, "ReLU": 1}
    assert fc.layers == {"Linear": 1}
    assert [p.output for p in summary.parts] == [(8, 6, 6), (4, 3, 3), (4, 1, 1), (4,), (5,)]
    assert (stem.kernels, stem.channels, down.kernels, down.channels) == ([(3, 3)], [8], [(1, 1)], [4])
    assert [p.parameters for p in summary.parts] == [8 * 27 + 16, 8 * 4 + 4, 0, 0, 25]
    # forward, gradient of the weight and, but for the first layer, gradient of the input; 2 a multiply-add
    assert stem.flops == 2 * 2 * (36 * 8 * 27)
    assert down.flops == 3 * 2 * (9 * 4 * 8)
    assert fc.flops == 3 * 2 * (4 * 5)
    assert (pool.flops, flatten.flops) == (0, 0)
    assert summary.parameters == 293
    assert summary.flops == stem.flops + down.flops + fc.flops
    assert summary.shared == 0
    assert summary.layers == {
        "Conv2d": 2,
        "BatchNorm2d": 1,
        "ReLU": 1,
        "AdaptiveAvgPool2d": 1,
        "Flatten": 1,
        "Linear": 1,
    }


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "googlenet"])
def test_any_network_parts_add_up(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=7, **options)
    summary = summarize(model, (3, 224, 224))
    assert sum(part.parameters for part in summary.parts) == summary.parameters
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert sum(part.flops for part in summary.parts) == summary.flops
    assert all(part.flops >= 0 for part in summary.parts)


def test_forward_of_resnet18_agrees_with_torchvision():
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    forward = 2e9 * weights.meta["_ops"]  # published as multiply-adds
    total = summarize(torchvision.models.resnet18(), (3, 224, 224)).flops
    first = 2 * 112 * 112 * 64 * 3 * 49  # has no gradient of its input
    assert total == pytest.approx(3 * forward - first, rel=2e-3)


def test_a_part_that_returns_its_input_does_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))
    first, identity, dropout, second = summarize(model, (3, 4, 4)).parts
    assert identity.flops == dropout.flops == 0
    assert (first.flops, second.flops) == (2 * 2 * 16 * 12, 3 * 2 * 16 * 16)


def test_a_shared_parameter_is_counted_once():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)))
    for conv in model[1]:
        conv.weight = model[0].weight
    summary = summarize(model, (3, 9, 9))
    assert [part.parameters for part in summary.parts] == [81 + 3, 3 + 3]
    assert (summary.parameters, summary.shared) == (90, 162)
    assert "252 without sharing" in printed(summary)


def test_frozen_parameters_are_not_counted_as_trainable():
    model = nn.Sequential(nn.Conv2d(3, 3, 1).requires_grad_(False), nn.Conv2d(3, 2, 1))
    summary = summarize(model, (3, 2, 2))
    assert [part.parameters for part in summary.parts] == [0, 8]
    assert summary.parameters == 8


def test_containers_of_containers_and_lists_are_opened():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)) for _ in range(2)))
            self.heads = nn.ModuleList([nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)])
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = self.stages(x)
            return self.scale * sum(head(x) for head in self.heads)

    summary = summarize(Net(), (3, 2, 2))
    assert [part.path for part in summary.parts] == ["stages.0", "stages.1", "heads.0", "heads.1", ""]
    assert summary.parts[0].layers == {"Conv2d": 2}
    assert summary.parts[-1].layers == {"Net": 1}
    assert summary.parts[-1].parameters == 1
    assert all(part.flops > 0 for part in summary.parts[:-1])


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2))
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    summarize(model, (3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_the_table_fits_100_columns_and_shows_the_totals(name):
    text = printed(summarize(torchvision.models.get_model(name), (3, 224, 224)), title=name)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    if name == "resnet18":
        rows = {words[0]: words for line in text.splitlines() if (words := line.split())}
        assert rows["layer4"] == ["layer4", "2", "BasicBlock", "512x7x7", "3x3,", "1x1", "512", "8,393,728", "2.47"]
        assert rows["total"] == ["total", "11,689,512", "10.65"]
        assert "8 BasicBlock" in text


def test_nothing_is_cut_off_at_80_columns():
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    text = printed(summarize(model, (3, 32, 32)), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_a_run_prints_it_for_the_size_that_transforms_give(capsys):
    class Half(Map):
        def out_size(self, size):
            return size[0] // 2, size[1] // 2

        def apply(self, images, params):
            return images[:, :, ::2, ::2]

    run_steps({"halved": watch(transforms=lambda run: Half()), "model_summary": ModelSummary()}, steps=1, name="small")
    text = capsys.readouterr().out
    assert "small, 3x4x4 images" in text
    assert "8x4x4" in text

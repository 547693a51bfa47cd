import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, fake_data, watch
from trainkit_conv_groups import ConvGroups


def network(classes=10, size=32, **options):
    data = watch(data=lambda: fake_data(n=8, classes=classes, size=size))
    return build_run({"data": data, "conv_groups": ConvGroups(**options)}).model


def airbench(model, x, momentum, eps, scale):
    """airbench94's network in training, by torch's functions alone, with the plugin's weights."""
    x = F.gelu(F.conv2d(x, model.whiten.weight, model.whiten.bias))
    for group in model.groups:
        for conv, norm, halves in ((group.conv1, group.norm1, True), (group.conv2, group.norm2, False)):
            x = F.conv2d(x, conv.weight, padding=1)
            x = F.max_pool2d(x, 2) if halves else x
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            x = F.gelu((x - mean) / (var + eps).sqrt() + norm.bias.view(1, -1, 1, 1))
    return F.max_pool2d(x, 3).flatten(1) @ model.fc.weight.T * scale


@pytest.mark.parametrize("options", [{}, {"widths": [8, 12, 20], "momentum": 0.1, "eps": 1e-3, "logit_scale": 0.5}])
def test_it_computes_airbenchs_network(options):
    model = network(**options)
    for group in model.groups:
        for norm in (group.norm1, group.norm2):
            nn.init.uniform_(norm.bias)
    images = torch.randn(8, 3, 32, 32)
    momentum, eps, scale = (options.get(k, d) for k, d in [("momentum", 0.4), ("eps", 1e-12), ("logit_scale", 1 / 9)])
    assert torch.allclose(model(images), airbench(model, images, momentum, eps, scale), atol=1e-4)
    first = F.max_pool2d(F.conv2d(F.gelu(model.whiten(images)), model.groups[0].conv1.weight, padding=1), 2)
    assert torch.allclose(model.groups[0].norm1.running_mean, momentum * first.mean((0, 2, 3)), atol=1e-5)


def test_its_parameters_are_airbenchs():
    convs = 24 * 64 + 64 * 64 + 64 * 256 + 256 * 256 + 256 * 256 + 256 * 256
    expected = 24 * 3 * 4 + 24 + 9 * convs + 2 * (64 + 256 + 256) + 256 * 10
    model = network()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == expected == 1_971_640
    assert not any("norm" in name and "weight" in name for name in trained)
    with_weights = sum(p.numel() for p in network(affine=True).parameters() if p.requires_grad)
    assert with_weights == expected + 2 * (64 + 256 + 256)


def test_other_images_have_other_patches():
    model = network(classes=3, size=20, whiten=7, widths=[4, 6])
    assert model.whiten.weight.shape == (7, 3, 2, 2)
    assert model(torch.zeros(2, 3, 20, 20)).shape == (2, 3)


def test_images_that_are_too_small_are_an_error():
    with pytest.raises(RecipeError, match="the network cannot take a training batch of 8 images of 8x8 pixels"):
        network(size=8)


def test_impossible_options_are_refused():
    assert_refuses(ConvGroups, "whiten", 0)
    assert_refuses(ConvGroups, "widths", [], [0], 64)
    assert_refuses(ConvGroups, "momentum", 0, 1.5)
    assert_refuses(ConvGroups, "eps", 0)
    assert_refuses(ConvGroups, "logit_scale", 0)

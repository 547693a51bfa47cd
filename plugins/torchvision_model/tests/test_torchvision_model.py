import socket

import pytest
import torch
from torch import nn
from torchvision import models

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import torch_seed
from trainkit.run import count_parameters
from trainkit.testing import build_run, fake_data, from_recipe, parameters_of, run_steps
from trainkit_torchvision_model import TorchvisionModel


@plugin
class Images:
    """RGB or gray images of some size."""

    size: int = 32
    channels: int = 3

    @hookimpl
    def data(self):
        data = fake_data(8, size=self.size)
        for split in (data.train, data.test):
            object.__setattr__(split, "images", split.images[:, : self.channels])
        object.__setattr__(data, "shape", (self.channels, self.size, self.size))
        return data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a recipe must not reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_it_is_torchvisions_network_with_its_initial_weights():
    ours = build_run({"network": TorchvisionModel(name="resnet18")}, seed=3).model
    torch.manual_seed(torch_seed(3, "model"))
    theirs = models.resnet18(num_classes=4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert all(module.training for module in ours.modules())


def test_kwargs_reach_the_builder():
    network = from_recipe(TorchvisionModel, name="mobilenet_v2", kwargs={"width_mult": 0.25, "dropout": 0.5})
    model = build_run({"network": network}).model
    assert count_parameters(model) == count_parameters(models.mobilenet_v2(width_mult=0.25, num_classes=4))
    assert model.classifier[0].p == 0.5


def test_it_trains():
    network = {"network": TorchvisionModel(name="shufflenet_v2_x0_5")}
    start, end = parameters_of(build_run(network)), parameters_of(run_steps(network, steps=2))
    assert not any(map(torch.equal, start, end))


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_networks_with_auxiliary_classifiers_are_built_without(name, size):
    run = build_run({"images": Images(size=size), "network": TorchvisionModel(name=name)})
    assert run.model(torch.randn(2, 3, size, size)).shape == (2, 4)
    assert not any(path.lower().startswith("aux") for path, _ in run.model.named_modules())


def test_kernels_can_be_shared_within_it_and_squeeze_and_excitation_inserted():
    sharing, se = pytest.importorskip("trainkit_kernel_sharing"), pytest.importorskip("trainkit_se")
    plugins = {
        "network": TorchvisionModel(name="resnet18"),
        "kernel_sharing": sharing.KernelSharing(within=["layer1"]),
        "se": se.SE(after=["layer*.*.bn2"]),
    }
    run = run_steps(plugins, steps=1)
    kernel = run.model.layer1[0].conv1.weight
    assert all(conv.weight is kernel for block in run.model.layer1 for conv in (block.conv1, block.conv2))
    saved, added = 3 * kernel.numel(), sum(2 * 2 * w * (w // 16) for w in (64, 128, 256, 512))
    assert count_parameters(run.model) == count_parameters(models.resnet18(num_classes=4)) - saved + added


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "did you mean 'resnet18'"),
        ("ResNet18", "did you mean 'resnet18'"),
        ("xyz", "torchvision has alexnet, .*wide_resnet50_2"),
        ("fcn_resnet50", "no classification network"),
        ("quantized_resnet18", "no classification network"),
        ("r3d_18", "no classification network"),
    ],
)
def test_only_names_of_classification_networks(name, near):
    with pytest.raises(RecipeError, match=rf"'name': .*'{name}'.*{near}|{near} '{name}'"):
        build_run({"network": TorchvisionModel(name=name)})


def test_weights_and_classes_are_not_options():
    for key in ("weights", "pretrained", "num_classes", "name", "aux_logits"):
        with pytest.raises(ValueError, match=f"'kwargs' cannot have '{key}'"):
            TorchvisionModel(name="resnet18", kwargs={key: True})


@pytest.mark.parametrize(
    "kwargs", [{"depth": 18}, {"norm_layer": "BatchNorm2d"}, {"replace_stride_with_dilation": [1]}]
)
def test_arguments_that_a_builder_does_not_take(kwargs):
    with pytest.raises(RecipeError, match="'kwargs': torchvision's resnet18 does not take them: "):
        build_run({"network": TorchvisionModel(name="resnet18", kwargs=kwargs)})


def test_images_of_another_number_of_channels_are_refused():
    with pytest.raises(RecipeError, match="3 channels, and these have 1"):
        build_run({"images": Images(channels=1), "network": TorchvisionModel(name="resnet18")})


def test_images_that_are_too_small_are_refused_with_their_size():
    with pytest.raises(RecipeError, match="torchvision's alexnet does not take the images, 3x8x8 after .*too small"):
        build_run({"network": TorchvisionModel(name="alexnet")})


def test_a_network_without_logits_is_refused(monkeypatch):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    monkeypatch.setattr(models, "get_model", lambda *_, **__: Pair())
    with pytest.raises(RecipeError, match=r"must give logits \[1, 4\] for one image, not tuple"):
        build_run({"network": TorchvisionModel(name="resnet18")})

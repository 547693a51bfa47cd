import socket

import pytest
import torch

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.rng import torch_seed
from trainkit.run import count_parameters
from trainkit.testing import assert_conforms, build_run, fake_data, from_recipe, parameters_of, run_steps
from trainkit_timm_model import TimmModel

timm = pytest.importorskip("timm")


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


def test_it_is_timms_network_with_its_initial_weights():
    ours = build_run({"network": TimmModel(name="resnet10t")}, seed=3).model
    torch.manual_seed(torch_seed(3, "model"))
    theirs = timm.create_model("resnet10t", num_classes=4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert all(module.training for module in ours.modules())


def test_kwargs_reach_the_builder():
    kwargs = {"img_size": 32, "patch_size": 8, "drop_path_rate": 0.5}
    network = from_recipe(TimmModel, name="test_vit", kwargs=kwargs)
    model = build_run({"images": Images(), "network": network}).model
    assert model.pos_embed.shape[1] == 1 + 16
    assert model.blocks[-1].drop_path1.drop_prob == 0.5


def test_channels_are_the_datas():
    run = run_steps({"images": Images(channels=1), "network": TimmModel(name="test_resnet")}, steps=1)
    assert next(run.model.parameters()).shape[1] == 1


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_it_trains(name):
    kwargs = {"img_size": 32} if "vit" in name else {}
    plugins = {"images": Images(), "network": TimmModel(name=name, kwargs=kwargs)}
    start, end = parameters_of(build_run(plugins)), parameters_of(run_steps(plugins, steps=2))
    assert sum(not torch.equal(a, b) for a, b in zip(start, end, strict=True)) > len(start) / 2


@pytest.mark.slow
def test_it_conforms():
    assert_conforms(TimmModel, name="test_resnet", beside={"images": Images()})


def test_kernels_can_be_shared_within_it_and_squeeze_and_excitation_inserted():
    sharing, se = pytest.importorskip("trainkit_kernel_sharing"), pytest.importorskip("trainkit_se")
    plugins = {
        "network": TimmModel(name="resnet18"),
        "kernel_sharing": sharing.KernelSharing(within=["layer1"]),
        "se": se.SE(after=["layer*.*.bn2"]),
    }
    run = run_steps(plugins, steps=1)
    kernel = run.model.layer1[0].conv1.weight
    assert all(conv.weight is kernel for block in run.model.layer1 for conv in (block.conv1, block.conv2))
    saved, added = 3 * kernel.numel(), sum(2 * 2 * w * (w // 16) for w in (64, 128, 256, 512))
    plain = timm.create_model("resnet18", num_classes=4)
    assert count_parameters(run.model) == count_parameters(plain) - saved + added


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "did you mean 'resnet1[0-9]"),
        ("resnet18.a1_in1k", "did you mean 'resnet18'"),
        ("hf-hub:someone/network", "gives all names"),
        ("local-dir:/some/where", "gives all names"),
    ],
)
def test_only_timms_own_names(name, near):
    with pytest.raises(RecipeError, match=f"'name': timm has no network '{name}'.*{near}"):
        build_run({"network": TimmModel(name=name)})


def test_weights_channels_and_classes_are_not_options():
    options = ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"]
    for key in [*options, "num_classes", "in_chans"]:
        with pytest.raises(ValueError, match=f"'kwargs' cannot have '{key}'"):
            TimmModel(name="resnet18", kwargs={key: "x"})


def test_arguments_that_a_builder_does_not_take():
    with pytest.raises(RecipeError, match="'kwargs': timm's test_resnet does not take them: .*'depth'"):
        build_run({"network": TimmModel(name="test_resnet", kwargs={"depth": 3})})


def test_images_of_the_wrong_size_are_refused_with_their_size():
    with pytest.raises(RecipeError, match="timm's test_vit does not take the images, 3x8x8 after .*img_size"):
        build_run({"network": TimmModel(name="test_vit")})


def test_features_are_no_logits():
    with pytest.raises(RecipeError, match=r"must give logits \[1, 4\] for one image, not list"):
        build_run({"images": Images(), "network": TimmModel(name="test_resnet", kwargs={"features_only": True})})

import socket

import pytest
import torch

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.provenance import declared
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


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Weights of ``test_resnet``, where a download keeps them; what is not there cannot be fetched."""
    constants = pytest.importorskip("huggingface_hub.constants")
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(1)
    state = timm.create_model("test_resnet").state_dict()
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    safetensors.save_file(state, snapshot / "model.safetensors")
    return state


def test_published_weights_come_with_a_new_head_and_are_recorded_by_content(published, capsys):
    run = build_run({"images": Images(), "network": TimmModel(name="test_resnet", pretrained=True)})
    own = run.model.state_dict()
    assert {name for name in own if not torch.equal(own[name], published[name])} == {"fc.weight", "fc.bias"}
    assert declared(run)["network"]["weights"].startswith("test_resnet.r160_in1k ")
    assert "weights test_resnet.r160_in1k, of 1000 classes, trained on images of 160 pixels" in capsys.readouterr().out


def test_a_trial_fetches_nothing(monkeypatch):
    monkeypatch.setattr(timm.models, "load_pretrained", None)
    run = build_run({"images": Images()})
    run.dry = True
    assert TimmModel(name="test_resnet", pretrained=True).model(run) is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "test_resnet", "tag": "r160_in1k"}, "'tag': names weights, and `pretrained` is false"),
        ({"name": "test_resnet", "pretrained": True, "tag": "none"}, "no weights 'none' of test_resnet; there are r16"),
        ({"name": "resnet51q", "pretrained": True, "tag": "x"}, "no weights 'x' of resnet51q"),
        ({"name": "botnet50ts_256", "pretrained": True}, "'pretrained': timm has no weights of botnet50ts_256"),
        ({"name": "test_vit", "pretrained": True, "kwargs": {"img_size": 32}}, "could not be fetched.*start_weights"),
    ],
)
def test_weights_that_cannot_be_had(published, options, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"images": Images(), "network": TimmModel(**options)})


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

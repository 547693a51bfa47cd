import numpy as np
import pytest
import torch
from torch import nn

from trainkit.build import build_network
from trainkit.errors import RecipeError
from trainkit.testing import assert_refuses, build_run, fake_data, run_steps, watch
from trainkit_normalize import Normalize
from trainkit_random_crop import RandomCrop
from trainkit_whitening import Whitening

NORMALIZE = {"mean": [0.4, 0.5, 0.3], "std": [0.2, 0.3, 0.25]}


def network(outputs, size=2, **options):
    conv = {"kernel_size": size, "padding": size // 2, **options}
    return watch(
        model=lambda: nn.Sequential(
            nn.Conv2d(3, outputs, **conv), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, 4)
        )
    )


def plugins(outputs=24, size=2, conv=None, **options):
    return {
        "network": network(outputs, size, **(conv or {})),
        "random_crop": RandomCrop(size=8, padding=2),  # training images only, so that it must not matter
        "normalize": Normalize(**NORMALIZE),
        "whitening": Whitening(**options),
    }


def normalized(run):
    mean, std = (np.array(NORMALIZE[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return (run.data.train.images.numpy() / 255 - mean) / std


def airbench(images, size, eps):
    """airbench94's filters, in numpy, from patches that are cut one by one."""
    _, _, height, width = images.shape
    places = [(y, x) for y in range(height - size + 1) for x in range(width - size + 1)]
    patches = np.concatenate([images[:, :, y : y + size, x : x + size].reshape(len(images), -1) for y, x in places])
    eigenvalues, eigenvectors = np.linalg.eigh(patches.T @ patches / len(patches))
    scaled = (eigenvectors / np.sqrt(eigenvalues + eps)).T[::-1]
    return scaled.reshape(-1, 3, size, size)


def but_for_the_sign(ours, theirs):
    signs = np.sign((ours * theirs).sum((1, 2, 3), keepdims=True))
    return np.allclose(ours, theirs * signs, atol=1e-4)


@pytest.mark.parametrize(("size", "outputs", "eps"), [(2, 24, 5e-4), (2, 30, 0.1), (3, 64, 5e-4)])
def test_both_signs_of_airbenchs_filters_and_then_those_that_were_there(size, outputs, eps):
    run = build_run(plugins(outputs, size, eps=eps))
    plain = build_run({"network": network(outputs, size)})
    weight, d = run.model[0].weight.detach().numpy(), 3 * size * size
    assert but_for_the_sign(weight[:d], airbench(normalized(run), size, eps))
    assert np.array_equal(weight[d : 2 * d], -weight[:d])
    assert np.array_equal(weight[2 * d :], plain.model[0].weight.detach().numpy()[2 * d :])
    assert run.parameters == plain.parameters


def test_of_few_filters_those_of_the_greatest_eigenvalues_are_there():
    run = build_run(plugins(5))
    assert but_for_the_sign(run.model[0].weight.detach().numpy(), airbench(normalized(run), 2, 5e-4)[:5])


def test_responses_to_training_patches_are_white():
    run = build_run(plugins(27, 3, eps=0, conv={"padding": 0, "bias": False}))
    responses = run.model[0](torch.from_numpy(normalized(run)).float()).transpose(0, 1).flatten(1)
    moments = responses @ responses.T / responses.shape[1]
    assert torch.allclose(moments, torch.eye(27), atol=1e-3)


def test_the_sample_is_the_seeds_and_so_is_every_bit():
    def weight(seed, **options):
        return build_run(plugins(**options), seed=seed).model[0].weight[:24]

    assert torch.equal(weight(1, images=10), weight(1, images=10))
    assert not torch.allclose(weight(1, images=10), weight(2, images=10))
    assert torch.equal(weight(1, images=32), weight(2, images=5000))  # all of them


def test_images_that_must_be_decoded_give_the_same_filters():
    class Decoded:
        def __init__(self, split):
            self.split = split

        def __len__(self):
            return len(self.split)

        def __getitem__(self, index):
            return self.split[index]

    data = fake_data()
    decoded = watch(data=lambda: data.replace(train=Decoded(data.train)))
    ours, theirs = (build_run({**extra, **plugins()}).model[0].weight for extra in ({"data": decoded}, {}))
    assert torch.equal(ours, theirs)


def test_a_network_to_be_loaded_is_built_without_images():
    run = build_run(plugins())

    class Absent:
        def __len__(self):
            return 32

        def __getitem__(self, index):
            raise AssertionError

    loaded = build_network(run.recipe, run.hooks, run.data.replace(train=Absent()))
    loaded.model.load_state_dict(run.model.state_dict())
    assert torch.equal(loaded.model[0].weight, run.model[0].weight)


def trained(**options):
    run = run_steps(plugins(**options), steps=8)  # two epochs
    return run.model[0], build_run(plugins(**options)).model[0]


@pytest.mark.parametrize("freeze", [True, False])
def test_weights_are_frozen_or_trained_and_the_bias_is_trained(freeze):
    now, before = trained(freeze=freeze)
    assert torch.equal(now.weight, before.weight) == freeze
    assert not torch.equal(now.bias, before.bias)


def test_the_bias_is_trained_for_some_epochs():
    never, before = trained(bias_epochs=0)
    assert torch.equal(never.bias, before.bias)
    seen = []
    note = watch(epoch_end=lambda run: seen.append(run.model[0].bias.detach().clone()))
    run_steps({**plugins(bias_epochs=1), "note": note}, steps=8)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], before.bias)


def test_what_cannot_be_whitened_with_is_an_error():
    for path, said in [("1", "'1' is not one"), ("9", "matches no module"), ("*", "'.' is not one")]:
        with pytest.raises(RecipeError, match=f"'module': .*{said}"):
            build_run(plugins(module=path))
    with pytest.raises(RecipeError, match="'module': the convolution is grouped"):
        build_run(plugins(conv={"groups": 3}))
    with pytest.raises(RecipeError, match="'bias_epochs': the convolution has no bias"):
        build_run(plugins(conv={"bias": False}, bias_epochs=3))
    linear = watch(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(RecipeError, match="'module': a convolution of images is needed, and the network has none"):
        build_run({"linear": linear, "whitening": Whitening()})


def test_impossible_options_are_refused():
    assert_refuses(Whitening, "images", 0)
    assert_refuses(Whitening, "eps", -1)
    assert_refuses(Whitening, "bias_epochs", -1)

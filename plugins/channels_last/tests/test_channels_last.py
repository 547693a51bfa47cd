import pytest
import torch
from torch import nn

from trainkit import Batch
from trainkit.testing import build_run, parameters_of, run_steps, watch
from trainkit_channels_last import ChannelsLast

LAST, FIRST = torch.channels_last, torch.contiguous_format


def is_last(tensor):
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous(memory_format=FIRST)


@pytest.mark.parametrize("plugins", [{}, {"channels_last": ChannelsLast()}], ids=["without", "with"])
def test_images_kernels_and_feature_maps_are_in_this_format_in_training_and_testing(plugins):
    seen = set()

    def built(run):
        def record(module, inputs, output):
            seen.add((run.split, is_last(inputs[0]), is_last(module.weight), is_last(output)))

        run.model[0].register_forward_hook(record)

    gradients = watch(built=built, gradients_ready=lambda run: seen.add(is_last(run.model[0].weight.grad)))
    run_steps({**plugins, "watch": gradients}, steps=8, epochs=2)
    last = bool(plugins)
    assert seen == {("train", last, last, last), ("test", last, last, last), last}


def test_training_gives_the_same_parameters():
    plain, last = run_steps({}, steps=6), run_steps({"channels_last": ChannelsLast()}, steps=6)
    for a, b in zip(parameters_of(plain), parameters_of(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_in_this_format_is_not_copied_and_keeps_its_indices():
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=LAST)
    given = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    batch = ChannelsLast().transform_batch(given)
    assert batch.images is images
    assert batch.indices is given.indices


def test_values_names_and_sharing_of_parameters_stay():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = model[0].weight
    changed = ChannelsLast().transform_model(model)
    assert changed[0].weight is kernel
    assert changed[1].weight is kernel
    assert is_last(kernel)
    after = changed.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_loaded_state_keeps_the_format():
    run = run_steps({"channels_last": ChannelsLast()}, steps=3)
    loaded = build_run({"channels_last": ChannelsLast()}, epochs=1000)
    plain = {k: v.contiguous() for k, v in run.model.state_dict().items()}
    loaded.model.load_state_dict(plain)
    assert is_last(loaded.model[0].weight)
    assert torch.equal(loaded.model[0].weight, run.model[0].weight)

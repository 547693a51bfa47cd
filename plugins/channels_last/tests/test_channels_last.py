import pytest
import torch
from torch import nn

from trainkit import Batch
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, parameters_of, run_steps
from trainkit_channels_last import ChannelsLast

LAST, FIRST = torch.channels_last, torch.contiguous_format


def is_last(tensor):
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous(memory_format=FIRST)


@plugin
class Watch:
    """Records the format of what the first convolution gets and gives, by split."""

    seen: dict

    @hookimpl
    def transform_model(self, run, model):
        def record(module, inputs, output):
            formats = (is_last(inputs[0]), is_last(module.weight), is_last(output))
            self.seen.setdefault(run.split, set()).add(formats)

        model[0].register_forward_hook(record)
        return model


def test_images_kernels_and_feature_maps_are_in_this_format_in_training_and_testing():
    seen = {}
    run_steps({"channels_last": ChannelsLast(), "watch": Watch(seen=seen)}, steps=8, epochs=2)
    assert seen == {"train": {(True, True, True)}, "test": {(True, True, True)}}


def test_without_it_nothing_is():
    seen = {}
    run_steps({"watch": Watch(seen=seen)}, steps=8, epochs=2)
    assert seen == {"train": {(False, False, False)}, "test": {(False, False, False)}}


def test_training_gives_the_same_parameters():
    plain, last = run_steps({}, steps=6), run_steps({"channels_last": ChannelsLast()}, steps=6)
    for a, b in zip(parameters_of(plain), parameters_of(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_have_the_format_of_their_kernels():
    @plugin
    class Gradients:
        @hookimpl
        def gradients_ready(self, run):
            assert is_last(run.model[0].weight.grad)

    run_steps({"channels_last": ChannelsLast(), "gradients": Gradients()}, steps=2)


def test_a_batch_in_this_format_is_not_copied():
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=LAST)
    batch = ChannelsLast().transform_batch(Batch(images, torch.zeros(4, dtype=torch.int64)))
    assert batch.images is images


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


@pytest.mark.parametrize("steps", [3, 4])
def test_a_loaded_state_keeps_the_format(steps):
    run = run_steps({"channels_last": ChannelsLast()}, steps=steps)
    loaded = build_run({"channels_last": ChannelsLast()}, epochs=1000)
    plain = {k: v.contiguous() for k, v in run.model.state_dict().items()}
    loaded.model.load_state_dict(plain)
    assert is_last(loaded.model[0].weight)
    assert torch.equal(loaded.model[0].weight, run.model[0].weight)

"""From a recipe to a run: what is built in which order, and what is refused before the first step."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Gather, Recipe, build, fit, load_recipe, provenance, resume
from trainkit.build import build_with
from trainkit.errors import DataError, PluginError, RecipeError
from trainkit.hooks import register
from trainkit.plugin import hookimpl, plugin
from trainkit.session import reopen
from trainkit.testing import build_run, fake_data, parameters_of


@plugin
class Network:
    """Provides the network that a function makes."""

    make: Any

    @hookimpl
    def model(self, run):
        return self.make()


def normalised():
    """A network whose batch norm sees one value an image, as after a global pooling."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.BatchNorm1d(4))


def test_a_last_batch_that_batch_norm_cannot_take_is_refused(tmp_path):
    with pytest.raises(RecipeError) as caught:
        build_run({"network": Network(make=normalised)}, batch_size=31)
    assert "the network cannot take the last training batch, of 1 images" in str(caught.value)
    assert "set drop_last: true, or another batch_size" in str(caught.value)
    run = build_run({"network": Network(make=normalised)}, batch_size=31, drop_last=True, epochs=2)
    assert (run.images_per_epoch, run.batches_per_epoch) == (31, 1)
    assert fit(run, tmp_path).steps == 2
    assert run.images == 62


def test_a_whole_run_of_one_image_batches_is_refused():
    with pytest.raises(RecipeError, match="cannot take a training batch of 1 images of 8x8 pixels"):
        build_run({"network": Network(make=normalised)}, batch_size=1)


def test_drop_last_that_leaves_nothing_is_refused():
    with pytest.raises(RecipeError, match="batch_size: 64 is more than the 32 training images of an epoch"):
        build_run({}, batch_size=64, drop_last=True)


class Corner(Gather):
    """Keep the upper left corner."""

    def __init__(self, size):
        self.size = size

    def source(self, params, y, x, size):
        return y, x

    def out_size(self, size):
        return self.size, self.size


@plugin
class Corners:
    """Cuts corners out of the images of some splits."""

    sizes: dict[str, int]

    @hookimpl
    def transforms(self, split):
        return Corner(self.sizes[split]) if split in self.sizes else None


def test_evaluation_in_another_size_is_refused_unless_it_is_meant(tmp_path):
    corners = {"corners": Corners(sizes={"train": 6})}
    with pytest.raises(RecipeError) as caught:
        build_run(corners)
    assert "images of the test split reach the network with 8x8 pixels, and those of the training split with 6x6" in (
        str(caught.value)
    )
    assert "mixed_sizes: true" in str(caught.value)
    run = build_run(corners, mixed_sizes=True)
    assert (run.image_shape, run.shape_of("test")) == ((3, 6, 6), (3, 8, 8))
    assert fit(run, tmp_path).status == "completed"


class OneSize(nn.Sequential):
    """Takes images of one size, as vision transformers do."""

    def forward(self, images):
        assert images.shape[2:] == (8, 8), f"expected 8x8, got {images.shape[2]}x{images.shape[3]}"
        return super().forward(images)


def one_size():
    return OneSize(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"train": 6, "test": 6}, "a training batch of 8 images of 6x6 pixels: AssertionError: expected 8x8, got 6x6"),
        (
            {"test": 6},
            "a test batch of 8 images of 6x6 pixels: .*expected 8x8, got 6x6.*; give the test split the size",
        ),
    ],
)
def test_a_network_of_one_size_is_refused_before_the_first_step(sizes, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"network": Network(make=one_size), "corners": Corners(sizes=sizes)}, mixed_sizes=True)


class Reads(nn.Sequential):
    """Looks at its data, which torch's meta device has not; notes the largest value that it has seen."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8), nn.Dropout(), nn.Linear(3 * 8 * 8, 4))
        self.largest = 0.0

    def forward(self, images):
        self.largest = max(self.largest, images.max().item())
        return super().forward(images)


def test_a_network_that_reads_its_data_still_builds(tmp_path):
    run = build_run({"network": Network(make=Reads)})
    assert fit(run, tmp_path).status == "completed"
    with pytest.raises(RecipeError, match="the last training batch, of 1 images"):
        build_run({"network": Network(make=Reads)}, batch_size=31)


@pytest.mark.parametrize("make", [Reads, normalised])
def test_the_check_of_shapes_leaves_the_network_as_it_is(make):
    run = build_run({"network": Network(make=make)})
    assert run.model.training
    torch.manual_seed(0)
    assert {p.device.type for p in run.model.parameters()} == {"cpu"}
    assert [m.num_batches_tracked.item() for m in run.model.modules() if isinstance(m, nn.BatchNorm1d)] == [0]
    assert getattr(run.model, "largest", 0.0) == 0.0


def test_a_network_that_cannot_be_copied_still_builds():
    class NoCopy(nn.Sequential):
        def __deepcopy__(self, memo):
            raise TypeError("no copy")

    build_run({"network": Network(make=lambda: NoCopy(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)))})


def test_builds_in_two_threads_give_the_weights_of_one_after_the_other():
    class Slow(nn.Sequential):
        """Draws its weights with pauses, in which another thread draws its own."""

        def __init__(self):
            layers = [nn.Flatten()]
            for _ in range(4):
                layers.append(nn.Linear(192, 192))
                time.sleep(0.02)
            super().__init__(*layers, nn.Linear(192, 4))

    def weights(seed):
        return parameters_of(build_run({"network": Network(make=Slow)}, seed=seed))

    expected = [weights(seed) for seed in (0, 1)]
    found = [None, None]

    def work(seed):
        found[seed] = weights(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@plugin
class HoldOut:
    """Holds the last training images out as a validation split."""

    images: int = 8

    @hookimpl
    def transform_data(self, data):
        kept = torch.arange(len(data.train) - self.images)
        held = torch.arange(len(kept), len(data.train))
        return data.replace(train=data.train.subset(kept), validation=data.train.subset(held))


def test_transform_data_holds_out_a_validation_split():
    run = build_run({"hold_out": HoldOut()})
    assert {name: len(split) for name, split in run.data.splits.items()} == {"train": 24, "validation": 8, "test": 16}
    assert (run.selection_split, run.images_per_epoch, len(run.batches["validation"])) == ("validation", 24, 1)
    assert run.data.train.fingerprint() != fake_data().train.fingerprint()


def test_transform_data_is_a_chain_in_the_recipes_order():
    run = build_run({"first": HoldOut(images=16), "second": HoldOut(images=8)})
    assert len(run.data.train) == 8


def test_every_split_has_transforms_of_its_own():
    @plugin
    class More:
        @hookimpl
        def data(self):
            data = fake_data()
            return data.replace(more={"corrupted": data.test})

        @hookimpl
        def transforms(self, split):
            asked.append(split)

    asked = []
    run = build_run({"more": More(), "hold_out": HoldOut()})
    assert asked == list(run.data.splits) == ["train", "validation", "test", "corrupted"]


@pytest.mark.parametrize("n", [0, -1])
def test_a_step_of_no_batch_is_refused(n):
    @plugin
    class None_:
        @hookimpl
        def batches_per_step(self):
            return n

    with pytest.raises(PluginError, match=f"plugin 'p', batches_per_step: expected at least 1, got {n}"):
        build_run({"p": None_()})


def test_frozen_parameters_may_be_in_the_optimizer_or_not(tmp_path):
    @plugin
    class Freeze:
        @hookimpl
        def transform_model(self, model):
            model[0].requires_grad_(False)
            return model

    @plugin
    class All:
        @hookimpl
        def optimizer(self, run):
            return torch.optim.SGD(run.model.parameters(), lr=0.1)

    for number, plugins in enumerate(({"freeze": Freeze()}, {"freeze": Freeze(), "all": All()})):
        run = build_run(plugins)
        assert run.parameters == sum(p.numel() for p in run.model[1:].parameters())
        before = run.model[0].weight.clone()
        fit(run, tmp_path / str(number))
        assert torch.equal(run.model[0].weight, before)


def test_built_is_the_last_word_of_the_build():
    @plugin
    class Built:
        @hookimpl
        def built(self, run):
            seen.append((run.step, len(run.schedules), run.optimizer, run.context))

    seen = []
    run = build_run({"built": Built()})
    assert seen == [(0, 0, run.optimizer, run.context)]


def test_what_breaks_the_optimizer_in_built_is_refused():
    @plugin
    class Replaces:
        @hookimpl
        def built(self, run):
            run.model[-1] = nn.Linear(8, 4)

    with pytest.raises(PluginError, match="plugin 'p', built: the optimizer's parameters are not the network's"):
        build_run({"p": Replaces()})


def test_a_plugin_may_be_listed_twice():
    @plugin
    class Renames:
        to: str

        @hookimpl
        def transform_data(self, data):
            return data.replace(classes=(*data.classes, self.to))

    run = build_run({"renames": Renames(to="a"), "renames@again": Renames(to="b")})
    assert run.data.classes[-2:] == ("a", "b")
    assert [names for hook, _, names in run.hooks.order() if hook == "transform_data"] == [["renames", "renames@again"]]


def test_build_stays_a_function_whatever_was_imported():
    """The package has a module of the same name, which an import would put in its place."""
    import trainkit

    assert trainkit.build is build
    assert callable(trainkit.build)
    assert build_with.__module__ == "trainkit.build"


def test_an_expected_number_of_parameters_is_checked_before_training():
    with pytest.raises(RecipeError, match="the recipe expects 5 parameters and its model has 268"):
        build_run({}, expect={"parameters": 5})


def test_a_missing_part_is_named():
    plugins = [p for p in build_run({}).hooks.plugins.values() if p.name != "default_loss"]
    with pytest.raises(PluginError, match="no plugin of the recipe provides 'loss'"):
        build_with(Recipe(name="r", epochs=1, batch_size=8, device="cpu"), register(plugins))


def test_a_split_that_a_plugin_emptied_is_refused():
    @plugin
    class Empties:
        @hookimpl
        def transform_data(self, data):
            return data.replace(test=data.test.subset(torch.arange(0)))

    with pytest.raises(DataError, match="plugin 'p', transform_data: the test split has no images"):
        build_run({"p": Empties()})


@plugin
class Half:
    """Halves the loss."""

    factor: float = 0.5
    before = ("metrics",)

    @hookimpl
    def transform_loss(self, loss):
        return loss * self.factor


def test_instances_from_a_notebook_take_part_and_are_recorded(small, monkeypatch):
    run = build(load_recipe(small), plugins={"half": Half(factor=0.25)})
    assert list(run.hooks.plugins).index("half") == list(run.hooks.plugins).index("metrics") - 1
    fit(run, "out", max_steps=2)
    (locked,) = (p for p in json.loads(Path("out/plugins.lock.json").read_text()) if p["name"] == "half")
    assert locked["options"] == {"factor": 0.25}
    assert locked["code"] == provenance.file_digest(Path(__file__))
    assert load_recipe("out/recipe.yaml").plugins["half"] == {"factor": 0.25}
    with pytest.raises(PluginError, match="plugin 'half' is not installed"):
        reopen("out")
    assert resume("out", plugins={"half": Half(factor=0.25)}).status == "completed"
    replaced = build(load_recipe(small), plugins={"sgd": Quarter()})
    assert isinstance(replaced.hooks.plugins["sgd"].instance, Quarter)
    for wrong in (Half, object()):
        with pytest.raises(PluginError, match="expected an instance of a class decorated with @plugin"):
            build(load_recipe(small), plugins={"half": wrong})


@plugin
class Quarter:
    """Provides an optimizer."""

    @hookimpl
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.25)

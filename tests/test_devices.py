"""Steps and tests on a device that is not the processor: torch's meta device, which holds no data, on any machine.

Whatever would make a run wait for a GPU raises there: ``item()``, ``tolist()``, ``cpu()``, ``bool()``, ``nonzero()``, a
mask as an index. Two mistakes that it lets pass are looked for in the operations themselves: tensors of two devices in
one, and a copy to the device that waits. Tensors of float64, which Apple's GPUs do not have, are looked for, too: the
device counts as one without them.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainkit import Data, TrainkitError, fit, load_recipe, numerics
from trainkit.build import build_with
from trainkit.hooks import LoadedPlugin, load_plugins, register
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, fake_data, from_recipe
from trainkit.trainer import Trainer

from .test_plugins import BESIDE, NOT_HERE, OPTIONS, PLUGINS, load, recipe_lines

RECIPES = Path(__file__).parents[1] / "recipes"
# What cannot run there.
SPECIAL = {
    "non_finite": "it reads every step, on a GPU once the numbers have arrived",
    "weights": "it copies the network to the host after an epoch, and here is nothing to copy",
    "sample_images": "it draws images before the first step",
    "whitening": "it looks at images before the first step",
    "swa": "at the end of an epoch it passes over the images once more, whose order is copied to the device first",
    "torchmetrics": "some of its metrics count with bincount, which waits",
    "random_erasing": "the meta device has no random numbers",
}


# What needs float64 on the device, and says so.
FLOAT64 = {"trivial_augment"}


class Operations(TorchDispatchMode):
    """Holds the devices of every operation's tensors against each other; a scalar may be on the host."""

    def __init__(self, float64=False):
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.device.type == "meta" and not self.float64:
                assert made.dtype != torch.float64, f"{function} makes float64, which MPS does not have"
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            waits = not ((kwargs or {}).get("non_blocking") or args[2:] == (True,))
            assert given[-1].device == result.device or not waits, "a copy between devices that waits"
        else:
            devices = {t.device.type for t in given if t.dim()}
            assert len(devices) < 2, f"{function} of tensors on {' and '.join(sorted(devices))}"
        return result


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains and tests on the meta device; only where a run reads many records at once may it read at all."""
    inside, reads = [], []

    def to_host(records):
        assert not inside, "a read within a step or a test"
        reads.append(any(isinstance(v, torch.Tensor) for record in records for v in record.values()))
        return [{k: 0.5 if isinstance(v, torch.Tensor) else v for k, v in record.items()} for record in records]

    for module in ("run", "trainer"):
        monkeypatch.setattr(f"trainkit.{module}.to_host", to_host)
    real, allowed = numerics.widest_float, []
    for module in ("trainkit.trainer", "trainkit.run", "trainkit_metrics", "trainkit_tta"):
        fake = lambda device: torch.float32 if device.type == "meta" else real(device)  # noqa: E731
        monkeypatch.setattr(f"{module}.widest_float", fake, raising=False)

    def watch(method):
        def watched(*args):
            inside.append(True)
            with Operations(float64=bool(allowed)):
                result = method(*args)
            inside.pop()
            return result

        return watched

    for name in ("train_step", "evaluate"):
        monkeypatch.setattr(Trainer, name, watch(getattr(Trainer, name)))

    def start(run, float64=False):
        allowed[:] = [True] if float64 else []
        result = fit(run, tmp_path / "run")
        assert {p.device.type for p in run.model.parameters()} == {"meta"}
        assert result.steps == run.step > 0
        return reads

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLUGINS if name not in {*NOT_HERE, *SPECIAL}])
def test_no_plugin_waits_for_the_device_within_a_step(name, train):
    beside = {other: load(other)(**options) for other, options in BESIDE.get(name, {}).items()}
    options = OPTIONS.get(name, recipe_lines(name)[name])
    train(
        build_run({**beside, name: from_recipe(load(name), **options)}, device="meta", epochs=2),
        float64=name in FLOAT64,
    )


@plugin
class Images:
    """Made images of CIFAR-10's shape."""

    @hookimpl
    def data(self):
        return fake_data(n=16, classes=10, size=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic_se", "quickstart"])  # the others list the same plugins
def test_a_recipe_reads_the_device_only_with_its_records(name, train):
    overrides = ["device=meta", "epochs=1", "max_steps=2", "batch_size=8"]
    overrides += ["plugins.weights=false", "plugins.sample_predictions=false"]  # they copy to the host after an epoch
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    plugins = load_plugins(recipe).plugins
    if "cifar10" in plugins:
        plugins = {**plugins, "cifar10": LoadedPlugin("cifar10", Images())}
    reads = train(build_with(recipe, register(plugins.values())))
    assert sum(reads) == 2  # the record of the epoch, and whether its weights are finite


def test_images_that_workers_decode_reach_the_device(train):
    data = fake_data(n=16)

    class Decoded:
        def __len__(self):
            return len(data.train)

        def __getitem__(self, index):
            return data.train[index]

    @plugin
    class Decoding:
        @hookimpl
        def data(self):
            return Data(train=Decoded(), test=Decoded(), classes=data.classes, shape=data.shape)

    train(build_run({"data": Decoding()}, device="meta"))


def forward_end(action):
    @plugin
    class Faulty:
        @hookimpl
        def forward_end(self, output, loss):
            action(output, loss)

    return Faulty()


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda output, loss: loss.item(), "item"),
        (lambda output, loss: output.tolist(), "no data"),
        (lambda output, loss: output.detach().cpu(), "no data"),
        (lambda output, loss: bool(loss > 0), "item"),
        (lambda output, loss: output[output > 0], "nonzero"),
        (lambda output, loss: torch.equal(output, output), "equal"),
        (lambda output, loss: output.mm(torch.ones(output.shape[1], 2)), "mm.*cpu and meta"),
        (lambda output, loss: output[torch.tensor([0])], "index.*cpu and meta"),
        (lambda output, loss: output.double(), "float64"),
        (lambda output, loss: torch.ones(3).to(output.device), "a copy between devices that waits"),
        (lambda output, loss: torch.empty_like(output).copy_(torch.ones(output.shape)), "a copy between"),
    ],
)
def test_a_plugin_that_waits_is_noticed(action, said, train):
    with pytest.raises(TrainkitError, match=f"plugin 'faulty' failed in forward_end.*{said}"):
        train(build_run({"faulty": forward_end(action)}, device="meta"))


@pytest.mark.parametrize(
    "action",
    [
        lambda output, loss: output * torch.tensor(2.0),
        lambda output, loss: torch.ones(3).to(output.device, non_blocking=True),
        lambda output, loss: torch.empty_like(output).copy_(torch.ones(output.shape), non_blocking=True),
    ],
)
def test_what_does_not_wait_is_not_held_against_a_plugin(action, train):
    train(build_run({"faultless": forward_end(action)}, device="meta"))

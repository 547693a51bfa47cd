import pytest
import torch
from acme_trainkit_finetune import Finetune
from torch import nn

from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, assert_refuses, build_run, run_steps, watch


@plugin
class Net:
    """A small network with a head."""

    @hookimpl
    def model(self):
        net = nn.Sequential()
        net.add_module("conv", nn.Conv2d(3, 4, 3, padding=1))
        net.add_module("bn", nn.BatchNorm2d(4))
        net.add_module("flat", nn.Flatten())
        net.add_module("head", nn.Linear(4 * 64, 4))
        return net


def states(finetune, epochs):
    """The weights at the start and after each epoch."""
    noted = []

    def note(run):
        noted.append({k: v.clone() for k, v in run.model.state_dict().items()})

    plugins = {"net": Net(), "finetune": finetune, "watch": watch(fit_start=note, epoch_end=note)}
    run_steps(plugins, steps=4 * epochs, epochs=epochs)
    return noted


def test_the_head_is_trained_alone_at_first():
    start, first, second = states(Finetune(head=("head",), epochs=1), 2)
    assert {k for k in start if not torch.equal(start[k], first[k])} == {"head.weight", "head.bias"}
    assert {k for k in start if not torch.equal(first[k], second[k])} >= {"conv.weight", "bn.weight", "head.weight"}


def test_statistics_of_batch_normalization_are_kept_for_the_whole_run():
    start, *_, end = states(Finetune(head=("head",), epochs=1), 2)
    for k in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(start[k], end[k])


def test_start_weights_are_all_but_the_heads(tmp_path):
    other = build_run({"net": Net()}, seed=5).model.state_dict()
    other["head.weight"] = torch.zeros(10, 3)  # another number of classes
    torch.save({"model": other}, tmp_path / "weights.pt")
    run = build_run({"net": Net(), "finetune": Finetune(head=("head",), weights=tmp_path / "weights.pt")})
    plain = build_run({"net": Net()}).model.state_dict()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, (plain if name.startswith("head.") else other)[name])


def test_it_keeps_the_promises_of_every_plugin(tmp_path):
    assert_conforms(Finetune, beside={"net": Net()}, head=["head"], epochs=1)
    torch.save(build_run({"net": Net()}, seed=5).model.state_dict(), tmp_path / "weights.pt")
    assert_conforms(Finetune, beside={"net": Net()}, head=["head"], epochs=2, weights=str(tmp_path / "weights.pt"))


def test_wrong_options_are_refused(tmp_path):
    assert_refuses(Finetune, "head")
    assert_refuses(Finetune, "head", [])
    assert_refuses(Finetune, "epochs", -1, head=["head"])
    with pytest.raises(RecipeError, match="hea"):
        build_run({"net": Net(), "finetune": Finetune(head=("hea",))})
    (tmp_path / "w.pt").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="weights"):
        build_run({"net": Net(), "finetune": Finetune(head=("head",), weights=tmp_path / "w.pt")})

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from trainkit import build, fit, load_recipe
from trainkit.cli import main
from trainkit.errors import RecipeError

RECIPE = """\
name: small
epochs: 1
batch_size: 256
device: cpu
plugins:
  digits:
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  weights:
  checkpoint:
"""
FINE = RECIPE.replace("  cross_entropy:", "  start_weights: {file: start.pt}\n  cross_entropy:")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "fine.yaml").write_text(FINE)


def built(*overrides):
    return build(load_recipe("fine.yaml", overrides))


def other_weights():
    state = build(load_recipe("small.yaml", ["seed=1"])).model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_loaded(run, state):
    found = run.model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "prefixed", "safetensors"])
def test_weights_are_loaded_whatever_wrote_them(form):
    state = other_weights()
    if form == "safetensors":
        save_file(state, "start.safetensors")
        run = built("plugins.start_weights.file=start.safetensors")
    else:
        prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
        torch.save({"plain": state, "prefixed": prefixed}.get(form, {form: state, "epoch": 3}), "start.pt")
        run = built()
    assert_loaded(run, state)


def test_an_earlier_run_is_continued_with_its_evaluated_weights_elsewhere(capsys):
    fit(build(load_recipe("small.yaml", ["seed=1", "plugins.ema.decay=0.5"])), "earlier")
    average = torch.load("earlier/checkpoints/best.pt", weights_only=True)["plugins"]["ema"]["state"]["model"]
    run = built("plugins.start_weights.file=earlier")
    assert_loaded(run, average)
    fit(run, "out")
    shutil.rmtree("earlier")
    os.rename("out", "moved")  # with the copy of its start weights
    assert main(["evaluate", "moved"]) == 0
    assert "best.safetensors: 20 of 20 tensors loaded" in capsys.readouterr().out


def test_a_head_for_other_classes_keeps_its_initial_values_and_that_is_said(capsys):
    state = other_weights()
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    torch.save({**backbone, "fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, "start.pt")
    run = built()
    assert_loaded(run, backbone)
    assert torch.equal(run.model.fc.weight, build(load_recipe("small.yaml")).model.fc.weight)
    assert "18 of 20 tensors loaded; fc.weight, fc.bias keep their initial values" in capsys.readouterr().out


def test_other_weights_are_another_run(capsys):
    torch.save(other_weights(), "start.pt")
    fit(built(), "out", max_steps=2)
    torch.save(build(load_recipe("small.yaml", ["seed=2"])).model.state_dict(), "out/files/start_weights/start.pt")
    assert main(["resume", "out"]) == 2
    assert "plugins.start_weights.file was start.pt blake2b:" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        ({"a": torch.zeros(1)}, [], "it lacks stem.conv.weight, .* and 15 more; the network lacks a; list the network"),
        ({"stem.conv.weight": torch.zeros(9, 9)}, [], r"stem.conv.weight is \[9, 9\] there and \[4, 1, 3, 3\]"),
        ({"a": torch.zeros(1)}, ["plugins.start_weights.strict=false"], "it lacks"),
        ({"model": {"a": 1}}, [], "holds no tensors by name"),
        ([1], [], "a list instead of a state dict"),
        (Evil(), [], "refused: not a checkpoint of tensors and plain values"),
        (None, [], "start.pt: cannot be read: No such file"),
        (None, ["plugins.start_weights.file=."], "name a file, or the directory of a run"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, content, overrides, said):
    if content is not None:
        torch.save(content, "start.pt")
    with pytest.raises(RecipeError, match=said):
        built(*overrides)
    assert not (tmp_path / "owned").exists()


def test_what_fits_is_taken_where_that_is_asked_for(capsys):
    state = other_weights()
    torch.save({"stem.conv.weight": state["stem.conv.weight"], "a": torch.zeros(1)}, "start.pt")
    assert_loaded(built("plugins.start_weights.strict=false"), {"stem.conv.weight": state["stem.conv.weight"]})
    assert "1 of 20 tensors loaded" in capsys.readouterr().out

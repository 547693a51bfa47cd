import copy

import pytest
import torch
from acme_trainkit_swa import SWA
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import trainkit
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, assert_refuses, parameters_of, run_steps, watch


@plugin
class Net:
    """A network with batch normalization."""

    @hookimpl
    def model(self):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def test_it_is_torchs_average_with_statistics_of_the_training_images():
    reference, expected, evaluated = [], [], []

    def end(run):
        if run.step % 4 == 0 and run.epoch >= 1:
            if not reference:
                reference.append(AveragedModel(run.model))
            reference[0].update_parameters(run.model)
            update_bn((batch.images for batch in run.iterate("train")), reference[0])
            expected.append(copy.deepcopy(reference[0].module.state_dict()))

    swa = SWA(start=2)
    note = watch(step_end=end, epoch_end=lambda run: evaluated.append(copy.deepcopy(swa.state_dict())))
    run_steps({"net": Net(), "swa": swa, "watch": note}, steps=12, epochs=3)
    assert [state["count"] for state in evaluated] == [0, 1, 2]
    for state, wanted in zip(evaluated[1:], expected, strict=True):
        torch.testing.assert_close(state["average"], dict(wanted))


def test_the_average_is_what_is_evaluated():
    def outputs(plugins):
        seen = []
        note = watch(forward_end=lambda run, output: run.split == "test" and seen.append(output.detach().clone()))
        run = run_steps({"net": Net(), **plugins, "watch": note}, steps=8, epochs=2)
        return run, torch.cat(seen[-2:])

    run, plain = outputs({})
    averaged, output = outputs({"swa": SWA(start=1)})
    torch.testing.assert_close(parameters_of(averaged), parameters_of(run), rtol=0, atol=0)  # training does not see it
    assert not torch.equal(output, plain)


def test_a_run_that_was_cut_short_is_averaged_where_it_ends():
    swa = SWA(start=1)
    run_steps({"net": Net(), "swa": swa}, steps=6, epochs=3)
    assert swa.state_dict()["count"] == 2


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms(SWA, beside={"net": Net()}, start=1)
    assert_conforms(SWA, beside={"net": Net()}, start=2)


def test_wrong_options_are_refused():
    assert_refuses(SWA, "start", 0)
    assert_refuses(SWA, "start")


RECIPE = """\
name: averaged
epochs: 3
batch_size: 256
device: cpu
plugins:
  digits:
  random_crop: {size: 8, padding: 1}
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  average: {start: 2}
  cross_entropy:
  sgd: {lr: 0.1}
  autocast:
  metrics:
  metric_log:
  checkpoint:
"""


def test_evaluate_gives_what_the_run_gave(tmp_path, monkeypatch):
    for name in ("digits", "random_crop", "normalize", "resnet", "checkpoint", "autocast"):
        pytest.importorskip(f"trainkit_{name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "averaged.yaml").write_text(RECIPE)
    run = trainkit.build(trainkit.load_recipe(tmp_path / "averaged.yaml"))
    result = trainkit.fit(run, run_dir=tmp_path / "run")
    loaded = trainkit.build(trainkit.load_recipe(tmp_path / "run" / "recipe.yaml"))
    loaded.load_state_dict(torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True))
    assert trainkit.evaluate(loaded)["test_accuracy"] == result.final["test_accuracy"]

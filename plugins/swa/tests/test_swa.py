import pytest
import torch
from attrs import field
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import update_bn as torchs_update_bn

from trainkit import build, fit, load_model, load_recipe
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_refuses, build_run, run_steps, watch
from trainkit_accumulate import Accumulate
from trainkit_freeze import Freeze
from trainkit_metrics import Metrics
from trainkit_random_horizontal_flip import RandomHorizontalFlip
from trainkit_swa import SWA


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@plugin
class Reference:
    """torch's own average and statistics, beside the plugin, of the batches that training saw."""

    first: int
    average: AveragedModel = field(init=False)
    seen: list[torch.Tensor] = field(init=False, factory=list)

    @hookimpl
    def fit_start(self, run):
        self.average = AveragedModel(run.model)

    @hookimpl
    def epoch_start(self):
        self.seen = []

    @hookimpl
    def forward_end(self, run, batch):
        if run.split == "train":
            self.seen.append(batch.images.clone())

    @hookimpl
    def step_end(self, run):
        if run.batch_index == run.batches_per_epoch and run.epoch >= self.first:
            self.average.update_parameters(run.model)
            torchs_update_bn(self.seen, self.average)


@pytest.mark.parametrize("beside", [{}, {"accumulate": Accumulate(batches=3)}])
def test_weights_and_statistics_are_torchs_of_the_images_that_training_saw(beside):
    swa, reference = SWA(start=2), Reference(first=1)
    run = run_steps({"flip": RandomHorizontalFlip(), **beside, "swa": swa, "reference": reference}, steps=100, epochs=4)
    assert run.epoch == 4
    ours, theirs = swa.eval_model().state_dict(), reference.average.module.state_dict()
    assert same(ours.values(), theirs.values())
    assert not same(ours.values(), run.model.state_dict().values())
    assert swa.eval_model()[1].momentum == run.model[1].momentum


@pytest.mark.parametrize(
    ("start", "averaged"), [(0, 8), (0.0, 8), (0.75, 2), (0.99, 1), (0.3, 6), (1, 8), (1.0, 8), (7, 2), (8, 1)]
)
def test_the_average_begins_after_a_part_of_the_run_or_with_an_epoch(start, averaged):
    swa = SWA(start=start)
    run_steps({"swa": swa}, steps=100, epochs=8, batch_size=32)
    assert swa.state_dict()["averaged"] == averaged


def test_a_part_of_the_run_is_not_rounded_to_the_epoch_before():
    swa = SWA(start=0.29)  # 0.29 * 100 < 29 in binary numbers
    run_steps({"swa": swa}, steps=100, epochs=100, batch_size=32)
    assert swa.state_dict()["averaged"] == 71


def test_an_epoch_that_is_cut_short_is_not_averaged():
    swa = SWA(start=1)
    run = run_steps({"swa": swa}, steps=6, epochs=2)
    assert (run.step, swa.state_dict()["averaged"]) == (6, 1)


def test_the_average_is_evaluated_and_training_does_not_see_it():
    swa = SWA(start=0)
    run = run_steps({"swa": swa, "metrics": Metrics()}, steps=8)
    without = run_steps({"metrics": Metrics()}, steps=8)
    assert same(run.model.state_dict().values(), without.model.state_dict().values())
    with torch.no_grad():
        output = swa.eval_model()(run.data.test.images / 255)
    loss = torch.nn.functional.cross_entropy(output, run.data.test.targets)
    assert run.history[-1]["test_loss"] == pytest.approx(float(loss))
    assert run.history[-1]["test_loss"] != without.history[-1]["test_loss"]


def test_the_trained_network_is_evaluated_until_the_average_begins():
    run = run_steps({"swa": SWA(start=3), "metrics": Metrics()}, steps=9, epochs=3)
    without = run_steps({"metrics": Metrics()}, steps=9, epochs=3)
    assert [row["test_loss"] for row in run.history] == [row["test_loss"] for row in without.history]
    assert run.state_dict()["plugins"]["swa"]["state"]["model"] is None


def test_a_frozen_part_keeps_its_statistics():
    swa = SWA(start=0)
    run = run_steps({"freeze": Freeze(modules=["1"]), "swa": swa}, steps=8)
    assert torch.equal(swa.eval_model()[1].running_mean, torch.zeros(8))  # as they began
    assert same(swa.eval_model()[1].state_dict().values(), run.model[1].state_dict().values())


def test_a_network_without_batch_normalization_is_spared_the_pass():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    batches = []
    count = watch(transform_batch=lambda run, batch: batches.append(run.split) or batch)
    run_steps({"network": watch(model=lambda: network), "count": count, "swa": SWA(start=0)}, steps=4)
    assert batches.count("train") == 4


RECIPE = """\
name: averaged
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  swa: {start: 1}
  metrics:
  checkpoint:
"""


def test_a_loaded_network_is_the_average_with_its_statistics_and_needs_no_images(tmp_path):
    (tmp_path / "averaged.yaml").write_text(RECIPE)
    run = build(load_recipe(tmp_path / "averaged.yaml"))
    fit(run, tmp_path / "run")
    loaded = load_model(tmp_path / "run", "last")
    average = run.hooks.plugins["swa"].instance.eval_model()
    assert same(loaded.model.state_dict().values(), average.state_dict().values())
    accuracy = (loaded.predict(run.data.test.images).argmax(1) == run.data.test.targets).double().mean()
    assert run.history[-1]["test_accuracy"] == pytest.approx(100 * float(accuracy))


def test_a_run_that_ends_before_the_average_begins_is_an_error(tmp_path):
    run = build_run({"swa": SWA(start=4)}, epochs=3)
    with pytest.raises(RecipeError, match="'start': the run has 3 epochs, and the average begins with epoch 4"):
        fit(run, tmp_path / "run")


def test_start_is_a_part_or_an_epoch():
    assert_refuses(SWA, "start", -0.1, 1.5, -1, float("nan"), float("inf"))

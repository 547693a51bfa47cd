import copy
import json

import pytest
import torch
from acme_trainkit_distill import Distill
from torch.nn.functional import cross_entropy, softmax

import trainkit
from trainkit.errors import TrainkitError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, assert_refuses, build_run, run_steps, watch

RECIPE = """\
name: distilled
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  distill: {teacher: teacher.pt}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  metric_log:
  checkpoint:
"""


@plugin
class Linear:
    """No batch normalization."""

    @hookimpl
    def model(self):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))


@pytest.fixture
def teacher(tmp_path):
    """A file with the weights of another network of the tests' architecture."""
    path = tmp_path / "teacher.pt"
    torch.save(build_run({}, seed=7).model.state_dict(), path)
    return path


def test_the_loss_is_that_of_the_paper(teacher):
    model = copy.deepcopy(build_run({}, seed=7).model).eval()
    seen, changed = [], []

    def before(run, loss):
        logits = [run.output.detach() / 2, model(run.batch.images).detach() / 2]
        p, q = softmax(logits[1], 1), softmax(logits[0], 1)
        kl = (p * (p / q).log()).sum(1).mean()
        seen.append(0.75 * cross_entropy(run.output.detach(), run.batch.targets) + 0.25 * 4 * kl)
        return loss

    def after(run, loss):
        changed.append(loss.detach())
        return loss

    plugins = {
        "before": watch(transform_loss=before),
        "distill": Distill(teacher=teacher, temperature=2.0, weight=0.25),
        "after": watch(transform_loss=after),
    }
    run_steps(plugins, steps=3)
    torch.testing.assert_close(changed, seen)


def test_the_output_of_the_student_stays_what_later_plugins_see(teacher):
    outputs = []

    def note(run, loss):
        outputs.append(run.output)
        return loss

    run_steps(
        {"one": watch(transform_loss=note), "distill": Distill(teacher=teacher), "two": watch(transform_loss=note)}
    )
    assert len(outputs) == 4
    assert outputs[0] is outputs[1]
    assert outputs[2] is outputs[3]


def test_two_accumulated_batches_are_one_large_one(teacher):
    accumulate = pytest.importorskip("trainkit_accumulate").Accumulate

    torch.save(build_run({"linear": Linear()}, seed=7).model.state_dict(), teacher)
    halves = {"linear": Linear(), "distill": Distill(teacher=teacher), "accumulate": accumulate(batches=2)}
    one = run_steps(halves, batch_size=4).model
    other = run_steps({"linear": Linear(), "distill": Distill(teacher=teacher)}, batch_size=8).model
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_listed_before_accumulate(teacher):
    accumulate = pytest.importorskip("trainkit_accumulate").Accumulate
    with pytest.raises(TrainkitError, match="accumulate"):
        build_run({"accumulate": accumulate(), "distill": Distill(teacher=teacher)})


def test_it_keeps_the_promises_of_every_plugin(teacher):
    assert_conforms(Distill, teacher=str(teacher))


def test_wrong_options_are_refused(teacher):
    assert_refuses(Distill, "teacher")
    assert_refuses(Distill, "temperature", 0, teacher=str(teacher))
    assert_refuses(Distill, "weight", -0.1, 1.1, teacher=str(teacher))


def test_weights_of_another_network_are_refused(teacher):
    torch.save({"weight": torch.ones(1)}, teacher)
    with pytest.raises(TrainkitError, match="teacher"):
        build_run({"distill": Distill(teacher=teacher)})
    teacher.write_bytes(b"no state dict")
    with pytest.raises(TrainkitError, match="teacher"):
        build_run({"distill": Distill(teacher=teacher)})


def test_a_run_records_its_teacher_and_does_not_go_on_with_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "distilled.yaml"
    recipe.write_text(RECIPE)
    first = trainkit.build(trainkit.load_recipe(recipe, ["plugins.distill=false"]))
    trainkit.fit(first, run_dir=tmp_path / "first")
    (tmp_path / "teacher.pt").write_bytes((tmp_path / "first/checkpoints/best.pt").read_bytes())
    run = trainkit.build(trainkit.load_recipe(recipe, ["max_steps=7"]))
    trainkit.fit(run, run_dir=tmp_path / "run")
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert "teacher" in json.dumps(environment)
    (tmp_path / "teacher.pt").unlink()  # the run directory keeps a copy
    trainkit.resume(tmp_path / "run")
    (copied,) = (path for path in (tmp_path / "run").rglob("*teacher*"))
    copied.write_bytes((tmp_path / "run/checkpoints/last.pt").read_bytes())
    with pytest.raises(TrainkitError, match="teacher"):
        trainkit.resume(tmp_path / "run", ["max_steps=9"])

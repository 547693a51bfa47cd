import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import nn

from trainkit import build, fit, load_model, load_recipe, resume
from trainkit.errors import RecipeError
from trainkit.provenance import compare, record
from trainkit.testing import assert_conforms, assert_refuses, build_run, parameters_of, run_steps, watch
from trainkit_digits import Digits
from trainkit_distillation import Distillation, distillation_loss
from trainkit_normalize import Normalize
from trainkit_random_horizontal_flip import RandomHorizontalFlip

RECIPE = """\
name: teacher
epochs: 1
batch_size: 256
device: cpu
plugins:
  digits:
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  ema: {decay: 0.5}
  metrics:
  checkpoint:
"""
STUDENT = (
    RECIPE.replace("ema: {decay: 0.5}", "distillation: {teacher: teacher}")
    .replace("name: teacher", "name: student")
    .replace("epochs: 1", "epochs: 2")
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The directory of a teacher's run, which averaged its weights."""
    home = tmp_path_factory.mktemp("distillation")
    (home / "teacher.yaml").write_text(RECIPE)
    fit(build(load_recipe(home / "teacher.yaml")), home / "teacher")
    return home / "teacher"


def network(run):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, len(run.data.classes)))


def few(data):
    """Return the first images of the digits, so that a test is fast."""
    return data.replace(train=data.train.subset(torch.arange(16)), test=data.test.subset(torch.arange(4)))


def beside(**more):
    normalize = Normalize(mean=[0.305], std=[0.376])
    return {"digits": Digits(), "few": watch(transform_data=few), "normalize": normalize, **more}


def student(distillation, **more):
    return {**beside(network=watch(model=network), flip=RandomHorizontalFlip()), "distillation": distillation, **more}


def by_hand(output, wanted, temperature):
    """Hinton's term in float64: the squared temperature times the sum over classes of q (log q - log p), averaged."""
    log_p, log_q = (log_softmax(x.double().numpy() / temperature, axis=1) for x in (output, wanted))
    return temperature**2 * (np.exp(log_q) * (log_q - log_p)).sum(1).mean()


@given(st.floats(0.5, 20), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_the_term_is_the_divergence_from_the_teacher(temperature, n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    output, wanted = (torch.randn(n, classes, generator=generator) * 3 for _ in range(2))
    found = distillation_loss(output, wanted, temperature)
    assert float(found) == pytest.approx(by_hand(output, wanted, temperature), rel=1e-3, abs=1e-5)
    assert float(distillation_loss(wanted, wanted, temperature)) == pytest.approx(0, abs=1e-4)


def test_the_term_is_added_for_the_augmented_batch_in_training_alone(teacher):
    before, seen = [], []

    def after(run, loss):
        seen.append((run.split, run.batch.images.clone(), run.output.detach().clone(), loss.detach()))
        return loss

    noted = watch(transform_loss=lambda loss: before.append(loss.detach()) or loss)
    listed = student(Distillation(teacher=teacher, temperature=3.0, alpha=0.25))
    first = {name: listed.pop(name) for name in list(listed) if name != "distillation"}
    run_steps({**first, "before": noted, **listed, "after": watch(transform_loss=after)}, steps=4)
    taught = load_model(teacher).model
    assert [split for split, *_ in seen] == ["train"] * 4
    for plain, (_, images, output, loss) in zip(before, seen, strict=True):
        with torch.no_grad():
            expected = 0.25 * by_hand(output, taught(images), 3.0)
        assert expected > 0.001
        assert float(loss - plain) == pytest.approx(expected, rel=1e-3)


def test_trains_as_a_plain_loop_with_the_teacher(teacher):
    ours = run_steps(student(Distillation(teacher=teacher, temperature=2.0, alpha=0.5)), steps=4)
    taught = load_model(teacher).model
    twin = build_run(student(Distillation(teacher=teacher)))
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    for twin.epoch in range(2):
        for batch in twin.iterate("train"):
            output = twin.model(batch.images)
            with torch.no_grad():
                wanted = (taught(batch.images) / 2).softmax(1)
            hard = nn.functional.cross_entropy(output, batch.targets)
            soft = nn.functional.kl_div((output / 2).log_softmax(1), wanted, reduction="batchmean")
            optimizer.zero_grad()
            (hard + 0.5 * 4 * soft).backward()
            optimizer.step()
    for a, b in zip(parameters_of(ours), parameters_of(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_of_the_teacher_is_trained_or_saved(teacher):
    distillation = Distillation(teacher=teacher)
    run = run_steps(student(distillation), steps=3)
    held = {p for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {*run.model.parameters()}
    state = run.state_dict()
    assert "distillation" not in state["plugins"]
    assert len(state["model"]) == 2
    taught, original = distillation._teacher.model, load_model(teacher).model
    assert all(map(torch.equal, taught.state_dict().values(), original.state_dict().values()))
    assert not any(part.training for part in taught.modules())
    assert not any(p.requires_grad or p.grad is not None for p in taught.parameters())


def test_it_keeps_the_promises_of_every_plugin(teacher, monkeypatch):
    monkeypatch.setattr("trainkit.testing.conformance.assert_light_imports", lambda *modules: None)  # tests/ has that
    assert_conforms(Distillation, beside=beside(network=watch(model=network)), teacher=str(teacher))


def test_a_student_is_resumed_where_the_teacher_is_gone_and_has_the_same_record(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    (tmp_path / "student.yaml").write_text(STUDENT)
    whole = build(load_recipe(tmp_path / "student.yaml"))
    fit(whole, tmp_path / "whole")
    fit(build(load_recipe(tmp_path / "student.yaml")), tmp_path / "out", max_steps=3)
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "out").rename(tmp_path / "moved")
    kept = tmp_path / "moved" / "files" / "distillation" / "teacher"
    assert sorted(p.name for p in kept.rglob("*") if p.is_file()) == ["best.pt", "data.json", "recipe.yaml"]
    result = resume(tmp_path / "moved")
    assert result.final == {name: whole.history[-1][name] for name in result.final}


def test_another_teacher_is_another_number(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    before = record(build_run(student(Distillation(teacher=tmp_path / "teacher"))))
    assert {*before["declared"]["distillation"]} >= {"teacher.resnet", "teacher.ema"}
    path = tmp_path / "teacher" / "recipe.yaml"
    path.write_text(path.read_text() + "# another\n")
    (difference,) = compare(before, record(build_run(student(Distillation(teacher=tmp_path / "teacher")))))
    assert (difference.key, difference.effect) == ("plugins.distillation.teacher", "numbers")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"normalize": watch()}, "preprocessing of test images gives other values than this run's; list the same"),
        (
            {"few": watch(transform_data=lambda data: few(data).replace(classes=tuple("0123456798")))},
            "it has '8' in place of '9'; train it on the same classes",
        ),
        (
            {"few": watch(transform_data=lambda data: few(data).replace(classes=tuple("0123456789a")))},
            "it has 10 in place of 11; train it on the same classes",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_clear_error(teacher, changed, said):
    with pytest.raises(RecipeError, match=f"'teacher': .*: .*{said}"):
        build_run({**student(Distillation(teacher=teacher)), **changed})


def test_images_of_another_shape_are_an_error(teacher):
    names = watch(transform_data=lambda data: data.replace(classes=tuple("0123456789")))
    with pytest.raises(RecipeError, match=r"it takes images \[1, 8, 8\], and these are \[3, 8, 8\]"):
        build_run({"names": names, "distillation": Distillation(teacher=teacher)})


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_is_no_run_is_an_error(tmp_path, made):
    if made:
        (tmp_path / "teacher").mkdir()
    with pytest.raises(RecipeError, match="'teacher': .*not the directory of a run"):
        build_run(student(Distillation(teacher=tmp_path / "teacher")))


def test_options_are_greater_than_0(teacher):
    assert_refuses(Distillation, "temperature", 0, -1, teacher=str(teacher))
    assert_refuses(Distillation, "alpha", 0, -1, teacher=str(teacher))
    assert_refuses(Distillation, "teacher")

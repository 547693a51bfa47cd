import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainkit import Metric, evaluate
from trainkit.errors import RecipeError
from trainkit.testing import build_run, run_steps, watch
from trainkit_checkpoint import Checkpoint
from trainkit_ema import EMA
from trainkit_tta import TTA


def airbench_views(model, images, flip, shift):
    """The outputs of airbench94's views, written out."""

    def mirrored(x):
        return 0.5 * model(x) + 0.5 * model(x.flip(-1)) if flip else model(x)

    if not shift:
        return mirrored(images)
    padded = F.pad(images, (shift,) * 4, "reflect")
    size = images.shape[-1]
    upper, lower = padded[:, :, :size, :size], padded[:, :, 2 * shift :, 2 * shift :]
    return 0.5 * mirrored(images) + 0.25 * mirrored(upper) + 0.25 * mirrored(lower)


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 2), (True, 1)])
def test_it_is_the_accuracy_of_the_averaged_views_beside_the_single_one(flip, shift):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    plugins = {"network": watch(model=lambda: model), "ema": EMA(decay=0.5), "tta": TTA(flip=flip, shift=shift)}
    run = run_steps(plugins, steps=3)
    found = evaluate(run)
    images, targets = run.data.test.images / 255, run.data.test.targets
    network = run.evaluated_model()
    assert network is not run.model
    with torch.no_grad():
        views = airbench_views(network, images, flip, shift)
    assert found["test_accuracy_tta"] == pytest.approx(100 * float((views.argmax(1) == targets).double().mean()))
    alone = build_run({"network": watch(model=lambda: model)})
    assert {name for name in found if "tta" not in name} == set(evaluate(alone))


def test_in_a_run_it_is_evaluated_when_it_is_due():
    def epochs(every):
        run = run_steps({"tta": TTA(every=every)}, steps=None, epochs=5)
        return [row["epoch"] for row in run.history if "test_accuracy_tta" in row]

    assert [epochs(every) for every in (0, 1, 2)] == [[5], [1, 2, 3, 4, 5], [2, 4, 5]]


def test_the_test_split_at_the_end_is_looked_at_whichever_epoch_was_selected(tmp_path):
    """It is evaluated on the best epoch's state, whose epoch is not the last one."""
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    worse = watch(metrics=lambda run, split: {"early": Metric(float(run.epoch), better="less")})
    plugins = {"held_out": held_out, "tta": TTA(), "worse": worse, "checkpoint": Checkpoint(best="early")}
    run = run_steps(plugins, steps=None, run_dir=tmp_path / "run", epochs=4)
    assert run.dir.load_state("best")["position"]["epoch"] == 1
    assert "test_accuracy_tta" in run.tested
    assert [row["epoch"] for row in run.history if "validation_accuracy_tta" in row] == [4]


def test_a_run_of_max_steps_ends_with_it():
    run = run_steps({"tta": TTA()}, steps=None, epochs=9, max_steps=6)
    assert ["test_accuracy_tta" in row for row in run.history] == [False, True]


def test_an_output_that_is_not_finite_is_wrong():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.full((len(images), 4), torch.nan) * self.weight

    assert evaluate(build_run({"network": watch(model=Broken), "tta": TTA()}))["test_accuracy_tta"] == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"flip": False}, "one view alone"), ({"shift": 8}, "'shift': 8 is not less than the sides of the images, 8x8")],
)
def test_what_makes_no_other_view_is_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"tta": TTA(**options)})

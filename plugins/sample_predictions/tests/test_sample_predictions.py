import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit import TensorSplit, load_model
from trainkit.cli import main
from trainkit.errors import RecipeError
from trainkit.processes import Processes
from trainkit.testing import assert_conforms, run_steps, watch
from trainkit_digits import Digits
from trainkit_metrics import Metrics
from trainkit_sample_predictions import Prediction, SamplePredictions, _Kept, draw

RECIPE = """\
name: looked_at
epochs: 3
batch_size: 100
device: cpu
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [8]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  sample_predictions: {mistakes: 6, random: 5}
  checkpoint:
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "recipe.yaml"), "--run-dir", str(folder / "out")]) == 0
    return folder / "out"


def test_the_surest_mistakes_and_some_images_of_the_best_epoch_are_told(run):
    told = json.loads((run / "figures" / "predictions.json").read_text())
    test = run_steps({"digits": Digits()}, steps=1).data.test
    probabilities = load_model(run).predict(test.images)  # best.pt
    probability, predicted = probabilities.max(1)
    wrong = (predicted != test.targets).nonzero().flatten().tolist()
    surest = sorted(wrong, key=lambda n: -probability[n])[:6]
    assert told["wrong"] == len(wrong) > 6
    assert [row["image"] for row in told["mistakes"]] == surest
    for row in (*told["mistakes"], *told["random"]):
        n = row["image"]
        assert (row["class"], row["taken_for"]) == (str(int(test.targets[n])), str(int(predicted[n])))
        assert row["probability"] == pytest.approx(float(probability[n]), abs=1e-5)
    chosen = [row["image"] for row in told["random"]]
    assert len(set(chosen)) == 5
    assert chosen == sorted(chosen)
    best = json.loads((run / "result.json").read_text())["best"]["test_accuracy"]["epoch"]
    assert (told["split"], told["epoch"]) == ("test", best)
    assert np.asarray(Image.open(run / "figures" / "predictions.png")).shape[1] == 720


def test_stored_images_are_drawn_with_their_captions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("trainkit_sample_predictions.draw", lambda *args: drawn.append(args) or draw(*args))
    run = run_steps(
        {"metrics": Metrics(), "sample_predictions": SamplePredictions(mistakes=3, random=2)},
        run_dir=tmp_path / "run",
    )
    ((_, parts, images, _),) = drawn
    assert {p.image for part in parts.values() for p in part} == set(images)
    assert all(torch.equal(image, run.data.test[n][0]) for n, image in images.items())


def test_an_epoch_without_mistakes_and_outputs_that_are_not_finite_are_drawn():
    images = {n: torch.zeros(channels, 8, 6, dtype=torch.uint8) for n, channels in enumerate((1, 3, 4, 3, 3))}
    predictions = [Prediction(n, 0, n % 2, 0.99999) for n in range(4)]
    parts = {"No image": [], "At random": [*predictions, Prediction(4, 1, -1, math.nan)]}
    figure = draw("cost: $1 $2", parts, images, ["$a$", "b" * 40])
    figure.savefig(io.BytesIO(), format="png")
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert captions[:2] == ["$a$\nright\n99.9 %", f"$a$\n→ {'b' * 17}…\n99.9 %"]
    assert captions[4] == f"{'b' * 17}…\noutput is not finite\n"


def test_what_is_kept_does_not_depend_on_how_images_come_in_batches():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(50, 4, generator=generator)
    output[10:14] = output[10]  # equally sure
    output[20] = math.nan
    targets = torch.randint(4, (50,), generator=generator)
    targets[10:14] = (output[10].argmax() + 1) % 4
    chosen = torch.tensor([3, 20, 49])

    def kept(size):
        found = _Kept(7, chosen)
        for start in range(0, 50, size):
            part = slice(start, start + size)
            found.add(torch.arange(50)[part], targets[part], output[part])
            assert len(found.mistakes) <= 7
        return repr(found.read())

    assert kept(50) == kept(7) == kept(1)
    assert "Prediction(image=20, target=" in kept(50)
    assert "predicted=-1, probability=nan" in kept(50)


def test_several_processes_see_together_what_one_sees():
    looks = SamplePredictions(mistakes=4, random=3)
    run = run_steps({"metrics": Metrics(), "sample_predictions": looks}, steps=1)
    output = torch.randn(16, len(run.data.classes), generator=torch.Generator().manual_seed(1))
    targets = run.data.test.targets[:16]

    def kept(start, stop):
        found = _Kept(4, looks._chosen)
        found.add(torch.arange(start, stop), targets[start:stop], output[start:stop])
        return found

    class Both(Processes):
        def all_gather(self, value):
            return [value, kept(9, 16).read()]

    run.processes = Both()
    looks._current = kept(0, 9)
    looks.safe_point(run)
    assert (looks._wrong, looks._surest, looks._sample) == kept(0, 16).read()


def test_it_changes_no_bit_and_resumes_exactly():
    assert_conforms(SamplePredictions, beside={"metrics": Metrics()}, mistakes=3, random=2)


def test_nothing_waits_for_the_device_while_a_split_is_evaluated():
    kept = _Kept(3, torch.zeros(2, dtype=torch.int64, device="meta"))
    numbers = torch.empty(8, dtype=torch.int64, device="meta")
    for _ in range(2):  # whatever would wait raises there
        kept.add(numbers, numbers, torch.empty(8, 4, device="meta"))


def test_other_targets_than_classes_are_refused():
    def change(split):
        return TensorSplit(split.images, torch.zeros(len(split), 3))

    several = watch(transform_data=lambda data: data.replace(train=change(data.train), test=change(data.test)))
    plugins = {"several": several, "metrics": Metrics(accuracy=False), "predictions": SamplePredictions()}
    with pytest.raises(RecipeError, match="the data's targets are none; drop the plugin"):
        run_steps(plugins, steps=1)

import json

import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from trainkit import load_model, load_recipe
from trainkit.cli import main
from trainkit.inference import count_confusion
from trainkit.testing import run_steps
from trainkit_confusion_matrix import ConfusionMatrix, draw
from trainkit_digits import Digits
from trainkit_metrics import Metrics

RECIPE = """\
name: confused
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  confusion_matrix:
  checkpoint:
"""


def test_the_counts_are_those_of_the_best_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "confused.yaml").write_text(RECIPE)
    assert main(["run", "confused.yaml", "--run-dir", "out"]) == 0
    found = json.loads((tmp_path / "out" / "figures" / "confusion.json").read_text())
    test = run_steps({"digits": Digits()}, steps=1).data.test
    predicted = load_model("out").predict(test.images).argmax(1)
    assert found["confusion_matrix"] == confusion_matrix(test.targets, predicted, labels=range(10)).tolist()
    best = json.loads((tmp_path / "out" / "result.json").read_text())["best"]["test_accuracy"]["epoch"]
    assert (found["epoch"], found["classes"]) == (best, [str(digit) for digit in range(10)])
    assert (tmp_path / "out" / "figures" / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert load_recipe("out/recipe.yaml").plugins["confusion_matrix"] == {}


def test_the_command_draws_any_split_and_other_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "confused.yaml").write_text(RECIPE)
    assert main(["run", "confused.yaml", "--run-dir", "out", "epochs=1"]) == 0
    drawn = json.loads((tmp_path / "out" / "figures" / "confusion.json").read_text())["confusion_matrix"]
    capsys.readouterr()
    assert main(["runs", "confusion", "out", "-o", "c.svg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confusion_matrix"] == drawn
    assert "Test images, epoch 1: confused" in (tmp_path / "c.svg").read_text()
    zero = run_steps({"digits": Digits()}, steps=1).data.test.images[0, 0]
    (tmp_path / "new" / "0").mkdir(parents=True)
    Image.fromarray(zero.numpy()).save(tmp_path / "new" / "0" / "a.png")
    assert main(["runs", "confusion", "out", "--images", "new", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["confusion_matrix"]
    assert sum(row[0]) == sum(map(sum, row)) == 1
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["runs", "confusion", "out", "-o", "c.jpeg"]) == 2
    assert main(["runs", "confusion", "out", "--split", "more"]) == 2


@pytest.mark.parametrize("n", [2, 100])
def test_names_and_counts_are_written_where_they_fit(n):
    counts = torch.eye(n, dtype=torch.int64).tolist()
    (axes, _) = draw(counts, [f"class {i}" for i in range(n)], "title").axes
    assert [text.get_text() for text in axes.texts] == ["1", "1"] * (n == 2)


def test_other_targets_than_classes_are_refused():
    from trainkit import TensorSplit
    from trainkit.errors import RecipeError
    from trainkit.testing import watch

    def change(split):
        return TensorSplit(split.images, torch.zeros(len(split), 3))

    several = watch(transform_data=lambda data: data.replace(train=change(data.train), test=change(data.test)))
    with pytest.raises(RecipeError, match="the data's targets are none; drop the plugin"):
        run_steps({"several": several, "metrics": Metrics(accuracy=False), "confused": ConfusionMatrix()}, steps=1)


def test_an_output_that_is_not_finite_is_no_class():
    counts = torch.zeros(4, dtype=torch.int64)
    output = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0], [3.0, 2.0]])
    count_confusion(counts, torch.tensor([0, 0, 0, 0]), output)
    assert counts.tolist() == [1, 1, 0, 0]

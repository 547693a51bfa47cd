import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from trainkit import load_model
from trainkit.cli import main

RECIPE = """\
name: colours
epochs: 6
batch_size: 8
device: cpu
plugins:
  image_folder: {root: images, size: 8}
  random_horizontal_flip:
  normalize: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.05, momentum: 0.9}
  ema: {decay: 0.8}
  metrics:
  checkpoint:
"""
COLOURS = {"blue": (30, 40, 220), "green": (40, 210, 50), "red": (220, 30, 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on made photographs of three colours, whose data set is gone."""
    folder = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 9)):
        for name, colour in COLOURS.items():
            home = folder / "images" / split / name
            home.mkdir(parents=True)
            for n in range(number):
                pixels = np.clip(np.array(colour) + rng.normal(0, 45, (11, 14, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"{n}.png")
    (folder / "colours.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "colours.yaml", "--run-dir", "run"]) == 0
        (folder / "images").rename(folder / "photos")
        read = load_model("run").read
        images = np.stack([read(path).numpy() for path in sorted((folder / "photos" / "test").rglob("*.png"))])
        np.save("first.npy", images)
    return folder


@pytest.fixture(autouse=True)
def here(run, monkeypatch):
    monkeypatch.chdir(run)


def test_predictions_of_the_test_files_give_the_recorded_accuracy(run, capsys):
    """Every pixel is the one that evaluation saw, and the weights are the averaged ones that it used."""
    assert main(["predict", "run", "photos/test", "--checkpoint", "last", "--output", "predictions.csv"]) == 0
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert list(rows[0]) == ["ID", "Label"]
    right = [row["ID"].split("/")[-2] == row["Label"] for row in rows]
    recorded = json.loads((run / "run" / "result.json").read_text())["final"]["test_accuracy"]
    assert len(rows) == 27
    assert 100 * sum(right) / len(right) == pytest.approx(recorded)


def test_arrays_files_and_python_say_the_same(run, capsys):
    paths = sorted((run / "photos" / "test").rglob("*.png"))
    model = load_model("run")
    np.save("last.npy", np.load("first.npy").transpose(0, 2, 3, 1))
    found = []
    for given in (["photos/test"], ["first.npy"], ["last.npy"]):
        assert main(["predict", "run", *given, "--json", "--probabilities"]) == 0
        found.append([one["probabilities"] for one in json.loads(capsys.readouterr().out)])
    assert found[0] == found[1] == found[2]
    expected = model.predict(paths)
    assert model.classes == ("blue", "green", "red")
    assert [list(one.values()) for one in found[0]] == expected.tolist()
    assert expected.sum(1).tolist() == pytest.approx([1.0] * len(paths))


def test_the_most_probable_classes_come_first(run, capsys):
    assert main(["predict", "run", "first.npy", "--top", "2", "--output", "top.csv", "--index"]) == 0
    rows = list(csv.DictReader((run / "top.csv").open()))
    assert list(rows[0]) == ["ID", "Label", "Label_1", "Probability_1", "Label_2", "Probability_2"]
    assert [row["ID"] for row in rows] == [str(n) for n in range(27)]
    assert all(row["Label"] == row["Label_1"] in "012" for row in rows)
    assert all(float(row["Probability_1"]) >= float(row["Probability_2"]) for row in rows)


def test_what_cannot_be_decoded_is_named_and_the_rest_is_predicted(run, tmp_path, capsys):
    good = next((run / "photos" / "test" / "red").glob("*.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    name = os.fsdecode(b"good \xfe.png")  # bytes that are no UTF-8
    (tmp_path / name).write_bytes(good.read_bytes())
    assert main(["predict", "run", str(tmp_path), "--output", "some.csv"]) == 1
    said = capsys.readouterr().err
    assert "bad.png: cannot be decoded" in said
    assert "1 of 2 images have no prediction" in said
    _, row = (run / "some.csv").read_bytes().splitlines()
    assert row.startswith(os.fsencode(tmp_path / name))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        (["empty"], "empty: no images here"),
        (["wrong.npy"], "wrong.npy: expected uint8 [N, 8, 8, 3] or [N, 3, 8, 8], got float64 [2, 8, 8, 3]"),
        (["objects.npy"], "objects.npy: not an array of images"),
        (["first.npy", "--top", "0"], "--top: at least 1"),
    ],
)
def test_what_is_no_image_is_one_clear_error(run, capsys, given, said):
    (run / "empty").mkdir(exist_ok=True)
    np.save("wrong.npy", np.zeros((2, 8, 8, 3)))
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert main(["predict", "run", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_network_of_nan_predicts_nothing_and_other_targets_are_no_classes(run, tmp_path, monkeypatch, capsys):
    def spoiled(model):
        for parameter in model.model.parameters():
            parameter.data.fill_(float("nan"))
        return model

    model = spoiled(load_model("run"))
    monkeypatch.setattr("trainkit.inference.load_model", lambda *args, **options: model)
    assert main(["predict", "run", "first.npy", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert "27 of 27 images have no prediction" in printed.err
    monkeypatch.undo()
    monkeypatch.chdir(run)
    data = json.loads((run / "run" / "data.json").read_text())
    shutil.copytree(run / "run", tmp_path / "other")
    (tmp_path / "other" / "data.json").write_text(json.dumps({**data, "target": "other"}))
    assert main(["predict", str(tmp_path / "other"), "first.npy"]) == 2
    assert "targets that are no classes" in capsys.readouterr().err

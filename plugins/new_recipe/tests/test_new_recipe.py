import json

import numpy as np
import pytest
import torch
from PIL import Image

from trainkit import build, load_recipe
from trainkit.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(*folders, number=8, size=(40, 44)):
    rng = np.random.default_rng(0)
    for folder in folders:
        for n in range(number):
            path = folder / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def test_class_folders_alone_become_a_recipe_that_trains(tmp_path, capsys):
    pictures(tmp_path / "my photos" / "cat", tmp_path / "my photos" / "dog", number=20)
    assert main(["recipes", "new", "--data", "my photos"]) == 0
    said = capsys.readouterr().out
    assert "my photos: 40 images of 2 classes: cat, dog" in said
    assert "trainkit run my_photos.yaml --dry-run" in said
    fast = ["epochs=1", "plugins.resnet={stem: 4, blocks: [1], channels: [4]}", "plugins.linear_warmup=false"]
    assert main(["run", "my_photos.yaml", "--run-dir", "out", *fast]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "completed"
    assert {"test_accuracy", "validation_accuracy"} <= result["final"].keys()
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"figures/accuracy.png", "figures/confusion.png", "ledger.jsonl", "weights/best.safetensors"} <= made
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    assert {name: split["images"] for name, split in data["splits"].items()} == {
        "train": 27,
        "validation": 5,
        "test": 8,
    }
    assert data["shape"] == [3, 32, 32]


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_splits_are_taken_as_they_are(tmp_path, test):
    folders = [tmp_path / "data" / split / name for split in ("train", test) for name in ("a", "b", "c")]
    pictures(*folders)
    assert main(["recipes", "new", "--data", "data", "-o", "new.yaml"]) == 0
    run = build(load_recipe("new.yaml"))
    assert {name: len(split) for name, split in run.data.splits.items()} == {"train": 20, "validation": 4, "test": 24}


def test_a_table_is_taken_as_it_says(tmp_path):
    pictures(tmp_path / "data", number=12)
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 4
    rows = [f"{n}.png,{'ab'[n % 2]},{split}" for n, split in enumerate(splits)]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    assert main(["recipes", "new", "--data", "data/labels.csv", "--size", "16"]) == 0
    run = build(load_recipe("data.yaml"))
    assert {name: len(split) for name, split in run.data.splits.items()} == {"train": 6, "validation": 2, "test": 4}
    assert run.data.shape == (3, 16, 16)


def test_fine_tuning_of_a_published_network(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    pictures(tmp_path / "data" / "a", tmp_path / "data" / "b", number=10)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), "published.pt")
    arguments = ["recipes", "new", "--data", "data", "--model", "timm:test_resnet", "--weights", "published.pt"]
    assert main(arguments) == 0
    assert "mean: [0.485, 0.456, 0.406]" in (tmp_path / "data.yaml").read_text()
    capsys.readouterr()
    build(load_recipe("data.yaml"))
    assert "keep their initial values" in " ".join(capsys.readouterr().out.split())


def test_only_installed_plugins_are_listed(tmp_path, monkeypatch):
    import trainkit_new_recipe

    whole = trainkit_new_recipe.installed
    monkeypatch.setattr(
        trainkit_new_recipe, "installed", lambda group: {k: v for k, v in whole(group).items() if k != "figures"}
    )
    pictures(tmp_path / "data" / "a", tmp_path / "data" / "b")
    assert main(["recipes", "new", "--data", "data"]) == 0
    text = (tmp_path / "data.yaml").read_text()
    assert "# not installed, so not listed: figures\n" in text
    assert "figures" not in load_recipe("data.yaml").plugins


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "one"], "one: found 1 class, and a recipe needs two"),
        (["--data", "empty"], "empty: its folders hold no images: a, b"),
        (["--data", "two", "--model", "vgg"], "expected resnet, timm:NAME or torchvision:NAME"),
        (["--data", "two", "--weights", "no.pt"], "--weights: no.pt: no such file"),
        (["--data", "two", "--size", "2"], "--size: at least 8 pixels"),
        (["--data", "two", "-o", "there.yaml"], "there.yaml: exists; name another file with -o"),
        (["--data", "bad.csv"], "bad.csv: expected a first line with the columns path,label"),
    ],
)
def test_what_cannot_be_is_one_clear_error(tmp_path, capsys, arguments, said):
    pictures(tmp_path / "one" / "a", tmp_path / "two" / "a", tmp_path / "two" / "b", number=2)
    for name in "ab":
        (tmp_path / "empty" / name).mkdir(parents=True)
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "bad.csv").write_text("file,class\n")
    assert main(["recipes", "new", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"

"""A network in use, on images that are not those of its data set."""

import json
import shutil

import pytest
import torch
from PIL import Image

from trainkit import build, load_model, load_recipe
from trainkit.cli import main
from trainkit.rundir import RunDir, pack_state

from .conftest import SMALL


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and a folder of some of its test images, one folder a class; images and targets."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    assert main(["run", str(folder / "small.yaml"), "--run-dir", str(folder / "run")]) == 0
    test = build(load_recipe(folder / "small.yaml")).data.test
    for n, (image, target) in enumerate(zip(test.images[:40], test.targets[:40], strict=True)):
        place = folder / "new" / str(int(target))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{n}.png")
    return folder / "run", folder / "new", test.images[:40], test.targets[:40]


def test_images_in_folders_of_classes_are_counted_without_the_data_set(trained, capsys):
    run_dir, new, images, targets = trained
    assert main(["evaluate", str(run_dir), "--images", str(new), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    predicted = load_model(run_dir).outputs(images).argmax(1)
    assert found["images"] == 40
    assert found["accuracy"] == pytest.approx(100 * float((predicted == targets).float().mean()))
    expected = torch.zeros(10, 10, dtype=torch.int64).index_put_((targets, predicted), torch.tensor(1), accumulate=True)
    assert found["confusion_matrix"] == expected.tolist()
    assert main(["evaluate", str(run_dir), "--images", str(new), "--per-class"]) == 0
    assert "else mostly taken for" in capsys.readouterr().out


def test_its_metrics_are_those_of_the_epoch_whose_weights_it_has(trained):
    result = json.loads((trained[0] / "result.json").read_text())
    best = load_model(trained[0])
    assert best.metrics["test_accuracy"] == result["best"]["test_accuracy"]["value"]
    assert best.epoch == result["best"]["test_accuracy"]["epoch"]
    assert load_model(trained[0], "last").metrics == result["final"]


def test_weights_that_were_saved_within_an_epoch_have_no_metrics(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    directory = RunDir(tmp_path / "run")
    state = directory.load_state("last")
    state["position"]["step"] += 1
    directory.write("checkpoints/last.pt", pack_state(state))
    assert load_model(tmp_path / "run", "last").metrics == {}


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_counted(trained, tmp_path, capsys):
    run_dir, new, _, _ = trained
    (tmp_path / "test" / "7").mkdir(parents=True)
    (tmp_path / "test" / "7" / "broken.png").write_text("no image")
    Image.open(next((new / "7").iterdir())).save(tmp_path / "test" / "7" / "seven.png")
    assert main(["evaluate", str(run_dir), "--images", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "broken.png: cannot be decoded" in captured.err
    assert (json.loads(captured.out)["images"], json.loads(captured.out)["not_counted"]) == (1, 1)


@pytest.mark.parametrize(
    ("folder", "said"),
    [("eleven", "the network has no class 'eleven'; there are 0, 1"), (".", "no images in folders of classes")],
)
def test_folders_that_are_no_classes_are_refused(trained, tmp_path, capsys, folder, said):
    (tmp_path / folder).mkdir(exist_ok=True)
    assert main(["evaluate", str(trained[0]), "--images", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_what_the_data_set_would_say_is_refused_beside_other_images(trained, capsys):
    run_dir, new, _, _ = trained
    assert main(["evaluate", str(run_dir), "--images", str(new), "--data", "elsewhere"]) == 2
    assert "--images: takes neither --data nor" in capsys.readouterr().err

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import trainkit_export
from trainkit import load_model
from trainkit.cli import main
from trainkit.errors import RunError
from trainkit.recipe import from_dict
from trainkit.rundir import RunDir, pack_state
from trainkit_digits import Digits

RECIPE = """\
name: shared
description: "kernels | shared"
source: "[a](javascript:b)"
epochs: 2
batch_size: 64
device: cpu
expect: {test_accuracy: 90}
plugins:
  digits:
  normalize: {mean: [0.3], std: [0.4]}
  resnet: {stem: 8, blocks: [2, 1], channels: [16, 32]}
  se: {after: ["stages.*.*.bn2"], reduction: 4}
  kernel_sharing: {within: ["stages.*"]}
  cross_entropy:
  sgd: {lr: 0.1, momentum: 0.9}
  ema: {decay: 0.9}
  metrics:
  metric_log:
  checkpoint:
"""
IMAGES = Digits().data().test.images[:33]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "shared.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "shared.yaml"), "--run-dir", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """A folder with a file of each format; what the command said of each, as JSON."""
    folder = tmp_path_factory.mktemp("exported")
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        documents = []
        patch.setattr(trainkit_export, "print_json", documents.append)
        for form in trainkit_export.FORMATS:
            assert main(["export", str(run_dir), "--format", form, "--json"]) == 0
            said[form] = documents[-1]
        assert main(["export", str(run_dir), "--quantize", "-o", "small.onnx", "--json"]) == 0
        said["quantized"] = documents[-1]
    return folder, said


def outputs_of(run_dir, images):
    """The network's outputs in float32, as the run evaluates it."""
    return load_model(run_dir).outputs(images).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 33])
def test_onnxruntime_gives_the_runs_outputs_for_any_number_of_images(exported, run_dir, count):
    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "shared.onnx")
    (logits,) = session.run(None, {"images": IMAGES[:count].numpy()})
    np.testing.assert_allclose(logits, outputs_of(run_dir, IMAGES[:count]), atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["trainkit"])["data"]["preprocessing"]["test"] == {
        "normalize": {"mean": [0.3], "std": [0.4]}
    }


def test_torch_gives_the_runs_outputs_from_its_archive(exported, run_dir):
    network = torch.export.load(exported[0] / "shared.pt2").module()
    np.testing.assert_allclose(network(IMAGES[:5]).detach().numpy(), outputs_of(run_dir, IMAGES[:5]), atol=1e-4)


def test_no_file_tells_where_it_was_made(exported):
    """Torch notes at each operation where its code lies, and the exporters write that down."""
    folder, _ = exported
    places = (str(Path(torch.__file__).parent), str(Path(trainkit_export.__file__).parent), str(folder))
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(contents) == 8
    assert [path for path, content in contents.items() if any(place.encode() in content for place in places)] == []


def test_the_weights_are_those_that_were_evaluated(exported, run_dir):
    with safe_open(exported[0] / "shared.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    averaged = torch.load(run_dir / "checkpoints" / "best.pt", weights_only=True)["plugins"]["ema"]["state"]["model"]
    assert all(torch.equal(stored[name], averaged[name]) for name in stored)


def test_a_shared_kernel_is_stored_once(exported):
    folder, said = exported
    kernels = [
        onnx.numpy_helper.to_array(tensor).tobytes()
        for tensor in onnx.load(folder / "shared.onnx").graph.initializer
        if tensor.dims[-2:] == [3, 3]
    ]
    assert len(kernels) == len(set(kernels))
    for form in trainkit_export.FORMATS:
        kept = said[form]["stored"]
        assert (kept["shared"] > 0, kept["copies"]) == (True, 0)
        assert kept["tensors"] <= kept["network"]


def test_the_command_says_how_the_file_compares(exported):
    _, said = exported
    for form, document in said.items():
        found = document["check"]
        assert found["images"] == 256
        assert found["source"] == "of the test split"
        if form != "quantized":
            assert found["difference"] < 1e-4
            assert found["agree"] == found["as_evaluated"] == 256
            assert found["accuracy"][0] == found["accuracy"][1]


def test_a_quantized_network_is_smaller_and_computes_with_int8(exported):
    folder, said = exported
    types = {tensor.data_type for tensor in onnx.load(folder / "small.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert said["quantized"]["stored"]["tensors"] < 0.5 * said["onnx"]["stored"]["tensors"]
    assert said["quantized"]["check"]["agree"] >= 240


@pytest.mark.parametrize("form", trainkit_export.FORMATS)
def test_what_the_model_card_tells_to_do_works(exported, run_dir, monkeypatch, capsys, form):
    folder, _ = exported
    monkeypatch.chdir(folder)
    colours = np.random.default_rng(0).integers(0, 256, (13, 30, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    Image.fromarray(colours).save("image.png", exif=turned)
    card = (folder / f"shared{trainkit_export.FORMATS[form]}.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    made = {}
    exec(snippet, made)
    image = load_model(run_dir).read("image.png")
    predicted = str(int(outputs_of(run_dir, image[None]).argmax()))
    if form != "safetensors":
        np.testing.assert_array_equal(made["array"], image.numpy())
    tensors = f"{len(load_model(run_dir).model.state_dict())} tensors; 10 classes"
    assert capsys.readouterr().out.strip() == (tensors if form == "safetensors" else predicted)
    assert "| test\\_accuracy | 90 |" in card
    assert "kernels \\| shared" in card
    assert r"\[a\](javascript" in card  # no link


def test_card_and_file_have_the_metrics_of_the_weights_that_they_hold(run_dir, tmp_path):
    """The last epoch's are those of other weights, and with a validation split `best` alone was tested."""
    shutil.copytree(run_dir, tmp_path / "run")
    directory = RunDir(tmp_path / "run")
    state = directory.load_state("best")
    state["history"][-1]["test_accuracy"] = 12.5
    directory.write("checkpoints/best.pt", pack_state(state))
    model = load_model(directory.path)
    assert trainkit_export.measured_of(directory, model, "best")["test_accuracy"] == 12.5
    recorded = directory.read_json("data.json")
    directory.write_json("data.json", {**recorded, "splits": {**recorded["splits"], "validation": {"images": 9}}})
    directory.write_json("result.json", {"final": {"lr": 7, "test_accuracy": 80.0}})
    found = trainkit_export.measured_of(directory, model, "best")
    assert (found["test_accuracy"], found["lr"]) == (80.0, 0.1)
    assert trainkit_export.measured_of(directory, load_model(directory.path, "last"), "last")["test_accuracy"] != 80.0


def test_the_file_says_what_was_measured(exported, run_dir):
    metadata = onnxruntime.InferenceSession(exported[0] / "shared.onnx").get_modelmeta().custom_metadata_map
    facts = json.loads(metadata["trainkit"])
    assert facts["metrics"] == load_model(run_dir).metrics
    assert (facts["recipe"], facts["epoch"], facts["shape"]) == ("shared", load_model(run_dir).epoch, [1, 8, 8])


@pytest.mark.parametrize("root", ["/home/me/photos", "C:\\Users\\me\\photos", "~/photos"])
def test_a_card_has_no_path_of_the_machine(root):
    plugins = {"image_folder": {"root": root, "more": [root, "beside/it"]}}
    recipe = from_dict({"name": "mine", "epochs": 1, "batch_size": 1, "plugins": plugins})
    kept = trainkit_export._without_places(recipe).plugins["image_folder"]
    assert kept == {"root": "photos", "more": ["photos", "beside/it"]}


def test_a_file_that_computes_something_else_is_not_left(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = trainkit_export.run_file
    monkeypatch.setattr(trainkit_export, "run_file", lambda *args: real(*args) + 0.1)
    assert main(["export", str(run_dir), "--format", "safetensors"]) == RunError.exit_code
    assert "differs from the run's by 0.1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "safetensors", "--quantize"], "int8 is offered for onnx, and not for safetensors"),
        (["-o", "network.pt"], "ends in .onnx"),
        (["--format", "safetensors", "--images", "nothing.png"], "nothing.png"),
        (["--format", "safetensors", "--images", "."], "no images here"),
        (["--format", "safetensors", "plugins.digits.test_fraction=7"], "--images"),
        (["--format", "safetensors", "-o", "nowhere/network.safetensors"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_left(run_dir, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run_dir), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_written_to(run_dir, capsys):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    target = run_dir / "checkpoints" / "network.safetensors"
    assert main(["export", str(run_dir), "--format", "safetensors", "-o", str(target)]) == 2
    assert "write elsewhere" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_file_is_not_left_without_its_card(run_dir, tmp_path, capsys):
    (tmp_path / "network.safetensors.md").mkdir()
    assert main(["export", str(run_dir), "--format", "safetensors", "-o", str(tmp_path / "network.safetensors")]) == 2
    assert "network.safetensors.md: cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors.md"]


def test_a_missing_package_is_named(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run_dir)]) == 2
    assert "`pip install onnxscript`" in capsys.readouterr().err


def test_a_data_set_of_other_classes_is_refused_and_another_test_split_is_named(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir, "run")
    directory = RunDir(tmp_path / "run")
    recorded = directory.read_json("data.json")
    recorded["splits"]["test"]["content"] = "another"
    directory.write_json("data.json", recorded)
    assert main(["export", "run", "--format", "safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["source"] == "of a test split that is not the run's own"
    directory.write_json("data.json", {**recorded, "classes": recorded["classes"][::-1]})
    assert main(["export", "run", "--format", "safetensors"]) == 2
    assert "other classes" in capsys.readouterr().err


def test_what_a_library_raises_is_one_clear_error(run_dir, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise NotImplementedError("no such\n  operator")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "export", fail)
    assert main(["export", str(run_dir)]) == RunError.exit_code
    assert "cannot capture the network: NotImplementedError: no such operator" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_images_may_be_given(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGES[0, 0].numpy()).save("a.png")
    assert main(["export", str(run_dir), "--format", "safetensors", "--images", "a.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert (found["images"], found["source"], found["accuracy"]) == (1, "a.png", None)


def test_data_may_lie_elsewhere_if_their_plugin_has_a_root(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run_dir), "--format", "safetensors", "--data", "elsewhere"]) == 2
    assert "no plugin of the recipe has an option `root`" in capsys.readouterr().err

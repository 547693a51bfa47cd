import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import trainkit
from trainkit.cli import main
from trainkit_results import read_kept, read_rows, without_paths

RECIPE = """\
name: told
epochs: 2
batch_size: 4
device: cpu
expect: {test_accuracy: 99}
plugins:
  image_folder: {root: photos, size: 8}
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  autocast: {dtype: bfloat16}
  tta:
  metrics:
  metric_log:
  figures: {every: 0}
  ledger:
  weights:
  checkpoint:
"""
IMAGES = 10  # of training


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe, images, and three runs; two of them are a group, whose data lie at an absolute path."""
    home = tmp_path_factory.mktemp("home")
    (home / "recipes").mkdir()
    (home / "recipes" / "told.yaml").write_text(RECIPE)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES + 4, 8, 8, 3), dtype=np.uint8)
    for n, image in enumerate(pixels):
        folder = home / "photos" / ("train" if n < IMAGES else "test") / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{n}.png")
    root = f"plugins.image_folder.root={home / 'photos'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["run", "recipes/told.yaml", "plugins.sgd.lr=0.05", "seed=3", "--run-dir", "runs/one"]) == 0
        for seed in (0, 1):
            arguments = [
                "run",
                "recipes/told.yaml",
                root,
                f"seed={seed}",
                "--run-dir",
                f"runs/told/seeds-1/seed-{seed}",
            ]
            assert main(arguments) == 0
        told = {"variant": "seeds", "recipe": "told", "file": "../../../recipes/told.yaml", "overrides": [root]}
        Path("runs/told/seeds-1/group.json").write_text(json.dumps({**told, "seeds": [0, 1]}))
        assert main(["verify", "runs/one", "--files", "-o", "one.json"]) == 0
    return home


@pytest.fixture
def here(home, monkeypatch):
    """The folder, without anything kept, as the current one."""
    monkeypatch.chdir(home)
    yield home
    shutil.rmtree(home / "recipes" / "results", ignore_errors=True)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failed(capsys, *arguments):
    """Run a command that must fail, and return what it says."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_run_is_kept_byte_for_byte_with_what_trains_it_again(here):
    assert main(["runs", "keep", "runs/one", "--verified", "one.json", "--note", "Beside others."]) == 0
    held, run = files(here / "recipes/results/told"), files(here / "runs/one")
    copied = {name for name in held if name not in ("kept.json", "verified.json")}
    assert copied >= {"recipe.yaml", "result.json", "metrics.csv", "ledger.jsonl", "figures/accuracy.png"}
    assert {name for name in copied if held[name] != run[name]} == set()
    assert main(["verify", "recipes/results/told", "--files"]) == 0  # they fit each other and the ledger
    kept = read_kept(here / "recipes/results/told/kept.json")
    assert kept.command == "trainkit run recipes/told.yaml seed=3 plugins.sgd.lr=0.05"
    assert (kept.recipe, kept.note, kept.replaced) == ("told", "Beside others.", ())
    environment = json.loads(run["environment.json"])
    assert (kept.hardware[0].processor, kept.hardware[0].dtype) == (environment["processor"], "bfloat16")
    assert kept.hardware[0].threads == environment["threads"]


def test_operations_are_those_of_the_images_trained_on(here):
    assert main(["runs", "keep", "runs/one"]) == 0
    kept = read_kept(here / "recipes/results/told/kept.json")
    model = trainkit.load_model("runs/one").model
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 8, 8)).sum().backward()
    assert kept.images == 2 * IMAGES
    assert kept.gflop == counter.get_total_flops() / 1e9
    assert kept.pflop == pytest.approx(kept.gflop * 2 * IMAGES / 1e6, rel=1e-3)


def test_neither_weights_nor_a_path_of_the_machine_are_kept(here):
    shutil.copy("one.json", "two.json")
    found = json.loads(Path("two.json").read_text())
    chain = json.loads(Path("runs/told/seeds-1/seed-1/result.json").read_text())["evidence"]["ledger"]["chain"]
    run = str(here / "runs/told/seeds-1/seed-1")
    said = {"run": run, "ledger": chain, "sentence": f"{run}: verified, as {here}/x says"}
    Path("two.json").write_text(json.dumps(found | said))
    assert main(["runs", "keep", "runs/told/seeds-1", "--verified", "two.json"]) == 0
    held = files(here / "recipes/results/told")
    assert {name.rpartition(".")[2] for name in held} == {"json", "yaml", "csv", "jsonl", "png"}
    assert [name for name, data in held.items() if str(here).encode() in data] == []
    assert json.loads(held["seed-1/verified.json"])["sentence"] == "seed-1: verified, as DIR says"
    kept = read_kept(here / "recipes/results/told/kept.json")
    assert set(kept.replaced) == {"recipe.yaml: plugins.image_folder.root", "plugins.lock.json: options.root"}
    assert kept.command == "trainkit run recipes/told.yaml plugins.image_folder.root=DIR --seeds 0-1"
    recipe = trainkit.load_recipe("recipes/results/told/seed-1/recipe.yaml")
    assert (recipe.seed, recipe.plugins["image_folder"]) == (1, {"root": "DIR", "size": 8})


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("/data", "DIR"),
        ("at /home/me/photos/a.png: no image", "at DIR: no image"),
        ("~/photos", "DIR"),
        (r"C:\Users\me\photos", "DIR"),
        (r"in \\server\share\photos", "in DIR"),
        ("acme @ file:///home/me/acme", "acme @ DIR"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("1/2 of 3 / 4 images/s, and/or runs/one", "1/2 of 3 / 4 images/s, and/or runs/one"),
    ],
)
def test_what_is_an_absolute_path(text, becomes):
    found = []
    assert without_paths({"a": [text]}, "", found) == {"a": [becomes]}
    assert found == (["a"] if becomes != text else [])


def test_a_path_with_spaces_is_replaced_to_its_end():
    assert without_paths({"root": "/home/My Name/photos"}, "", [], whole=True) == {"root": "DIR"}


def test_a_group_is_a_row_with_its_mean_and_deviation(here, capsys):
    assert main(["runs", "keep", "runs/told/seeds-1"]) == 0
    for seed, value in ((0, 91.5), (1, 93.0)):
        path = here / f"recipes/results/told/seed-{seed}/result.json"
        result = json.loads(path.read_text())
        result["final"] |= {"test_accuracy": value, "test_accuracy_tta": value + 1}
        result["seconds"]["total"] = 1000 * (seed + 1)
        path.write_text(json.dumps(result))
    capsys.readouterr()
    assert main(["recipes", "results", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    found = told["metrics"]["test_accuracy"]
    assert (found["mean"], found["sd"]) == (92.25, pytest.approx(statistics.stdev([91.5, 93.0])))
    assert list(told["metrics"]) == ["test_accuracy", "test_accuracy_tta"]
    assert told["expected"] == {"test_accuracy": 99}
    Path("README.md").write_text(
        "# Mine\n<!-- results: generated by trainkit recipes results -->\nstale text\n<!-- end -->\nMore.\n"
    )
    assert main(["recipes", "results", "--write", "README.md"]) == 0
    text = Path("README.md").read_text()
    assert "| 2 | 92.25 (sd 1.1) | 93.25 (sd 1.1) | 99 | - | 1,000 to 2,000 |" in text
    command = "trainkit run recipes/told.yaml plugins.image_folder.root=DIR --seeds 0-1"
    assert f"| [told](recipes/results/told)<br>`{command}` |" in text
    assert text.startswith("# Mine\n")
    assert text.endswith("<!-- end -->\nMore.\n")
    assert "stale text" not in text


def test_the_table_fits_80_columns(here, capsys, monkeypatch):
    assert main(["runs", "keep", "runs/one", "--note", "Beside other programs. " * 9]) == 0
    assert main(["runs", "keep", "runs/told/seeds-1", "-o", "recipes/results/a_result_with_a_long_name"]) == 0
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main(["recipes", "results"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert {"a_result_with_a_long_name", "told", "sd", "expected"} <= set(out.split())


@pytest.mark.parametrize(
    ("proved", "passed", "replayed", "verdict"),
    [
        (True, True, 6, "proved"),
        (True, True, 4, "proved (67 %)"),
        (False, True, 0, "agrees"),
        (False, False, 0, "failed"),
    ],
)
def test_the_table_says_whether_it_was_verified(here, proved, passed, replayed, verdict):
    found = json.loads(Path("one.json").read_text()) | {"proved": proved, "passed": passed, "replayed": replayed}
    Path("changed.json").write_text(json.dumps(found))
    assert main(["runs", "keep", "runs/one", "--verified", "changed.json"]) == 0
    (row,) = read_rows(here / "recipes/results")
    assert row.verdict() == verdict


def test_what_was_verified_of_another_run_is_refused(here, capsys):
    said = failed(capsys, "runs", "keep", "runs/told/seeds-1", "--verified", "one.json")
    assert "one.json: ledger: it is of another run" in said
    assert not Path("recipes/results").exists()
    assert main(["runs", "keep", "runs/one", "--verified", "one.json"]) == 0
    shutil.copy("runs/told/seeds-1/seed-0/result.json", "recipes/results/told/result.json")
    said = failed(capsys, "recipes", "results")
    assert "recipes/results/told/verified.json: ledger: it is of another run" in said


def test_what_is_not_completed_is_not_kept(here, capsys, tmp_path):
    shutil.copytree("runs/told/seeds-1", tmp_path / "g")
    (tmp_path / "g/seed-1/result.json").unlink()
    assert "1 of 2 seeds are completed" in failed(capsys, "runs", "keep", str(tmp_path / "g"))
    assert "seed-1: not completed" in failed(capsys, "runs", "keep", str(tmp_path / "g/seed-1"))
    assert "holds no recipe.yaml" in failed(capsys, "runs", "keep", str(tmp_path))


@pytest.mark.parametrize("overrides", [3, [3], "seed=1"])
def test_a_strangers_group_gives_one_clear_error(here, capsys, tmp_path, overrides):
    shutil.copytree("runs/told/seeds-1", tmp_path / "g")
    path = tmp_path / "g/group.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": overrides}))
    said = failed(capsys, "runs", "keep", str(tmp_path / "g"))
    assert f"{path}: overrides: expected a list of KEY=VALUE" in said
    assert not Path("recipes/results").exists()


def test_nothing_but_a_result_of_the_same_recipe_is_replaced(here, capsys):
    output = here / "recipes/results/told"
    assert main(["runs", "keep", "runs/told/seeds-1"]) == 0
    assert main(["runs", "keep", "runs/one"]) == 0
    assert not (output / "group.json").exists()
    kept = json.loads((output / "kept.json").read_text())
    (output / "kept.json").write_text(json.dumps(kept | {"recipe": "other"}))
    assert "the recipe 'other', not of 'told'" in failed(capsys, "runs", "keep", "runs/one")
    assert "photos: holds something" in failed(capsys, "runs", "keep", "runs/one", "-o", "photos")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pflop": "many"}, "pflop: expected a number or null, got many"),
        ({"parameters": True}, "parameters: expected a whole number or null, got true"),
        ({"comand": "x"}, "comand: unknown key; did you mean 'command'?"),
        ({"hardware": [{"cpu": "x"}]}, "hardware[0]: cpu: unknown key"),
        ({"revisions": [1]}, "revisions: expected a list of texts, got [1]"),
        ({"recipe": None}, "recipe: expected a text, got null"),
    ],
)
def test_a_foreign_kept_json_gives_one_clear_error(here, capsys, change, said):
    assert main(["runs", "keep", "runs/one"]) == 0
    path = Path("recipes/results/told/kept.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = failed(capsys, "recipes", "results")
    assert f"{path}: {said}" in found
    assert "trainkit runs keep RUN_DIR -o recipes/results/told" in found


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udcff", '{"recipe": ' + "[" * 5000])
def test_a_damaged_kept_json_gives_one_clear_error(here, capsys, text):
    assert main(["runs", "keep", "runs/one"]) == 0
    path = Path("recipes/results/told/kept.json")
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert f"{path}: " in failed(capsys, "recipes", "results")


def test_a_file_without_the_marks_is_left_alone(here, capsys):
    assert main(["runs", "keep", "runs/one"]) == 0
    Path("README.md").write_text("# Mine\n")
    assert "README.md: two lines are missing" in failed(capsys, "recipes", "results", "--write", "README.md")
    assert Path("README.md").read_text() == "# Mine\n"


def test_a_note_cannot_end_the_generated_part(here, capsys):
    before = "<!-- results: generated by trainkit recipes results -->\n<!-- end -->\nMore.\n"
    assert main(["runs", "keep", "runs/one", "--note", "a | b <!-- end -->\n\n# Title"]) == 0
    Path("README.md").write_text(before)
    assert "README.md: not what recipes/results holds" in failed(
        capsys, "recipes", "results", "--write", "README.md", "--check"
    )
    assert Path("README.md").read_text() == before
    for _ in range(2):
        assert main(["recipes", "results", "--write", "README.md"]) == 0
    text = Path("README.md").read_text()
    assert text.count("<!-- end -->") == text.count("More.") == 1
    assert "`told`: a \\| b &lt;!-- end --> # Title" in text


def test_of_the_files_of_a_recipe_code_is_kept_and_neither_weights_nor_paths(here, capsys, tmp_path):
    shutil.copytree("runs/one", tmp_path / "run")
    (tmp_path / "run/files/local").mkdir(parents=True)
    for name, text in (("a.py", "x = 1 / 2"), ("b.py", "x = '/home/me/x'"), ("c.safetensors", "x")):
        (tmp_path / "run/files/local" / name).write_text(text)
    assert main(["runs", "keep", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "files/local/b.py: not copied: it holds an absolute path" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out/files/local").iterdir()] == ["a.py"]


def test_the_format_of_numbers_on_another_machine_is_not_guessed(here, tmp_path):
    shutil.copytree("runs/one", tmp_path / "run")
    path = tmp_path / "run/environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"instruction_sets": {"torch": "NEON"}}))
    assert main(["runs", "keep", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    (hardware,) = read_kept(tmp_path / "out/kept.json").hardware
    assert (hardware.instruction_set, hardware.dtype) == ("NEON", None)


def test_a_network_that_cannot_be_built_leaves_a_gap(here, capsys, tmp_path):
    """The plugins of a run need not be installed: all but the operations is known."""
    shutil.copytree("runs/one", tmp_path / "run")
    path = tmp_path / "run/recipe.yaml"
    path.write_text(path.read_text().replace("  resnet:", "  resnett:"))
    assert main(["runs", "keep", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    assert "GFLOP and PFLOP are not known" in capsys.readouterr().out
    kept = read_kept(tmp_path / "out/kept.json")
    assert (kept.gflop, kept.pflop, kept.hardware[0].dtype) == (None, None, None)
    assert kept.images == 2 * IMAGES
    assert main(["recipes", "results", str(tmp_path)]) == 0

"""The command line as users meet it: what it prints, what it leaves behind, how it exits."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainkit import build, load_model, load_recipe, provenance
from trainkit.cli import main
from trainkit.cli.output import number, printable, table, terminal
from trainkit.cli.run import _resume_command
from trainkit.rundir import RunDir, pack_state

from .processes import print_ascii, print_for_nobody, print_into


@pytest.mark.slow
def test_run_reports_and_leaves_a_complete_directory(small, trainkit):
    done = trainkit("run", small, "--run-dir", "out")
    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout
    assert "completed in" in done.stdout
    out = small.parent / "out"
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "recipe.yaml",
        "plugins.lock.json",
        "environment.json",
        "data.json",
        "metrics.jsonl",
        "metrics.csv",
        "checkpoints/best.pt",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "result.json",
    }


@pytest.mark.slow
def test_dry_run_checks_everything_and_leaves_nothing(small, trainkit):
    before = sorted(small.parent.iterdir())
    done = trainkit("run", small, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "dry run passed" in done.stdout
    assert "2 steps and one test batch" in done.stdout
    assert sorted(small.parent.iterdir()) == before


@pytest.mark.slow
def test_dry_run_checks_the_values_that_it_replaces(small, trainkit):
    done = trainkit("run", small, "--dry-run", "max_steps=0")
    assert done.returncode == 2
    assert "'max_steps' must be > 0" in done.stderr


def test_dry_run_knows_what_the_recipe_will_report(small, capsys):
    assert main(["run", str(small), "--dry-run", "expect={test_acuracy: 90, parameters: 398, train_loss: 1}"]) == 2
    assert (
        "small.yaml: expect.test_acuracy: no plugin of the recipe reports it; did you mean" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_does_not_end_a_run(small, trainkit):
    done = trainkit("run", small, "--run-dir", "out", "plugins.progress={}", before=print_for_nobody)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((small.parent / "out" / "result.json").read_text())["status"] == "completed"


def test_a_command_whose_actions_come_from_plugins_explains_itself(capsys):
    assert main(["runs", "--help"]) == 0
    assert "actions: check, compare, confusion, curves, keep, list, " in capsys.readouterr().out


@pytest.mark.slow
def test_json_is_the_only_thing_on_standard_output(small, trainkit):
    done = trainkit("run", small, "--json", "max_steps=1")
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert json.loads((small.parent / result["run_dir"] / "result.json").read_text())["steps"] == 1


def test_the_runs_own_recipe_runs_again_to_the_same_metrics(small, capsys):
    assert main(["run", str(small), "--run-dir", "a", "--seed", "3", "plugins.sgd.lr=0.05"]) == 0
    assert main(["run", "a/recipe.yaml", "--run-dir", "b"]) == 0
    first, second = (small.parent / d / "metrics.jsonl" for d in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text().splitlines()[-1])["lr"] < 0.05


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "smal.yaml"], 2, "smal.yaml: no such recipe; did you mean 'small.yaml'?"),
        (["run", "small.yaml", "epoch=3"], 2, "epoch: unknown key; did you mean 'epochs'?"),
        (["run", "small.yaml", "plugins.sgd.lr=fast"], 2, "plugins.sgd.lr: Value 'fast'"),
        (["run", "small.yaml", "plugins.sgd.lr=-1"], 2, "plugins.sgd.lr: 'lr' must be >= 0"),
        (["run", "small.yaml", "plugins.sdg={}"], 2, "plugins.sdg: did you mean 'sgd'?"),
        (
            ["run", "small.yaml", "plugins.sgd=false"],
            2,
            "provides 'optimizer'; list one that does: installed are adam, adamw, muon, sgd",
        ),
        (["run", "small.yaml", "device=meta"], 2, "device: 'meta' holds no numbers"),
        (["run", "small.yaml", "plugins.adam={}"], 2, "both provide it; drop one: `adam: false`"),
        (["run", "small.yaml", "plugins.multi_step_lr.milestones=[1]"], 2, "both claim 'lr_schedule'"),
        (["run", "small.yaml", "expect.parameters=5"], 2, "expect.parameters: the recipe expects 5 parameters"),
        (["run", "small.yaml", "device=abacus"], 2, "device: 'abacus' cannot be used"),
        (["run", "small.yaml", "plugins.digits=false", "plugins.cifar10.root=nowhere"], 2, "nowhere"),
        (["evaluate", "."], 2, "not the directory of a run"),
        (["resume", "."], 2, "not the directory of a run"),
        (["plugins", "show", "sdg"], 2, "no plugin 'sdg' is installed; did you mean 'sgd'?"),
        (["recipes", "list", "nowhere"], 2, "nowhere: no such folder"),
        (["rnu"], 2, "no command 'rnu'; did you mean 'run'?"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(small, capsys, arguments, code, said):
    before = sorted(small.parent.iterdir())
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(small.parent.iterdir()) == before


def test_traceback_shows_where(small, capsys):
    assert main(["run", "nothing.yaml", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_evaluate_gives_the_metrics_of_the_run(small, capsys):
    assert main(["run", str(small), "--run-dir", "out", "--json"]) == 0
    final = json.loads(capsys.readouterr().out)["final"]
    assert main(["evaluate", "out", "--checkpoint", "last", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["test_accuracy"] == final["test_accuracy"]
    assert evaluated["test_loss"] == final["test_loss"]


def test_evaluate_shows_each_class_and_what_it_is_taken_for(small, capsys):
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "out", "--per-class", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    matrix = torch.tensor(found["confusion_matrix"])
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(found["test_accuracy"])
    run = build(load_recipe("out/recipe.yaml"))
    assert matrix.sum(1).tolist() == torch.bincount(run.data.test.targets, minlength=10).tolist()
    model = load_model("out")
    for target, row in zip(range(10), matrix, strict=True):  # an independent count, class by class
        images = run.data.test.images[run.data.test.targets == target]
        assert torch.bincount(model.outputs(images).argmax(1), minlength=10).tolist() == row.tolist()
    assert main(["evaluate", "out", "--per-class"]) == 0
    assert "else mostly taken for" in capsys.readouterr().out
    assert main(["evaluate", "out", "--data", "elsewhere"]) == 2
    assert "--data: no plugin of the recipe has an option `root`" in capsys.readouterr().err


def test_evaluate_without_a_checkpoint_names_the_cure(small, capsys):
    assert main(["run", str(small), "--run-dir", "out", "plugins.checkpoint=false"]) == 0
    assert main(["evaluate", "out"]) == 2
    assert "its recipe lists a plugin that does" in capsys.readouterr().err


def test_profile_and_trace_name_plugins_and_hooks(small, capsys):
    assert main(["run", str(small), "--profile", "--trace-hooks", "max_steps=1"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer sgd" in printed
    assert "forward_end" in printed


def test_plugins_list_and_show(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    listed = {p["name"]: p for p in json.loads(capsys.readouterr().out)}
    assert listed["se"]["distribution"] == "trainkit-se"
    assert main(["plugins", "show", "se", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["hooks"] == ["transform_model"]
    (reduction,) = [option for option in shown["options"] if option["name"] == "reduction"]
    assert (reduction["type"], reduction["default"]) == ("int", "16")
    assert "channels // reduction" in reduction["meaning"]
    assert shown["doc"].splitlines()[0] == listed["se"]["summary"]
    for command in (["plugins", "list"], ["plugins", "show", "se"]):
        assert main(command) == 0
        assert "se" in capsys.readouterr().out


def test_recipes_list_and_show(small, capsys):
    assert main(["recipes", "list", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "small"
    assert main(["recipes", "show", "small.yaml", "epochs=9"]) == 0
    assert "epochs: 9" in capsys.readouterr().out
    (small.parent / "broken.yaml").write_text("name: [")
    assert main(["recipes", "list", "."]) == 2
    captured = capsys.readouterr()
    assert "small.yaml" in captured.out
    assert "broken.yaml" in captured.err


@pytest.mark.parametrize("command", ["run", "resume", "evaluate", "plugins", "recipes"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"trainkit {command}" in capsys.readouterr().out.split("examples:")[1]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {c} " in printed for c in ("run", "resume", "evaluate", "plugins", "recipes"))


def test_a_closed_pipe_is_no_error():
    pipe = f"{sys.executable} -m trainkit plugins list --json | head -1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("[")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(3116378, "3,116,378"), (93.834, "93.83"), (0.01234567, "0.01235"), (100.0, "100"), (None, "-"), (0.1, "0.1")],
)
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text


def test_nothing_raw_reaches_the_terminal(small, capsys):
    assert printable("a\x1b[31mb\x9bc\u202ed\n") == "a\\x1b[31mb\\x9bc\\u202ed\n"
    assert main(["run", "evil\x1b]0;owned\x07.yaml"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_fault_before_the_first_step_leaves_no_run_directory(small, capsys):
    assert main(["run", str(small), "plugins.figures.published=nowhere.csv"]) == 2
    assert "nowhere.csv" in capsys.readouterr().err
    assert list((small.parent / "runs").rglob("*.json")) == []


def start(*arguments, **options):
    command = [sys.executable, "-m", "trainkit", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("arguments", [["plugins", "list"], ["plugins", "list", "--json"], ["--help"], ["run", "-h"]])
def test_a_full_disk_behind_the_output_is_one_paragraph(arguments):
    with open("/dev/full", "w") as full:
        done = start(*arguments, stdout=full)
    said = "error: the output cannot be written: No space left on device; what was to be printed is lost\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_terminal_that_is_gone_is_one_paragraph():
    ours, theirs = os.openpty()
    os.close(ours)
    done = start("plugins", "list", stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the output cannot be written: Input/output error" in done.stderr


def test_a_run_goes_on_when_its_output_cannot_be_written(small, trainkit):
    full = partial(print_into, "/dev/full")
    done = trainkit("run", small, "--run-dir", "out", "plugins.progress={}", before=full)
    assert done.stderr.count("the output cannot be written") == 1
    assert done.returncode == 1
    assert json.loads((small.parent / "out" / "result.json").read_text())["status"] == "completed"


def test_an_encoding_without_our_letters_ends_nothing(small, trainkit):
    folder = small.parent / "caf\u00e9 \u2028"
    done = trainkit("run", small, "--run-dir", folder, "plugins.progress={}", before=print_ascii)
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\xe9" in done.stdout


def test_a_reader_that_has_seen_enough_of_a_listing():
    with subprocess.Popen(
        [sys.executable, "-m", "trainkit", "plugins", "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_no_character_turns_what_follows_around(small, capsys):
    assert main(["recipes", "show", str(small), "description=a\u202eb\u2066"]) == 0
    said = capsys.readouterr().out
    assert "\\u202E" in said
    assert said.replace("\n", "").isprintable()
    assert main(["recipes", "list", str(small.parent)]) == 0


FOLDERS = """\
name: folders
epochs: 1
batch_size: 4
device: cpu
plugins:
  image_folder: {root: images, size: 8}
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  checkpoint:
"""


@pytest.fixture
def folders(tmp_path, monkeypatch, capsys):
    """A run on a folder of images, `run`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for green, name in ((0, "cat"), (200, "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for picture in range(4):
                Image.new("RGB", (8, 8), (60 * picture, green, 9)).save(folder / f"{picture}.png")
    (tmp_path / "folders.yaml").write_text(FOLDERS)
    assert main(["run", "folders.yaml", "--run-dir", "run"]) == 0
    capsys.readouterr()
    return tmp_path


def rename(folders):
    for split in ("train", "test"):
        (folders / "images" / split / "dog").rename(folders / "images" / split / "wolf")


def test_pictures_in_differently_named_folders_are_other_classes(folders, capsys):
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 0
    capsys.readouterr()
    rename(folders)
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 2
    said = capsys.readouterr().err
    assert "data.classes was ['cat', 'dog'] and is ['cat', 'wolf']" in said
    assert "--allow-changes" in said
    assert main(["evaluate", "run", "--checkpoint", "last", "--allow-changes"]) == 0
    said = capsys.readouterr().out
    assert "not evaluated as it was trained: " in said
    assert "data.classes was" in said
    assert main(["resume", "run", "epochs=2"]) == 2
    assert "data.classes was ['cat', 'dog'] and is ['cat', 'wolf']" in capsys.readouterr().err


def test_other_code_is_an_error_and_another_environment_a_note(folders, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "threads", lambda: 63)
        assert main(["evaluate", "run", "--checkpoint", "last"]) == 0
        assert "environment.threads was" in capsys.readouterr().out
    monkeypatch.setattr(provenance, "core_code", lambda: "other")
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 2
    assert "environment.trainkit.code was" in capsys.readouterr().err


def test_of_many_classes_the_first_that_differ_are_named():
    names = [f"class{number}" for number in range(1000)]
    other = [*names[:500], "x", *names[501:]]
    (difference,) = provenance.compare({"data": {"classes": names}}, {"data": {"classes": other}})
    assert str(difference) == "data.classes: 500 was class500 and is x"
    (difference,) = provenance.compare({"data": {"classes": names}}, {"data": {"classes": names[::-1]}})
    assert len(str(difference)) < 500


def test_a_recipe_in_a_run_directory_says_what_differs_from_the_record(folders, capsys, monkeypatch):
    monkeypatch.chdir("/")
    again = [
        "run",
        str(folders / "run" / "recipe.yaml"),
        "--dry-run",
        f"plugins.image_folder.root={folders / 'images'}",
    ]
    assert main(again) == 0
    assert "was recorded" not in capsys.readouterr().out
    assert main([*again, "batch_size=2"]) == 0
    said = capsys.readouterr().out
    assert f"not as {folders / 'run'} was recorded, so its numbers may differ: batch_size was 4 and is 2" in said
    rename(folders)
    assert main(again) == 0
    assert "data.classes was ['cat', 'dog'] and is ['cat', 'wolf']" in capsys.readouterr().out
    (folders / "run" / "data.json").write_text("[]")
    assert main(again) == 0
    assert "its record is not what a run writes" in capsys.readouterr().out


def test_a_checkpoint_without_a_key_is_one_paragraph(folders, capsys):
    run_dir = RunDir(folders / "run")
    whole = run_dir.load_state("last")
    for key in ("provenance", "model", "position", "schedules", "plugins", "cost"):
        run_dir.write("checkpoints/last.pt", pack_state({name: value for name, value in whole.items() if name != key}))
        for arguments in (["evaluate", "run", "--checkpoint", "last"], ["resume", "run", "epochs=2"]):
            code, said = main(arguments), capsys.readouterr().err
            assert (code, said.count("\n")) == (2, 1), said
            assert f"'{key}'" in said


def test_a_recipe_that_keeps_or_shows_nothing_is_told_so(small, capsys):
    nothing = ["plugins.checkpoint=false", "plugins.metric_log=false"]
    for arguments in (["--dry-run"], ["--run-dir", "out", "max_steps=1"]):
        assert main(["run", str(small), *arguments, *nothing]) == 0
        said = capsys.readouterr().out
        assert [line.split(":")[1].strip() for line in said.splitlines() if line.startswith("warning")] == [
            "nothing is saved",
            "nothing is logged",
            "nothing is shown until the end",
        ]
    assert main(["run", str(small), "--dry-run", "plugins.progress={}"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_run_directory_may_begin_with_a_hyphen(small, capsys):
    assert main(["run", str(small), "--run-dir=-x", "max_steps=1"]) == 0
    assert main(["resume", "./-x"]) == 0
    assert main(["resume", "--", "-x"]) == 0
    capsys.readouterr()
    assert _resume_command(Path("-x")) == "trainkit resume ./-x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "r.yaml", "--epochs", "3"], "a value of the recipe is given as epochs=3"),
        (["frobnicate"], "no command 'frobnicate'; there are run, resume, evaluate, plugins, recipes, "),
        (["plugins", "foo"], "no action 'foo'; there are list, show, "),
        (["recipes", "nww"], "no action 'nww'; there are list, show, "),
    ],
)
def test_what_is_unknown_is_answered_with_what_there_is(capsys, arguments, said):
    with suppress(SystemExit):  # argparse ends the process itself
        assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_may_be_named_without_its_folder(small, capsys):
    (small.parent / "recipes").mkdir()
    small.rename(small.parent / "recipes" / "small.yaml")
    assert main(["run", "small", "--dry-run"]) == 0
    assert "recipe: recipes/small.yaml" in capsys.readouterr().out
    assert main(["run", "smal"]) == 2


def test_help_wraps_whole_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80


def test_recipes_help_tells_every_option_of_what_a_recipe_lists(small, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes", "help", str(small), "sgd"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sgd: Stochastic gradient descent")
    assert re.search(r"momentum +0\.9 +float +factor of the gradients' running sum", printed)
    assert re.search(r"nesterov +false +bool", printed)
    assert max(map(len, printed.splitlines())) <= 80
    assert main(["recipes", "help", str(small), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [document["name"] for document in documents] == list(load_recipe(small).plugins)
    assert main(["recipes", "help", str(small), "sdg"]) == 2
    assert "lists no plugin 'sdg'; did you mean 'sgd'?" in capsys.readouterr().err


@given(
    st.lists(st.tuples(*[st.text("ab 12,", max_size=30)] * 3), min_size=1, max_size=4),
    st.integers(12, 100),
)
def test_a_table_fits_the_terminal_and_breaks_no_word_that_has_room(rows, width):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        columns = ["first", "second", "third"]
        made = table(columns, rows, optional=["second", "third"])
        printed = "\n".join(line for line in _printed(made) if line.strip())
    assert max(map(len, printed.splitlines())) <= width
    headings = [column.header for column in made.columns]
    longest = {
        column: max(len(word) for row in [columns, *rows] for word in row[n].split() or [""])
        for n, column in enumerate(columns)
    }
    room = width + 1
    if sum(longest[column] + 3 for column in headings) <= room:
        words = {
            word for row in rows for n, column in enumerate(columns) if column in headings for word in row[n].split()
        }
        assert words <= {*printed.split()}
    else:
        assert headings == ["first"]
    if "second" not in headings:
        assert sum(longest.values()) + 9 > room


def _printed(made):
    console = terminal()
    with console.capture() as captured:
        console.print(made)
    return captured.get().splitlines()

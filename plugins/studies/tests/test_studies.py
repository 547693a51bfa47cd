import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import trainkit_studies
from trainkit.cli import main
from trainkit.errors import UsageError
from trainkit_cifar10 import CLASSES
from trainkit_studies import Group, Variant, compare, parse_seeds, plan, read_study, run_missing, summarize

RECIPE = """\
name: tiny
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  metric_log:
  checkpoint: {every_steps: 1}
"""
STUDY = """\
name: small
recipe: tiny.yaml
seeds: 0-2
overrides: {epochs: 1}
variants:
  base:
  slow: {overrides: {plugins.sgd.lr: 0.01}}
  plain: {drop: [metric_log]}
"""
ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path


class Here:
    """Trains in this process, as the command line does, and remembers what it was told."""

    def __init__(self, fails=()):
        self.fails, self.variables = fails, []

    def train(self, planned, options, variables):
        self.variables.append(variables)
        return 1 if planned.seed in self.fails else main(planned.command(options))

    def stop(self, number):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs start no processes, which would load torch each."""
    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here())


# Statistics

values = st.lists(st.floats(0, 100), min_size=2, max_size=8)


@given(values)
def test_mean_sd_and_interval_are_scipys(numbers):
    found = summarize(numbers)
    assert found.mean == pytest.approx(np.mean(numbers))
    assert found.sd == pytest.approx(np.std(numbers, ddof=1))
    if found.sd > 1e-6:
        expected = scipy.stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-6)


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2))
def test_seeds_in_common_are_compared_in_pairs_as_scipy_does(pairs):
    first = {seed: a for seed, (a, _) in pairs.items()} | {100: 5.0}
    second = {seed: b for seed, (_, b) in pairs.items()}
    found = compare(first, second)
    a, b = np.asarray(list(pairs.values())).T
    assert (found.paired, found.n) == (True, (len(a), len(a)))
    assert found.mean == pytest.approx(np.mean(a - b), abs=1e-9)
    if np.std(a - b) > 1e-6:
        expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


@given(values, values)
def test_other_seeds_are_compared_by_welchs_t_as_scipy_does(a, b):
    found = compare(dict(enumerate(a)), dict(enumerate(b, 100)))
    assert (found.paired, found.n) == (False, (len(a), len(b)))
    if min(np.std(a), np.std(b)) > 1e-3:
        expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


def test_one_value_has_no_interval():
    assert summarize([3.0]) == trainkit_studies.Summary(1, 3.0, None, None)
    assert compare({0: 3.0}, {0: 1.0}).interval is None
    assert compare({0: 3.0}, {1: 1.0, 2: 2.0}).interval is None


# What there should be


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", [0, 1, 2]), ("3", [3]), ("0,7,3", [0, 7, 3]), ("0-1, 1-2", [0, 1, 2])]
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0-99999999"])
def test_what_names_no_seeds_is_refused(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


def test_a_study_names_its_variants(folder):
    grid = "  g: {grid: {plugins.sgd.lr: [0.1, 1.0e-3], seed: [5]}, drop: [metric_log]}\n"
    (folder / "small.yaml").write_text(STUDY + grid)
    name, variants, seeds = read_study(Path("small.yaml"), ["batch_size=64"])
    assert (name, seeds) == ("small", [0, 1, 2])
    assert [v.name for v in variants] == ["base", "slow", "plain", "g-lr_0.1-seed_5", "g-lr_0.001-seed_5"]
    assert {v.recipe.batch_size for v in variants} == {64}
    assert [v.recipe.epochs for v in variants] == [1] * 5
    assert [v.recipe.plugins["sgd"]["lr"] for v in variants] == [0.1, 0.01, 0.1, 0.1, 0.001]
    assert ["metric_log" in v.recipe.plugins for v in variants] == [True, True, False, False, False]


def test_an_edited_variant_is_another_group_and_a_description_is_no_edit(folder):
    def folders():
        return {v.name: v.folder for v in read_study(Path("small.yaml"), [])[1]}

    before = folders()
    (folder / "tiny.yaml").write_text(RECIPE.replace("epochs: 2", "epochs: 2\ndescription: other\nseed: 9"))
    assert folders() == before
    (folder / "tiny.yaml").write_text(RECIPE.replace("lr: 0.1", "lr: 0.2"))
    assert {name for name, each in folders().items() if before[name] == each} == {"slow"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("variants:", "variant:", "small.yaml: variant: unknown key; did you mean 'variants'?"),
        ("drop: [metric_log]", "dropp: [a]", r"variants\.plain: dropp: unknown key; did you mean 'drop'"),
        ("drop: [metric_log]", "grid: {epochs: 3}", r"variants\.plain\.grid\.epochs: expected a list"),
        ("  base:", "  base: [1]", r"variants\.base: expected a mapping"),
        ("  base:", "  ba se:", "a variant's name is letters"),
        ("recipe: tiny.yaml", "recipe: gone.yaml", r"variants\.base: gone\.yaml: no such recipe"),
        ("recipe: tiny.yaml", "", r"variants\.base: recipe: expected the name"),
        ("plugins.sgd.lr: 0.01", "plugins.sgd.lrr: 0.01", r"variant slow: .*plugins\.sgd\.lrr: unknown key"),
        ("epochs: 1", "epochs: many", r"variants\.base: .*epochs"),
        ("seeds: 0-2", "seeds: few", "--seeds: 'few'"),
        ("seeds: 0-2", "seeds: [", "YAML syntax"),
        ("name: small", "name: ../up", "name: expected letters"),
        ("  base:", "  base: &a {}\n  other: *a", "aliases are not supported"),
        ("  base:", "  base: !!python/object/apply:os.abort []", "YAML tag .* refused"),
    ],
)
def test_a_study_that_is_wrong_is_refused_before_anything_is_trained(folder, capsys, old, new, said):
    (folder / "small.yaml").write_text(STUDY.replace(old, new))
    assert main(["study", "small.yaml"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (folder / "runs").exists()


def test_numbers_are_read_as_in_a_recipe(folder):
    (folder / "small.yaml").write_text(STUDY.replace("0.01", "1e-3"))
    _, variants, _ = read_study(Path("small.yaml"), [])
    assert variants[1].recipe.plugins["sgd"]["lr"] == 1e-3


@pytest.mark.slow
def test_the_papers_study_runs_whole_on_few_images(folder, in_this_process, capsys):
    for split in ("train", "test"):
        for label in range(10):
            path = folder / "images" / split / CLASSES[label] / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * label, 100, 200)).save(path)
    watchers = [f"plugins.{name}=false" for name in ("figures", "ledger", "model_summary", "weights")]
    small = ["epochs=1", "batch_size=4", "max_steps=1", "plugins.cifar10.root=images", *watchers]
    study = str(ROOT / "recipes" / "paper.study.yaml")
    assert main(["study", study, *small, "--seeds", "0", "-o", "paper", "--json"]) == 0
    groups = {path.name.rpartition("-")[0]: Group.read(path) for path in Path("paper").iterdir() if path.is_dir()}
    assert {name: group.results[0]["parameters"] for name, group in groups.items()} == {
        "dense_shared": 3116378,
        "adam": 3116378,
        "unshared": 9014618,
        "stages23": 1641818,
        "all_stages": 1273178,
        "figures": 3116378,
        "basic_se": 4697742,
    }
    losses = {name: group.results[0]["final"]["train_loss"] for name, group in groups.items()}
    assert losses["dense_shared"] == losses["adam"] == losses["figures"]  # of the first step: one seed, one network
    assert len({*losses.values()}) == 5


# Runs


def test_seeds_make_a_group_that_goes_on_with_what_is_missing(folder, in_this_process, capsys):
    assert main(["run", "tiny.yaml", "epochs=1", "--seeds", "0-1"]) == 0
    (group,) = Path("runs/tiny").iterdir()
    before = {path: path.read_bytes() for path in group.rglob("*") if path.is_file() and path.name != "group.json"}
    assert main(["run", "tiny.yaml", "epochs=1", "--seeds", "0-2"]) == 0
    assert {path: path.read_bytes() for path in before} == before  # finished runs are left alone
    found = Group.read(group)
    assert sorted(found.results) == [0, 1, 2]
    finals = [json.loads((group / f"seed-{n}" / "result.json").read_text())["final"] for n in range(3)]
    assert found.values("test_loss") == {n: final["test_loss"] for n, final in enumerate(finals)}
    capsys.readouterr()
    assert main(["run", "tiny.yaml", "epochs=1", "--seeds", "0-2"]) == 0
    printed = capsys.readouterr().out
    mean = f"{np.mean(list(found.values('test_loss').values())):.4g}"
    assert re.search(rf"test_loss +3 +{re.escape(mean)}", printed)
    assert "3 of 3 seeds completed" in printed
    assert main(["runs", "list"]) == 0
    assert re.search(rf"{re.escape(str(group))} +3/3", capsys.readouterr().out)


def test_groups_are_compared_with_the_interval_of_their_difference(folder, in_this_process, capsys):
    assert main(["study", "small.yaml"]) == 0
    base, slow = (next(Path("runs/small").glob(f"{name}-*")) for name in ("base", "slow"))
    capsys.readouterr()
    assert main(["runs", "compare", str(slow), str(base), "--metric", "train_loss", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    losses = [Group.read(each).values("train_loss") for each in (base, slow)]
    (beyond,) = document["beyond_the_first"]
    assert beyond["mean"] == pytest.approx(np.mean([losses[0][n] - losses[1][n] for n in range(3)]))
    assert beyond["paired"]
    assert document["groups"][0]["metrics"]["train_loss"]["n"] == 3
    assert main(["runs", "compare", str(base), str(base / "seed-0")]) == 2
    assert main(["runs", "compare", str(base), str(slow), "--metric", "speed"]) == 2
    plain, whole = (Group.read(next(Path("runs/small").glob(f"{name}-*"))) for name in ("plain", "base"))
    assert plain.values("test_loss") == whole.values("test_loss")  # metric_log only watches


def test_a_run_that_fails_is_named_and_the_others_go_on(folder, capsys):
    variants = [Variant("seeds", Path("tiny.yaml"), (), read_study(Path("small.yaml"), [])[1][0].recipe)]
    runs = plan(Path("runs/x"), variants, [0, 1, 2])

    failed, code = run_missing(runs, executor=Here(fails=[1]))
    assert ([planned.seed for planned in failed], code) == ([1], 1)
    assert [planned.state() for planned in runs] == ["completed", "missing", "completed"]


def test_a_plugin_that_does_nothing_buys_nothing(folder, in_this_process, capsys):
    recipe = RECIPE.replace("  metrics:", "  freeze: {modules: [stem], epoch: 1}\n  nothing: {by: 1.0}\n  metrics:")
    (folder / "tiny.yaml").write_text("local: [own.py]\n" + recipe)
    (folder / "own.py").write_text(
        "from trainkit.plugin import hookimpl, plugin\n\n\n@plugin\nclass Nothing:\n    by: float\n\n"
        "    @hookimpl\n    def transform_loss(self, run, loss):\n        return loss * self.by\n"
    )
    arguments = ["tiny.yaml", "epochs=2", "--plugins", "nothing,freeze", "--seeds", "0-3", "--allow-local"]
    assert main(["ablate", *arguments, "--metric", "test_loss", "--json"]) == 0
    groups = [Group.read(next(Path("runs/tiny.ablation").glob(f"{name}-*"))) for name in ("all", "without-nothing")]
    found = compare(*(group.values("test_loss") for group in groups))
    assert found.interval[0] <= 0 <= found.interval[1]
    assert not found.certain
    assert (folder / "runs" / "tiny.ablation" / "ablation.svg").read_text().count("freeze") == 1


def test_plugins_that_cannot_be_left_out_are_passed_over_with_the_reason(folder, in_this_process, capsys):
    assert main(["ablate", "tiny.yaml", "epochs=1", "--seeds", "0", "--json"]) == 0
    reasons = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])["passed_over"]
    assert reasons["digits"] == "nothing else provides 'data'"
    assert reasons["metric_log"].startswith("only watches")
    assert main(["ablate", "tiny.yaml", "--plugins", "sgdd"]) == 2
    assert "lists no plugin 'sgdd'; did you mean 'sgd'?" in capsys.readouterr().err
    assert main(["ablate", "tiny.yaml", "--plugins", "sgd"]) == 2


@pytest.mark.parametrize(
    ("command", "home", "again"),
    [
        (["run", "tiny.yaml", "epochs=1", "--seeds", "0-2"], "runs/tiny/*", []),
        (["study", "small.yaml", "-o", "here"], "here", ["--jobs", "1"]),
        (["ablate", "tiny.yaml", "epochs=1", "--plugins", "grad_clip", "--seeds", "0-1"], "runs/tiny.ablation", []),
    ],
)
def test_resume_of_a_group_does_what_the_same_command_does(folder, monkeypatch, capsys, command, home, again):
    (folder / "tiny.yaml").write_text(RECIPE.replace("  metrics:", "  grad_clip:\n  metrics:"))
    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here(fails=[1]))
    assert main(command) == 1
    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here())
    (found,) = Path().glob(home)
    groups = [path.parent for path in folder.rglob("group.json")]
    before = {path: path.read_bytes() for path in folder.rglob("result.json")}
    capsys.readouterr()
    assert main(["resume", str(found), *again]) == 0
    resumed = capsys.readouterr().out
    for group in map(Group.read, groups):
        assert sorted(group.results) == list(group.seeds)
    assert {path: path.read_bytes() for path in before} == before  # finished runs are left alone
    assert main(command) == 0  # there is nothing left to train
    assert resumed.endswith(capsys.readouterr().out)  # behind what the runs print, in this process


def broken_off(folder, monkeypatch):
    """Return a group of which no run was trained."""
    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here(fails=[0]))
    assert main(["run", "tiny.yaml", "epochs=1", "--seeds", "0"]) == 1
    monkeypatch.setattr(trainkit_studies, "LocalProcesses", lambda quiet: Here())
    (group,) = Path("runs/tiny").iterdir()
    return group


def test_a_group_of_an_edited_recipe_is_not_resumed(folder, monkeypatch, capsys):
    group = broken_off(folder, monkeypatch)
    (folder / "tiny.yaml").write_text(RECIPE.replace("lr: 0.1", "lr: 0.2"))
    assert main(["resume", str(group)]) == 2
    assert "tiny.yaml was edited since the group was begun" in capsys.readouterr().err
    (folder / "tiny.yaml").unlink()
    assert main(["resume", str(group)]) == 2
    assert "tiny.yaml: no such recipe" in capsys.readouterr().err


def test_a_group_is_resumed_from_any_folder_and_after_all_was_moved(folder, monkeypatch):
    group = broken_off(folder, monkeypatch)
    (folder / "moved").mkdir()
    for name in ("runs", "tiny.yaml"):
        (folder / name).rename(folder / "moved" / name)
    monkeypatch.chdir(folder / "moved" / group.parent)
    assert main(["resume", group.name]) == 0
    assert sorted(Group.read(Path(group.name)).results) == [0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("overrides", ["--allow-local"], "not what trainkit writes"),
        ("overrides", ["--run-dir=/tmp/x"], "not what trainkit writes"),
        ("overrides", "epochs=1", "not what trainkit writes"),
        ("file", 3, "not what trainkit writes"),
        ("file", "/dev/zero", "/dev/zero"),
        ("file", None, "type the command that began it again"),
        ("variant", "../up", "a variant's name is letters"),
        ("seeds", ["a"], "not what trainkit writes"),
    ],
)
def test_a_strangers_group_is_data(folder, monkeypatch, capsys, key, value, said):
    group = broken_off(folder, monkeypatch)
    told = json.loads((group / "group.json").read_text())
    (group / "group.json").write_text(json.dumps({**told, key: value}))
    assert main(["resume", str(group)]) == 2
    assert said in capsys.readouterr().err


def test_a_strangers_study_names_no_folder_elsewhere(folder, capsys):
    (folder / "study.json").write_text(json.dumps({"variants": {"base": "../other"}}))
    assert main(["resume", "."]) == 2
    assert "study.json: variants: expected the folder of each" in capsys.readouterr().err


def test_what_is_for_one_run_is_refused_of_a_group_and_the_other_way_round(folder, monkeypatch, capsys):
    group = broken_off(folder, monkeypatch)
    assert main(["resume", str(group), "epochs=3"]) == 2
    assert "epochs=3 is for one run" in capsys.readouterr().err
    assert main(["resume", str(group), "--allow-changes"]) == 2
    assert main(["resume", str(group / "seed-0"), "--jobs", "2"]) == 2
    assert "not the folder of a group or a study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("procces", "no executor 'procces'; did you mean 'process'?"),
        ("slurm", "no executor 'slurm'; there are process"),
        ("process:cpus=1", "process: it takes no settings, got cpus"),
        ("process:cpus", "'cpus': expected KEY=VALUE"),
    ],
)
def test_an_executor_that_is_not_there_is_refused_before_anything_is_written(folder, capsys, given, said):
    assert main(["run", "tiny.yaml", "--seeds", "0", "--executor", given]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def study_in_a_process(arguments):
    os.setpgid(0, 0)
    trainkit_studies.LocalProcesses = lambda quiet: Here()
    sys.exit(main(arguments))


@pytest.mark.slow
def test_killed_again_and_again_a_study_reaches_the_identical_end(folder):
    """Where a run is killed does not matter, nor that the study is."""
    context = multiprocessing.get_context("fork")
    lucky = random.Random(0)
    kills = 0
    _, variants, seeds = read_study(Path("small.yaml"), [])
    trainkit_studies.check(plan(Path("runs"), variants, seeds))  # imports what each process would import
    while True:
        process = context.Process(
            target=study_in_a_process, args=(["study", "small.yaml", "epochs=2", "--seeds", "0-1"],)
        )
        process.start()
        process.join(lucky.uniform(0.05, 0.15) * 1.3**kills)  # ends sooner or later, on fast machines and on slow ones
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert kills < 100
    assert kills >= 3
    broken = {path.name: Group.read(path) for path in Path("runs/small").iterdir() if path.is_dir()}
    process = context.Process(
        target=study_in_a_process, args=(["study", "small.yaml", "epochs=2", "--seeds", "0-1", "-o", "whole"],)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for name, group in broken.items():
        whole = Group.read(Path("whole") / name)
        assert sorted(group.results) == [0, 1]
        assert group.values("train_loss") == whole.values("train_loss")
        assert group.values("test_loss") == whole.values("test_loss")


@pytest.mark.slow
def test_ctrl_c_saves_the_run_that_is_trained_and_stops(folder):
    """With the processes that users start: a study, and a run in a process of its own."""
    command = [sys.executable, "-P", "-m", "trainkit", "run", "tiny.yaml", "epochs=100000", "--seeds", "0-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as study:
        deadline = time.monotonic() + 60
        while not list(Path("runs").glob("tiny/*/seed-0/checkpoints/last.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(study.pid, signal.SIGINT)
        assert study.wait(60) == 130
        printed = study.stdout.read().decode()
    (run,) = Path("runs").glob("tiny/*/seed-0")
    assert json.loads((run / "result.json").read_text())["status"] == "stopped"
    assert not list(Path("runs").glob("tiny/*/seed-1"))
    assert "stopped by SIGINT" in printed


def test_several_at_once_share_cores(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")

    class Nothing(Here):
        def train(self, planned, options, variables):
            self.variables.append(variables)
            time.sleep(0.05)
            return 0

    executor = Nothing()
    runs = plan(Path("runs/x"), read_study(Path("small.yaml"), [])[1][:2], [0, 1])
    run_missing(runs, jobs=2, executor=executor)
    assert {variables["OMP_NUM_THREADS"] for variables in executor.variables} == {"4"}
    assert {variables["CUDA_VISIBLE_DEVICES"] for variables in executor.variables} == {"4", "5"}
    assert run_missing([], jobs=1) == ([], 0)

"""What a run records of what its numbers depend on, and which differences are found."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module, metadata
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainkit import Run, build, evaluate, fit, load_recipe, provenance
from trainkit.cli import main
from trainkit.data import TensorSplit
from trainkit.errors import PluginError, RecipeError, RunError, UsageError
from trainkit.plugin import hookimpl, plugin
from trainkit.provenance import ABSENT, LISTED, Difference, compare, fingerprint, from_files, record
from trainkit.recipe import make_options
from trainkit.rundir import RunDir
from trainkit.session import reopen
from trainkit.testing import build_run, fake_data

from .processes import import_from


@plugin
class Declares:
    """Declares what it is given."""

    values: dict

    @hookimpl
    def provenance(self):
        return self.values


def made(**changed):
    """Return a record with what `changed` gives in place of its parts."""
    common = {"version": "1", "source": "wheel", "code": "1", "observer": False, "without_effect": ["root"]}
    plugins = [
        {"name": name, "distribution": f"acme-{name}", **common, "options": {"lr": 0.1, "root": "a"}}
        for name in ("sgd", "se")
    ]
    return {
        "recipe": {"name": "r", "epochs": 2, "seed": 0, "plugins": {"sgd": {"lr": 0.1}}},
        "plugins": plugins,
        "environment": {
            "trainkit": {"version": "1", "code": "1"},
            "python": "3.11.2",
            "threads": 2,
            "packages": {"torch": "2.6", "jinja2": "3"},
            "instruction_sets": {"torch": "AVX512"},
            "settings": {"default_dtype": "torch.float32"},
            "variables": {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0"},
            "device": "cpu",
            "platform": "Linux",
        },
        "data": {
            "splits": {"train": {"images": 8, "content": "1"}},
            "classes": ["cat", "dog"],
            "preprocessing": {"train": {"normalize": {"mean": [0.5]}}},
        },
        "declared": {},
        "replaced": [],
        **changed,
    }


def edited(path, value):
    """Return a record with the value at a path of keys replaced."""
    *parents, last = path
    whole = made()
    part = whole
    for key in parents:
        part = part[key]
    part[last] = value
    return whole


def test_a_record_has_what_the_run_directory_gets(tmp_path):
    run = build_run({}, epochs=1)
    fit(run, tmp_path / "run")
    kept = RunDir(tmp_path / "run")
    parts = [kept.read_json(name) for name in ("plugins.lock.json", "environment.json", "data.json")]
    assert from_files(run.recipe, *parts) == json.loads(json.dumps(run.provenance))
    assert compare(run.provenance, record(run)) == []


def test_a_record_is_plain_data_that_a_checkpoint_can_hold(tmp_path):
    (tmp_path / "weights").write_bytes(b"x")
    whole = record(build_run({"declares": Declares(values={"weights": tmp_path / "weights", "timm": "1.0"})}))
    torch.save(whole, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == whole
    assert str(tmp_path) not in json.dumps({**whole, "plugins": []})  # there the path is an option


def test_what_plugins_declare_is_recorded_files_by_their_content(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(3_000_000))
    digest = hashlib.blake2b(bytes(3_000_000), digest_size=16).hexdigest()
    run = build_run({"declares": Declares(values={"weights": path, "timm": "1.0", "scale": 0.5}), "other": Metric()})
    assert record(run)["declared"] == {"declares": {"weights": f"blake2b:{digest}", "timm": "1.0", "scale": 0.5}}
    before = record(run)
    path.write_bytes(bytes(2_999_999) + b"x")
    (difference,) = compare(before, record(run))
    assert (difference.key, difference.effect) == ("declared.declares.weights", "numbers")


@plugin
class Metric:
    """Declares nothing."""

    @hookimpl
    def provenance(self):
        return None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": Path("absent")}, "plugin 'declares', provenance: weights: absent: No such file or directory"),
        ({"weights": Path()}, "plugin 'declares', provenance: weights: .: Is a directory"),
        ({"classes": ["a"]}, "plugin 'declares', provenance: expected Path or str or float, got list"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(values, said):
    with pytest.raises(PluginError) as caught:
        record(build_run({"declares": Declares(values=values)}))
    assert str(caught.value) == said


def test_equal_records_have_no_differences():
    assert compare(made(), made()) == []
    assert compare(made(), made(), made()) == []


@pytest.mark.parametrize(
    ("path", "value", "said", "effect"),
    [
        (("recipe", "seed"), 4, "seed was 0 and is 4", "numbers"),
        (("recipe", "batch_size"), 8, "batch_size was absent and is 8", "numbers"),
        (("recipe", "epochs"), 3, "epochs was 2 and is 3", "length"),
        (("recipe", "max_steps"), 3, "max_steps was absent and is 3", "length"),
        (("recipe", "name"), "s", "name was r and is s", "none"),
        (("recipe", "expect"), {"test_accuracy": 1}, "expect was absent and is {'test_accuracy': 1}", "none"),
        (("plugins", 0, "source"), "editable", "plugins.sgd source was wheel and is editable", "none"),
        (("plugins", 0, "options", "lr"), 0.2, "plugins.sgd.lr was 0.1 and is 0.2", "numbers"),
        (("plugins", 0, "options"), {"root": "a"}, "plugins.sgd.lr was 0.1 and is absent", "numbers"),
        (("environment", "threads"), 1, "environment.threads was 2 and is 1", "numbers"),
        (("plugins", 0, "code"), "2", "plugins.sgd code was 1 and is 2", "numbers"),
        (("plugins", 0, "options", "root"), "b", "plugins.sgd.root was a and is b", "none"),
        (("plugins", 0, "without_effect"), ["lr"], "plugins.sgd without_effect was ['root'] and is ['lr']", "none"),
        (("recipe", "device"), "cpu", "device was absent and is cpu", "none"),
        (("environment", "trainkit", "code"), "2", "environment.trainkit.code was 1 and is 2", "numbers"),
        (("environment", "trainkit", "version"), "2", "environment.trainkit.version was 1 and is 2", "none"),
        (("environment", "python"), "3.11.9", "environment.python was 3.11.2 and is 3.11.9", "none"),
        (("environment", "python"), "3.12.2", "environment.python was 3.11.2 and is 3.12.2", "numbers"),
        (("environment", "packages", "torch"), "2.7", "environment.packages.torch was 2.6 and is 2.7", "numbers"),
        (("environment", "packages", "jinja2"), "4", "environment.packages.jinja2 was 3 and is 4", "numbers"),
        (
            ("environment", "instruction_sets", "torch"),
            "AVX2",
            "environment.instruction_sets.torch was AVX512 and is AVX2",
            "numbers",
        ),
        (
            ("environment", "settings", "default_dtype"),
            "torch.float64",
            "environment.settings.default_dtype was torch.float32 and is torch.float64",
            "numbers",
        ),
        (
            ("environment", "variables", "ATEN_CPU_CAPABILITY"),
            "avx2",
            "environment.variables.ATEN_CPU_CAPABILITY was absent and is avx2",
            "numbers",
        ),
        (
            ("environment", "variables", "OMP_NUM_THREADS"),
            "1",
            "environment.variables.OMP_NUM_THREADS was 2 and is 1",
            "none",
        ),
        (  # the model of the GPU is compared
            ("environment", "variables", "CUDA_VISIBLE_DEVICES"),
            "1",
            "environment.variables.CUDA_VISIBLE_DEVICES was 0 and is 1",
            "none",
        ),
        (("environment", "device"), "cuda:0", "environment.device was cpu and is cuda:0", "numbers"),
        (("environment", "platform"), "BSD", "environment.platform was Linux and is BSD", "none"),
        (("data", "splits", "train", "content"), "2", "data.splits.train.content was 1 and is 2", "numbers"),
        (("data", "splits", "train", "images"), 9, "data.splits.train.images was 8 and is 9", "numbers"),
        (
            ("data", "classes"),
            ["dog", "cat"],
            "data.classes was ['cat', 'dog'] and is ['dog', 'cat']",
            "numbers",
        ),
        (
            ("data", "preprocessing", "train"),
            {},
            "data.preprocessing.train.normalize was {'mean': [0.5]} and is absent",
            "none",
        ),
        (("replaced",), ["loss"], "what was replaced after build() was nothing and is loss", "numbers"),
        (("declared", "timm"), {"v": "1"}, "declared.timm was absent and is {'v': '1'}", "numbers"),
    ],
)
def test_each_difference_is_found_and_known_for_what_it_does(path, value, said, effect):
    (difference,) = compare(made(), edited(path, value))
    assert (str(difference), difference.effect) == (said, effect)


def test_a_plugin_that_is_added_or_dropped_is_one_difference():
    fewer = made(plugins=made()["plugins"][:1])
    assert [str(d) for d in compare(fewer, made())] == ["plugins.se was added"]
    assert [str(d) for d in compare(made(), fewer)] == ["plugins.se was dropped"]


def test_another_order_is_a_difference_of_the_plugins_that_both_have():
    turned = made(plugins=made()["plugins"][::-1])
    assert [str(d) for d in compare(made(), turned)] == ["order of plugins was sgd, se and is se, sgd"]
    longer = made(plugins=[{**made()["plugins"][0], "name": "new"}, *made()["plugins"]])
    assert [str(d) for d in compare(made(), longer)] == ["plugins.new was added"]


def test_many_records_give_a_value_each():
    other = edited(("plugins", 1, "options", "lr"), 0.3)
    without = made(plugins=made()["plugins"][:1])
    assert compare(made(), without, other) == [
        Difference("plugins.se", (LISTED, ABSENT, LISTED)),
        Difference("plugins.se.lr", (0.1, ABSENT, 0.3)),
    ]


def test_a_part_that_an_older_version_did_not_record_counts_as_empty():
    older = made()
    del older["declared"]
    assert compare(older, made()) == []


def test_comparing_changes_nothing():
    one, two = made(), edited(("recipe", "seed"), 4)
    before = copy.deepcopy((one, two))
    compare(one, two)
    assert (one, two) == before


def test_the_revision_is_that_of_trainkits_own_sources(tmp_path, monkeypatch):
    before = provenance.revision()
    monkeypatch.chdir(tmp_path)
    assert provenance.revision() == before
    (tmp_path / "trainkit").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "trainkit" / "provenance.py"))
    provenance.revision.cache_clear()
    try:
        assert provenance.revision() is None
    finally:
        provenance.revision.cache_clear()


def test_the_same_code_under_another_version_is_the_same():
    (difference,) = compare(made(), edited(("plugins", 0, "version"), "2"))
    assert (str(difference), difference.effect) == ("plugins.sgd version was 1 and is 2", "none")
    without = made()
    without["plugins"][0]["code"] = None
    newer = copy.deepcopy(without)
    newer["plugins"][0]["version"] = "2"
    assert [d.effect for d in compare(without, newer)] == ["numbers"]


def test_one_record_alone_cannot_make_a_plugin_an_observer():
    """Files of a run may have been edited: both must say that a difference is without effect."""
    claims = made()
    claims["plugins"][0].update(observer=True, without_effect=["root", "lr"], options={"lr": 1, "root": "a"})
    claims["declared"] = {"sgd": {"weights": "2"}}
    numbers = {d.key for d in compare(made(), claims) if d.effect == "numbers"}
    assert numbers == {"plugins.sgd.lr", "declared.sgd"}


def test_the_material_is_what_decides_numbers_wherever_that_is():
    notes = [
        (("recipe", "name"), "s"),
        (("plugins", 0, "options", "root"), "b"),
        (("plugins", 0, "version"), "2"),
        (("environment", "threads"), 1),
        (("data", "preprocessing"), {}),
    ]
    for path, value in notes:
        assert provenance.material(edited(path, value)) == provenance.material(made()), path
    for path, value in [(("recipe", "epochs"), 3), (("plugins", 0, "code"), "2"), (("data", "classes"), [])]:
        assert provenance.material(edited(path, value)) != provenance.material(made()), path
    assert provenance.machine(edited(("environment", "python"), "3.11.9")) == provenance.machine(made())
    for path, value in [(("environment", "python"), "3.12.2"), (("environment", "threads"), 1)]:
        assert provenance.machine(edited(path, value)) != provenance.machine(made()), path


def test_fingerprint_sees_every_pixel_and_target():
    split = fake_data(4).train
    images, targets = split.images.clone(), split.targets.clone()
    images[3, 2, 1, 1] += 1
    targets[0] += 1
    others = [TensorSplit(images, split.targets), TensorSplit(split.images, targets)]
    assert len({fingerprint(s) for s in [split, *others]}) == 3
    assert fingerprint(split) == fingerprint(fake_data(4).train)
    assert fingerprint(range(7)) == "7 images"


def test_records_are_compared_without_torch():
    code = "import sys; from trainkit import provenance; provenance.compare({}, {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what a real run records


def test_the_environment_says_what_this_process_computes_with(tmp_path):
    found = record(build_run({}))["environment"]
    assert found["instruction_sets"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"numpy", "sympy", "pluggy"} <= set(found["packages"])  # sympy: of torch
    assert found["threads"] == torch.get_num_threads()
    assert found["settings"]["default_dtype"] == "torch.float32"
    assert found["trainkit"]["code"].startswith("blake2b:")
    torch.set_flush_denormal(True)
    try:
        assert [
            d.key for d in compare({"environment": found}, {"environment": record(build_run({}))["environment"]})
        ] == ["environment.settings.flush_denormal"]
    finally:
        torch.set_flush_denormal(False)


def test_an_exchanged_package_is_a_difference(monkeypatch):
    before = record(build_run({}))
    monkeypatch.setattr(provenance, "_version", lambda name: "9" if name == "numpy" else _version(name))
    differences = compare(before, record(build_run({})))
    assert [(d.key, d.effect) for d in differences] == [("environment.packages.numpy", "numbers")]


_version = provenance._version


# ---- what was replaced after build()


def replace_loss(run):
    run.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.5)


def replace_optimizer(run):
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)


def replace_model(run):
    run.model = copy.deepcopy(run.model)


def replace_weights(run):
    run.model.load_state_dict({name: value + 1 for name, value in run.model.state_dict().items()})


def change_rate(run):
    run.optimizer.param_groups[0]["lr"] = 3.0


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (replace_loss, ["loss"]),
        (replace_optimizer, ["optimizer", "optimizer's state"]),
        (replace_model, ["model"]),
        (replace_weights, ["weights"]),
        (change_rate, ["optimizer's state"]),
    ],
)
def test_what_is_replaced_after_build_is_recorded(act, names):
    run = build_run({})
    before = record(run)
    assert before["replaced"] == []
    act(run)
    found = record(run)["replaced"]
    assert [re.sub(" [0-9a-f]{32}$", "", name) for name in found] == names
    (difference,) = compare(before, record(run))
    assert difference.effect == "numbers"
    assert str(difference).startswith(f"what was replaced after build() was nothing and is {names[0]}")


def test_training_evaluating_and_loading_replace_nothing(tmp_path):
    run = build_run({}, epochs=2)
    run.load_state_dict(copy.deepcopy(run.state_dict()) | {"provenance": {}})
    assert record(run)["replaced"] == []
    fit(run, tmp_path / "run")
    evaluate(run)
    assert run.provenance["replaced"] == record(run)["replaced"] == []


def test_the_run_directory_and_the_checkpoint_say_what_was_replaced(small):
    run = build(load_recipe(small, ["max_steps=4"]))
    replace_weights(run)
    replace_loss(run)
    fit(run, "out")
    said = RunDir(Path("out")).read_json("environment.json")["replaced"]
    assert [text.split()[0] for text in said] == ["loss", "weights"]
    with pytest.raises(RecipeError, match=r"what was replaced after build\(\) was loss, weights \w+ and is weights"):
        reopen("out", ["max_steps=6"])
    again = reopen("out", ["max_steps=6"], allow_changes=True)  # the checkpoint has the weights, and not the loss
    assert [text.split()[0] for text in record(again)["replaced"]] == ["weights"]
    replace_loss(again)
    fit(again)
    assert again.provenance["replaced"] == said


# ---- resume


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


def test_resuming_a_finished_run_says_so_and_touches_nothing(small, capsys):
    assert main(["run", str(small), "--run-dir", "out"]) == 0
    before = files("out")
    capsys.readouterr()
    assert main(["resume", "out"]) == 0
    assert "nothing is left to train: 2 epochs and 12 steps are completed" in capsys.readouterr().out
    assert files("out") == before


@pytest.mark.parametrize(
    "overrides",
    [
        ["plugins.progress={}"],
        ["plugins.checkpoint.every_steps=1"],
        ["plugins.resnet.init=kaiming_normal"],
        ["device=auto"],
        ["name=other"],
        ["plugins.metrics.every=0"],
    ],
)
def test_what_cannot_change_a_bit_may_change(small, overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    default = make_options(
        load_recipe(small), "resnet", type(build(load_recipe(small)).hooks.plugins["resnet"].instance)
    )
    overrides = [o.replace("kaiming_normal", str(default.init)) for o in overrides]  # a default, written out
    train(small, "out", "max_steps=4")
    reopen("out", [*overrides, "max_steps=5"])


def train(recipe, out, *overrides):
    return fit(build(load_recipe(recipe, overrides)), out)


def test_resuming_adds_what_it_changed_and_keeps_what_was_recorded_first(small):
    train(small, "out", "max_steps=4")
    first = {path.name: path.read_bytes() for path in Path("out").glob("*.*") if path.name != "result.json"}
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        with pytest.raises(RecipeError, match=r"environment.threads was \d and is \d"):
            reopen("out", ["max_steps=6"])
        fit(reopen("out", ["max_steps=6"], allow_changes=True))
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    now = {path.name: path.read_bytes() for path in Path("out").glob("*.*")}
    kept = ("recipe.yaml", "environment.json", "data.json", "plugins.lock.json")
    assert {name: now[name] for name in kept} == {name: first[name] for name in kept}
    assert {"environment.2.json", "recipe.2.yaml", "result.session-1.json"} <= set(now)
    assert "data.2.json" not in now


def test_a_failed_resume_leaves_the_result_of_a_completed_run(small, monkeypatch):
    train(small, "out", "plugins.cosine_annealing_lr=false")
    before = Path("out/result.json").read_bytes()
    run = reopen("out", ["epochs=3"])
    monkeypatch.setattr(run, "loss", None)
    with pytest.raises(TypeError):
        fit(run)
    assert Path("out/result.json").read_bytes() == before


def test_a_schedule_that_was_made_for_fewer_epochs_cannot_be_extended(small, capsys):
    train(small, "out")
    before = files("out")
    assert main(["resume", "out", "epochs=4"]) == 2
    said = capsys.readouterr().err
    assert "the schedule was made for 2 epochs and the run would last 4" in said
    assert "Start a new run of that length" in said
    assert files("out") == before


def test_a_schedule_of_milestones_can_be_extended(small):
    steps = ["plugins.cosine_annealing_lr=false", "plugins.multi_step_lr.milestones=[1]"]
    train(small, "out", *steps)
    train(small, "whole", *steps, "epochs=3")
    fit(reopen("out", ["epochs=3"]))
    assert RunDir(Path("out")).read_json("result.json")["resumed"] == [
        {"epoch": 2, "step": 12, "changes": ["epochs was 2 and is 3"]}
    ]
    assert Path("out/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()


class KilledError(KeyboardInterrupt):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("write", range(1, 7))
def test_killed_between_two_checkpoint_files_nothing_stays_stale(small, monkeypatch, write):
    module = import_module("trainkit_checkpoint")
    keep = "plugins.checkpoint.keep_every=1"
    train(small, "whole", keep)
    written, atomic_write = 0, module.atomic_write

    def write_or_die(path, data):
        nonlocal written
        written += 1
        if written == write:
            raise KilledError
        atomic_write(path, data)

    monkeypatch.setattr(module, "atomic_write", write_or_die)
    with pytest.raises((KilledError, RunError)):
        train(small, "out", keep)
    monkeypatch.setattr(module, "atomic_write", atomic_write)
    if not Path("out/checkpoints/last.pt").exists():
        return
    fit(reopen("out"))
    for name in ("last", "best", "epoch-1", "epoch-2"):
        mine, theirs = (RunDir(Path(out)).load_state(name) for out in ("out", "whole"))
        assert provenance.state_digest(mine) == provenance.state_digest(theirs), name


def test_stopped_early_killed_and_resumed_a_run_ends_the_same(small, monkeypatch):
    early = ["epochs=9", "plugins.cosine_annealing_lr=false", "plugins.early_stopping={patience: 2, min_delta: 10}"]
    whole = train(small, "whole", *early)
    assert (whole.status, whole.epochs) == ("stopped", 3)
    state = Run.state_dict

    def state_or_die(run):
        if run.epoch == 3:
            raise KilledError
        return state(run)

    monkeypatch.setattr(Run, "state_dict", state_or_die)
    with pytest.raises((KilledError, RunError)):
        train(small, "out", *early)
    monkeypatch.setattr(Run, "state_dict", state)
    again = fit(reopen("out"))
    assert (again.status, again.epochs, again.reason, again.final) == (
        whole.status,
        whole.epochs,
        whole.reason,
        whole.final,
    )


def test_of_two_new_runs_in_one_directory_the_refused_one_deletes_nothing(small):
    first, second = (build(load_recipe(small)) for _ in range(2))
    made = RunDir.create(second.recipe, Path("out"))  # both found it empty
    fit(first, "out")
    before = files("out")
    second.dir = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "create", classmethod(lambda *_: made))
        with pytest.raises(UsageError, match="another process began a run there"):
            fit(second, "out")
    assert files("out") == before
    assert second.dir is None


def test_a_directory_that_another_process_holds_is_refused_and_kept(small):
    run = build(load_recipe(small))
    made = RunDir.create(run.recipe, Path("out"))
    with made.exclusive(), pytest.raises(UsageError, match="another process is writing"):
        fit(run, "out")
    assert Path("out").is_dir()
    fit(run, "elsewhere")


@pytest.mark.slow
def test_an_edited_plugin_is_refused_by_name(small, tmp_path, trainkit):
    train(small, "out", "max_steps=4")
    module = import_module("trainkit_lookahead")
    (site := tmp_path / "site").mkdir()
    source = Path(module.__file__).read_text()
    (site / "trainkit_lookahead.py").write_text(source.replace("alpha: float", "alpha: float", 1) + "\nALPHA = 0.9\n")
    info = metadata.distribution("trainkit-lookahead")._path
    shutil.copytree(info, site / info.name)
    done = trainkit("resume", "out", "max_steps=null", before=partial(import_from, site))
    assert done.returncode == 2, done.stdout
    assert "plugins.lookahead code was blake2b:" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs a CPU with AVX2")
def test_another_instruction_set_is_refused_by_name(small, trainkit):
    train(small, "out", "max_steps=4")
    done = trainkit("resume", "out", "max_steps=null", env={**os.environ, "ATEN_CPU_CAPABILITY": "default"})
    assert done.returncode == 2, done.stdout
    assert "environment.instruction_sets.torch was" in done.stderr
    assert "environment.variables.ATEN_CPU_CAPABILITY was absent and is default" in done.stderr


def test_moved_and_copied_data_and_other_workers_are_the_same_data(small, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, label, n in product(("train", "test"), ("cat", "dog"), range(4)):
        path = tmp_path / "data" / split / label / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(path)
    small.write_text(
        small.read_text()
        .replace("  digits:", "  image_folder: {root: data, size: 8, in_memory: false}")
        .replace("[0.305], std: [0.376]", "[0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]")
        .replace("batch_size: 256", "batch_size: 4")
    )
    train(small, "out", "max_steps=3")
    shutil.copytree("data", "copied")
    shutil.move("data", "moved")
    for root in ("copied", "moved"):
        reopen("out", [f"plugins.image_folder.root={root}", "max_steps=4"])
    reopen("out", ["plugins.image_folder.root=moved", "plugins.image_folder.workers=1", "max_steps=4"])
    (tmp_path / "moved" / "train" / "cat").rename(tmp_path / "moved" / "train" / "zebra")
    (tmp_path / "moved" / "test" / "cat").rename(tmp_path / "moved" / "test" / "zebra")
    with pytest.raises(RecipeError, match=r"data.classes was \['cat', 'dog'\] and is \['dog', 'zebra'\]"):
        reopen("out", ["plugins.image_folder.root=moved", "max_steps=4"])

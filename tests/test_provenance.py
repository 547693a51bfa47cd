"""What a run records of what its numbers depend on, and which differences are found."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainkit import fit, provenance
from trainkit.data import TensorSplit
from trainkit.errors import PluginError
from trainkit.plugin import hookimpl, plugin
from trainkit.provenance import ABSENT, LISTED, Difference, compare, fingerprint, from_files, record
from trainkit.rundir import RunDir
from trainkit.testing import build_run, fake_data


@plugin
class Declares:
    """Declares what it is given."""

    values: dict

    @hookimpl
    def provenance(self):
        return self.values


def made(**changed):
    """Return a record with what `changed` gives in place of its parts."""
    plugins = [
        {"name": name, "distribution": f"acme-{name}", "version": "1", "source": "wheel", "options": {"lr": 0.1}}
        for name in ("sgd", "se")
    ]
    return {
        "recipe": {"name": "r", "epochs": 2, "seed": 0, "plugins": {"sgd": {"lr": 0.1}}},
        "plugins": plugins,
        "environment": {"python": "3.11", "threads": 2, "packages": {"torch": "2.6"}, "data": {"train": {"images": 8}}},
        "declared": {},
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
    again = from_files(run.recipe.to_dict(), kept.read_json("plugins.lock.json"), kept.read_json("environment.json"))
    assert again == json.loads(json.dumps(run.provenance))
    assert compare(run.provenance, record(run)) == []


def test_a_record_is_plain_data_that_a_checkpoint_can_hold(tmp_path):
    (tmp_path / "weights").write_bytes(b"x")
    whole = record(build_run({"declares": Declares(values={"weights": tmp_path / "weights", "timm": "1.0"})}))
    torch.save(whole, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == whole
    assert str(tmp_path) not in json.dumps(whole)


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
        (("plugins", 0, "version"), "2", "plugins.sgd version was 1 and is 2", "numbers"),
        (("plugins", 0, "source"), "editable", "plugins.sgd source was wheel and is editable", "none"),
        (("plugins", 0, "options", "lr"), 0.2, "plugins.sgd.lr was 0.1 and is 0.2", "numbers"),
        (("plugins", 0, "options"), {}, "plugins.sgd.lr was 0.1 and is absent", "numbers"),
        (("environment", "threads"), 1, "environment.threads was 2 and is 1", "numbers"),
        (("environment", "python"), "3.12", "environment.python was 3.11 and is 3.12", "none"),
        (("environment", "packages", "torch"), "2.7", "environment.packages.torch was 2.6 and is 2.7", "numbers"),
        (("environment", "data", "train", "images"), 9, "environment.data.train.images was 8 and is 9", "numbers"),
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


def test_the_revision_is_that_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.revision() is None


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

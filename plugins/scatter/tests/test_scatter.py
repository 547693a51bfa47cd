import json
import re
from xml.etree import ElementTree

import pytest
import scipy.stats

from trainkit.cli import main
from trainkit_scatter import points_of
from trainkit_studies import groups_in


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of three variants, as files: one of three seeds, one of one, one of none."""
    monkeypatch.chdir(tmp_path)
    accuracies = {"shared": [90.0, 91.0, 92.5], "a_$b$": [93.0], "none": []}
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "study" / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            result = {"status": "completed", "finished": True, "parameters": 100 * len(name), "seconds": {"train": 2.5}}
            (folder / "result.json").write_text(json.dumps({**result, "final": {"test_accuracy": value}}))
        (tmp_path / "study" / name).mkdir(parents=True, exist_ok=True)
        told = {"variant": name, "recipe": "r", "overrides": [], "seeds": [0, 1, 2]}
        (tmp_path / "study" / name / "group.json").write_text(json.dumps(told))
    variants = {"name": "s", "variants": {name: name for name in accuracies}}
    (tmp_path / "study" / "study.json").write_text(json.dumps(variants))
    return tmp_path / "study"


def test_points_are_means_with_scipys_intervals(study):
    shared, other = points_of(groups_in(study), "parameters", "test_accuracy")
    assert (shared.x.mean, shared.y.mean, other.y.interval) == (600, pytest.approx(91.1666667), None)
    expected = scipy.stats.ttest_1samp([90.0, 91.0, 92.5], 0).confidence_interval(0.95)
    assert shared.y.interval == pytest.approx((expected.low, expected.high))
    assert [point.x.mean for point in points_of(groups_in(study), "seconds", "test_accuracy")] == [2.5, 2.5]


def test_the_picture_names_groups_and_axes_and_what_is_left_out(study, capsys):
    assert main(["runs", "scatter", str(study), "-o", "out.svg"]) == 0
    said = capsys.readouterr()
    assert re.search(r"none: left out: no completed run of it reports parameters and test_accuracy", said.err)
    texts = {"".join(element.itertext()) for element in ElementTree.parse("out.svg").iter() if element.text}
    assert {"shared (n = 3)", "a_$b$", "parameters", "test_accuracy (mean, 95 % interval)"} <= texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "--y", "test_acuracy"], "--y: no run reports 'test_acuracy'; did you mean 'test_accuracy'"),
        (["study", "--x", "bytes"], "--x: no run reports 'bytes'; there are parameters, seconds, test_accuracy"),
        (["study/none"], "study/none: no run of it is completed"),
        (["study", "-o", "out.gif"], "ends in .png or .svg"),
        (["study", "-o", "nowhere/out.png"], "nowhere/out.png: cannot be written"),
        ([".."], "neither a group of runs nor a study"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_error(study, capsys, arguments, said):
    assert main(["runs", "scatter", *arguments]) == 2
    assert said in capsys.readouterr().err

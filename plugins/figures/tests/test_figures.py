import os
import struct
import sys
import xml.etree.ElementTree as ET

import pytest

from trainkit import TrainkitError, fit
from trainkit.cli import main
from trainkit.errors import RecipeError
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import RunDir
from trainkit.testing import assert_refuses, build_run, watch
from trainkit_figures import Figures

HEADER = "epoch,train_loss,test_loss,test_accuracy\n"


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(HEADER + "1,1.5,1.25,50\n2,1.0,0.75,61.5\n3,0.5,0.8125,60\n4,0.25,0.5,90\n")
    return path


def row(epoch, **values):
    return {"epoch": epoch, "step": epoch, "lr": 0.1, **values}


HISTORY = [
    row(1, train_loss=1.6, train_accuracy=40.0, test_loss=1.4, test_accuracy=45.0),
    row(2, train_loss=1.1, train_accuracy=55.0, test_loss=0.9, test_accuracy=57.25),
    row(3, train_loss=0.9, train_accuracy=60.0, test_loss=1.0, test_accuracy=52.0),
]


def draw(folder, history, *, epochs=3, **options):
    expect = options.pop("expect", {})
    figures = Figures(**options)
    run = build_run({"figures": figures}, epochs=epochs, name="my_recipe", expect=expect)
    run.dir = RunDir(folder)
    figures.fit_start()
    run.history = history
    figures.fit_end(run)
    return folder / "figures"


def texts(path):
    """All text in an SVG file."""
    return ["".join(e.itertext()) for e in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def names(*pictures):
    return sorted(f"{picture}.{kind}" for picture in pictures for kind in ("png", "svg"))


def test_each_picture_is_two_files_of_readable_size(tmp_path):
    folder = draw(tmp_path, HISTORY)
    assert sorted(p.name for p in folder.iterdir()) == names("accuracy", "learning_rate", "loss")
    for name in ("accuracy.png", "loss.png"):
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert struct.unpack(">II", data[16:24]) == (1200, 700)


def test_a_dark_variant_says_the_same(tmp_path):
    folder = draw(tmp_path, HISTORY, dark=True)
    light = ["accuracy", "learning_rate", "loss"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names(*light, *(f"{name}.dark" for name in light)))
    assert texts(folder / "loss.dark.svg") == texts(folder / "loss.svg")
    assert "#12151a" in (folder / "loss.dark.svg").read_text()


def test_the_last_epoch_has_a_tick_and_no_other_touches_it(tmp_path):
    history = [row(n, train_loss=1 / n, test_loss=1 / n) for n in range(1, 202)]
    labels = [text for text in texts(draw(tmp_path, history, epochs=201) / "loss.svg") if text.isdigit()]
    assert "201" in labels
    assert "200" not in labels
    assert "201" in texts(tmp_path / "figures" / "learning_rate.svg")


def test_labels_name_recipe_splits_and_best_epoch(tmp_path):
    folder = draw(tmp_path, HISTORY, expect={"test_accuracy": 93.83})
    loss, accuracy = texts(folder / "loss.svg"), texts(folder / "accuracy.svg")
    assert {"Train vs Test Loss: my_recipe", "loss", "epoch", "train", "test"} <= set(loss)
    assert {"Model Accuracy: my_recipe", "accuracy (%)", "expected 93.83"} <= set(accuracy)
    assert "best test 0.9000 (epoch 2)" in loss
    assert "best test 57.25 (epoch 2)" in accuracy
    assert not any("published" in text or "expected" in text for text in loss)


def test_with_a_validation_split_its_curve_is_drawn(tmp_path):
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    fit(build_run({"held_out": held_out, "loss": Loss(), "figures": Figures()}, epochs=3), tmp_path)
    labels = texts(tmp_path / "figures" / "loss.svg")
    assert {"Train vs Validation Loss: test", "validation", "best validation 0.3333 (epoch 3)"} <= set(labels)
    assert "test" not in labels


def test_the_published_curve_is_laid_over_as_far_as_the_recipe_goes_and_its_best_is_that_of_all(tmp_path, published):
    folder = draw(tmp_path, HISTORY, published=published)
    assert {"published train", "published test, best 0.5000 (epoch 4)"} <= set(texts(folder / "loss.svg"))
    assert "published test, best 90.00 (epoch 4)" in texts(folder / "accuracy.svg")
    assert "4" not in texts(folder / "accuracy.svg")
    assert "published train" not in texts(folder / "accuracy.svg")
    assert "stroke-dasharray" in (folder / "loss.svg").read_text()


def test_the_published_curve_shows_what_is_still_to_come(tmp_path, published):
    assert "4" in texts(draw(tmp_path / "a", HISTORY[:1], epochs=4, published=published) / "loss.svg")
    assert "4" not in texts(draw(tmp_path / "b", HISTORY, epochs=4) / "loss.svg")


def test_the_same_numbers_give_the_same_files(tmp_path, published):
    a, b = (draw(tmp_path / name, HISTORY, published=published) for name in "ab")
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes()


def test_a_single_epoch_shows_points(tmp_path):
    path = draw(tmp_path, HISTORY[:1]) / "loss.svg"
    assert "best test 1.400 (epoch 1)" in texts(path)
    ticks = [e for e in ET.parse(path).iter() if e.get("id", "").startswith("xtick")]
    assert ["".join(t.itertext()).strip() for t in ticks] == ["1"]


@pytest.mark.parametrize(
    "history",
    [
        [row(1, train_loss=1.0, test_loss=2.0)],
        [row(1, train_loss=1.0, test_loss=2.0, test_accuracy=float("nan"))],
    ],
)
def test_without_accuracy_only_loss_is_drawn(tmp_path, history):
    assert sorted(p.name for p in draw(tmp_path, history).iterdir()) == names("learning_rate", "loss")


def test_a_diverged_run_is_drawn_as_far_as_it_has_numbers(tmp_path):
    history = [*HISTORY, row(4, train_loss=float("inf"), test_loss=float("nan"), test_accuracy=10.0)]
    assert "best test 0.9000 (epoch 2)" in texts(draw(tmp_path, history) / "loss.svg")


def test_nothing_to_draw_is_no_error(tmp_path):
    assert not draw(tmp_path, []).exists()
    assert sorted(p.name for p in draw(tmp_path, [row(1)]).iterdir()) == names("learning_rate")


@plugin
class Loss:
    """Reports a loss, notes when figures appear, and fails after some epochs."""

    fail: int | None = None

    @hookimpl
    def metrics(self, run):
        return {"loss": 1 / (run.epoch + 1)}

    @hookimpl
    def epoch_start(self, run):
        (run.dir.path / f"{run.epoch}-{(run.dir.path / 'figures').exists()}").touch()
        if run.epoch == self.fail:
            raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("every", "seen"), [(0, ["0-False", "1-False", "2-False"]), (2, ["0-False", "1-False", "2-True"])]
)
def test_drawn_now_and_then_and_at_the_end(tmp_path, every, seen):
    fit(build_run({"loss": Loss(), "figures": Figures(every=every)}, epochs=3), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*-*e")) == seen
    assert "best test 0.3333 (epoch 3)" in texts(tmp_path / "figures" / "loss.svg")


def test_drawn_after_a_failure_too(tmp_path):
    with pytest.raises(TrainkitError, match="broken"):
        fit(build_run({"loss": Loss(fail=2), "figures": Figures()}, epochs=3), tmp_path)
    assert "best test 0.5000 (epoch 2)" in texts(tmp_path / "figures" / "loss.svg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected rows under a line that names some of epoch, train_loss"),
        ("epoch,accuracy\n1,2\n", "expected rows under"),
        ("test_loss\n1\n", "expected rows under"),
        (HEADER, "expected rows under"),
        (HEADER + "1,1.5,1.25,50\n2,1.5,high,50\n", "line 3: not a row of numbers: .*'high'"),
        (HEADER + "1,1.5\n", "line 2: not a row of numbers"),
        (b"\xff\xfe\x00epoch", "not UTF-8 text"),
    ],
)
def test_a_wrong_published_file_is_an_error_before_training(tmp_path, content, message):
    path = tmp_path / "curve.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run = build_run({"figures": Figures(published=path)})
    with pytest.raises(RecipeError, match=rf"figures.*published: .*curve\.csv.*{message}"):
        fit(run, tmp_path / "run")
    assert run.step == 0


def test_pyplot_and_its_settings_are_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    draw(tmp_path, HISTORY)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_every_cannot_be_negative():
    assert_refuses(Figures, "every", -1)


@pytest.mark.parametrize("kind", ["fifo", "large"])
def test_a_published_file_is_a_regular_one_of_bounded_size(tmp_path, kind):
    path = tmp_path / "curve.csv"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(RecipeError, match=r"curve\.csv: cannot be read: it is (no regular file|larger than 16 MiB)"):
        Figures(published=path).fit_start()


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """Two run directories with a table of epochs each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, values in (("a", (50, 70, 65)), ("b", (40, 60))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
        rows = [f"{epoch},{value}," for epoch, value in enumerate(values, 1)]
        (tmp_path / name / "metrics.csv").write_text("\n".join(["epoch,test_accuracy,test_loss", *rows]) + "\n")
    (tmp_path / "a" / "result.json").write_text('{"best": {"test_accuracy": {"value": 70, "epoch": 2}}}')
    return tmp_path


def test_several_runs_are_drawn_over_each_other(two_runs):
    assert main(["runs", "curves", "a", "b", "-o", "both.svg"]) == 0
    said = texts(two_runs / "both.svg")
    assert "a: last 65.00, best 70.00 (epoch 2)" in said
    assert "b: last 60.00" in said  # whose result is not there
    assert main(["runs", "curves", "a", "b", "--dark"]) == 0
    assert (two_runs / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--metric", "test_acuracy"], "no run has 'test_acuracy'; there are epoch, test_accuracy"),
        (["a", "c"], "metrics.csv: cannot be read"),
        (["a", "-o", "x.jpg"], "ends in .png or .svg"),
        (["empty"], "no rows with a column `epoch`"),
    ],
)
def test_curves_that_cannot_be_drawn(two_runs, capsys, arguments, said):
    (two_runs / "empty").mkdir()
    (two_runs / "empty" / "metrics.csv").write_text("epoch\n")
    assert main(["runs", "curves", *arguments]) == 2
    assert said in capsys.readouterr().err

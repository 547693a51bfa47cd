import io
import re
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

import trainkit_progress
from trainkit import Metric, TrainkitError, evaluate, fit
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run, watch
from trainkit_progress import Progress

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@plugin
class Source:
    """Reports metrics, logs losses, prints, stops and fails."""

    names: tuple[str, ...] = ("loss",)
    shown: bool = True
    say: str = ""
    stop: int | None = None
    error: Any = None

    @hookimpl
    def metrics(self, run, split):
        return {name: Metric(torch.tensor(0.5 / (run.epoch + 1)), progress=self.shown) for name in self.names}

    @hookimpl
    def step_end(self, run):
        run.log({"loss": run.step / 4})
        if self.say and run.step == 2:
            print(self.say)
            run.console.print(self.say + " again")
        if run.step == self.stop:
            run.stop("enough")
        if run.step == 3 and self.error is not None:
            raise self.error


def show(tmp_path, terminal, *, source=None, width=100, resume=None, held_out=None, **recipe):
    """Train with the plugin and return what it wrote."""
    console = Console(
        file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=width, color_system=None
    )
    plugins = {"source": source or Source(), "progress": Progress(), "held_out": held_out or watch()}
    run = build_run(plugins, **{"epochs": 2, **recipe})
    run._console = console
    if resume is not None:
        run.load_state_dict(resume)
    try:
        fit(run, tmp_path / "run")
    finally:
        show.text, show.run = console.file.getvalue(), run
    return show.text


def plain(text):
    """Without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def pictures(text):
    """The bars as they were drawn, one after the other."""
    return re.findall(r"epoch .*\n\w+ .*", plain(text).replace("\r", "\n"))


@pytest.fixture
def every_step(monkeypatch):
    for interval in ("REFRESH", "LINE", "LOSS"):
        monkeypatch.setattr(trainkit_progress, interval, 0.0)


def test_lines_one_an_epoch(tmp_path):
    first, second = show(tmp_path, terminal=False).splitlines()
    pattern = r"  lr 0\.1  [\d,.]+ img/s  eta \d:\d\d:\d\d"
    assert re.fullmatch(r"epoch 1/2  train_loss 0\.5000  test_loss 0\.5000" + pattern, first)
    assert re.fullmatch(r"epoch 2/2  train_loss 0\.2500  test_loss 0\.2500" + pattern, second)
    assert second.endswith("eta 0:00:00")


def test_only_metrics_that_ask_for_it_are_shown(tmp_path):
    assert "loss" not in show(tmp_path, terminal=False, source=Source(shown=False))


def test_a_validation_split_is_shown_and_an_epoch_without_evaluation_has_its_training_alone(tmp_path, every_step):
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    lines = show(tmp_path, terminal=False, held_out=held_out, eval_every=2).splitlines()
    ends = [line for line in lines if " lr " in line]
    assert ["validation_loss" in line for line in ends] == [False, True]
    assert [line.split()[3] for line in lines if " validation " in line] == ["1/2", "2/2"]


def test_a_line_longer_than_the_console_stays_one_line(tmp_path):
    names = tuple(f"metric_{n}" for n in range(20))
    assert len(show(tmp_path, terminal=False, source=Source(names=names), width=40).splitlines()) == 2


def test_lines_within_long_epochs_show_life(tmp_path, every_step):
    lines = show(tmp_path, terminal=False, epochs=1).splitlines()
    assert [" ".join(line.split()[:4]) for line in lines[:-1]] == [
        *[f"epoch 1/1 train {n}/4" for n in (1, 2, 3, 4)],
        *[f"epoch 1/1 test {n}/2" for n in (1, 2)],
    ]
    assert "loss" not in lines[0]
    assert "  loss 0.2500  " in lines[1]  # of step 1, the last that was recorded then
    assert "loss" not in lines[4]
    assert all("img/s" in line and "eta" in line for line in lines)


def test_bars_count_both_passes_and_show_the_last_metrics(tmp_path, every_step):
    seen = pictures(show(tmp_path, terminal=True))
    rows = [re.sub(r"[━╸╺ ]+", " ", row) for row in seen]
    assert any(re.search(r"epoch 1/2 .*\ntrain 3/4 .* img/s loss 0\.5000", row) for row in rows)
    assert any(re.search(r"epoch 2/2 eta \d:\d\d:\d\d test_loss 0\.5000\s*\ntest 1/2 .* img/s", row) for row in rows)
    assert re.search(r"epoch 2/2 eta 0:00:00 test_loss 0\.2500\s*\ntest 2/2", rows[-1])


def test_the_line_of_each_epoch_stays_above_the_bars(tmp_path, every_step):
    lines = [line.strip() for line in plain(show(tmp_path, terminal=True)).replace("\r", "\n").splitlines()]
    first, second = (
        lines.index(f"epoch {n}/2  train loss {v}  test loss {v}") for n, v in ((1, "0.5000"), (2, "0.2500"))
    )
    bars = [n for n, line in enumerate(lines) if "━" in line]
    assert first < second < max(bars)


@pytest.mark.parametrize("width", [40, 80])
def test_bars_fit_the_width(tmp_path, every_step, width):
    source = Source(names=("loss", "accuracy", "a_metric_with_a_long_name"))
    lines = plain(show(tmp_path, terminal=True, source=source, width=width)).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_the_terminal_is_given_back_after_a_failure(tmp_path, error):
    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises((TrainkitError, KeyboardInterrupt)):
        show(tmp_path, terminal=True, source=Source(error=error))
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert show.text.count(HIDE_CURSOR) == show.text.count(SHOW_CURSOR) == 1
    assert re.search(r"train 3/4", pictures(show.text)[-1])
    show.run.console.print("later")
    assert show.run.console.file.getvalue().removeprefix(show.text) == "later\n"


def test_other_prints_appear_above_the_bars(tmp_path, every_step):
    text = plain(show(tmp_path, terminal=True, source=Source(say="[bold]hello")))
    lines = text.replace("\r", "\n").splitlines()
    assert "[bold]hello" in lines
    assert "hello again" in lines
    assert lines.index("hello again") < max(n for n, line in enumerate(lines) if line.startswith("epoch"))


@pytest.mark.parametrize("terminal", [False, True])
def test_names_cannot_reach_the_terminal_as_commands(tmp_path, every_step, terminal):
    text = show(
        tmp_path, terminal, source=Source(names=("[red]x[/]", ":smile:", "\x1b[2J\x07\n\x9b1m\u202e")), width=200
    )
    assert "test_[red]x[/] 0.5000  test_:smile: 0.5000  test_?[2J???1m? 0.5000" in text
    assert not {"\x1b[2J", "\x07", "\x9b", "\u202e"} & {text[i : i + n] for n in (1, 4) for i in range(len(text))}


def test_a_stop_within_an_epoch_shows_how_far_it_came(tmp_path):
    text = show(tmp_path, terminal=True, source=Source(stop=3))
    assert re.search(r"epoch 1/2 .*\ntrain 3/4", pictures(text)[-1])


def test_a_resumed_run_counts_from_where_it_was(tmp_path, every_step):
    show(tmp_path / "first", terminal=False, source=Source(stop=6), epochs=3)
    state = show.run.state_dict()
    lines = show(tmp_path / "second", terminal=False, epochs=3, resume=state).splitlines()
    assert [line[:22] for line in lines[:2]] == ["epoch 2/3  train 3/4  ", "epoch 2/3  train 4/4  "]
    assert "eta -:--:--" in lines[0]  # nothing is done yet
    assert re.search(r"eta \d:\d\d:\d\d", lines[1])


def test_max_steps_ends_the_bar_of_the_run(tmp_path, every_step):
    lines = show(tmp_path, terminal=False, epochs=1000, max_steps=6).splitlines()
    assert lines[-1].startswith("epoch 1.5/1000")
    assert lines[-1].endswith("eta 0:00:00")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(trainkit_progress, "perf_counter", lambda: Clock.now)
    return Clock


def a_second_a_batch(clock):
    def tick():
        clock.now += 1.0

    return watch(forward_end=tick)


def test_speed_and_time_left(tmp_path, clock):
    run = build_run({"tick": a_second_a_batch(clock), "source": Source(), "progress": Progress()}, epochs=4)
    run._console = Console(file=io.StringIO())
    fit(run, tmp_path)
    lines = run.console.file.getvalue().splitlines()
    # an epoch: four training batches of 8 images and two test batches
    assert [line.split("lr 0.1  ")[1] for line in lines] == [f"8.0 img/s  eta 0:00:{s:02}" for s in (18, 12, 6, 0)]


def test_a_last_batch_counts_the_images_it_has(tmp_path, clock):
    run = build_run({"tick": a_second_a_batch(clock), "source": Source(), "progress": Progress()}, batch_size=30)
    run._console = Console(file=io.StringIO())
    fit(run, tmp_path)
    assert "  16 img/s" in run.console.file.getvalue()  # 32 images in two seconds


def test_bars_are_drawn_by_the_clock_and_not_by_the_step(tmp_path, clock):
    text = show(tmp_path, terminal=True, epochs=5)
    assert text.count("img/s") <= 3 + 5  # at the start and at the end, and under the line of each epoch
    assert "  loss" not in text  # no record was asked for


def test_an_evaluation_alone_prints_nothing(tmp_path, every_step):
    run = build_run({"source": Source(), "progress": Progress()})
    run._console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    assert evaluate(run) == {"test_loss": 0.5}
    assert run.console.file.getvalue() == ""

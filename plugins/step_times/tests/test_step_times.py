import csv
import io
from contextlib import suppress
from time import perf_counter, sleep

import pytest
import torch
from rich.console import Console
from torch import nn

from trainkit import fit
from trainkit.errors import RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import RunDir
from trainkit.testing import build_run, fake_data, parameters_of
from trainkit.transforms import Map
from trainkit_accumulate import Accumulate
from trainkit_step_times import PARTS, StepTimes

WAIT = 0.004  # seconds an image
SLEEPS = {"transform": 0.02, "forward": 0.01, "term": 0.012, "backward": 0.03, "step": 0.015, "save": 0.007}


class SlowSplit:
    """Decodes slowly."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        sleep(WAIT)
        return self.split[index]


class SlowMap(Map):
    """Changes nothing, slowly."""

    def apply(self, images, params):
        sleep(SLEEPS["transform"])
        return images


class SlowForward(nn.Module):
    """Sleeps in both passes."""

    class _Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            sleep(SLEEPS["forward"])
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            sleep(SLEEPS["backward"])
            return gradient

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        return self._Backward.apply(self.fc(x.flatten(1)))


@plugin
class Slow:
    """Every part of a step takes a known time."""

    @hookimpl
    def data(self):
        data = fake_data()
        return data.replace(train=SlowSplit(data.train))

    @hookimpl
    def transforms(self, split):
        return SlowMap() if split == "train" else None

    @hookimpl
    def model(self):
        return SlowForward()

    @hookimpl
    def transform_loss(self, loss):
        sleep(SLEEPS["term"])
        return loss

    @hookimpl
    def optimizer_step(self, run):
        sleep(SLEEPS["step"])
        run.optimizer.step()

    @hookimpl
    def safe_point(self, run):
        if run.batch_index:
            sleep(SLEEPS["save"])


def trained(path, plugins, state=None, **recipe):
    """Train in a directory; return the run and what was printed."""
    console = Console(file=io.StringIO(), width=80)
    run = build_run(plugins, **recipe)
    if state is not None:
        run.load_state_dict(state)
        run.dir = RunDir(path)
    run._console = console
    with suppress(RunError):
        fit(run, None if state is not None else path)
    return run, console.file.getvalue()


def rows(path):
    with (path / "step_times.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def slept(batches=1):
    """Return at least how many milliseconds each part of a step takes, if it has so many batches of 8."""
    seconds = {
        "data_wait": 8 * WAIT * batches,
        "forward": (SLEEPS["transform"] + SLEEPS["forward"]) * batches,
        "backward": SLEEPS["backward"] * batches,
        "optimizer": SLEEPS["step"],
        "plugins": SLEEPS["term"] * batches + SLEEPS["save"],
    }
    return {part: 1000 * value for part, value in seconds.items()}


@pytest.mark.parametrize("batches", [1, 2])
def test_each_part_is_the_time_that_it_takes(batches, tmp_path):
    plugins = {"slow": Slow(), "accumulate": Accumulate(batches=batches), "step_times": StepTimes()}
    trained(tmp_path / "run", plugins, epochs=2)
    found = rows(tmp_path / "run")
    assert [row["epoch"] for row in found] == [1, 2]
    for row in found:
        assert row["steps"] == 4 / batches
        least = slept(batches)
        for part in PARTS:
            assert least[part] - 0.5 <= row[part], part
        # a busy machine adds some time to every part; as much as a part of another's would be a mistake
        assert sum(row[part] for part in PARTS) < 1.5 * sum(least.values()) + 20


def test_the_parts_add_up_to_the_time_of_the_steps(tmp_path):
    run, _ = trained(tmp_path / "run", {"slow": Slow(), "step_times": StepTimes()}, epochs=2)
    total = sum(row["steps"] * row[part] for row in rows(tmp_path / "run") for part in PARTS)
    assert total == pytest.approx(1000 * run.seconds["train"], rel=0.05)


def test_evaluation_is_not_measured(tmp_path):
    @plugin
    class SlowEvaluation:
        @hookimpl
        def forward_end(self, run):
            if run.split != "train":
                sleep(0.2)

    trained(tmp_path / "run", {"slow": SlowEvaluation(), "step_times": StepTimes()}, epochs=2)
    assert sum(row["steps"] * row[part] for row in rows(tmp_path / "run") for part in PARTS) < 400


def test_a_table_of_shares_is_printed_at_the_end(tmp_path):
    _, printed = trained(tmp_path / "run", {"slow": Slow(), "step_times": StepTimes()}, epochs=2)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Time of 8 training steps"
    for part, what in PARTS.items():  # in one line each
        (line,) = (line for line in lines if line.split()[:1] == [part])
        assert line.endswith(what)
    shares = [float(line.split()[2]) for line in lines if line.split()[:1] and line.split()[0] in PARTS]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[0] == pytest.approx(100 * slept()["data_wait"] / sum(slept().values()), abs=8)
    (total,) = (line for line in lines if line.split()[:1] == ["all"])
    found = rows(tmp_path / "run")
    mean = sum(row["steps"] * row[part] for row in found for part in PARTS) / 8
    assert float(total.split()[1]) == pytest.approx(mean, abs=0.02)


def test_it_says_that_the_host_is_measured(tmp_path):
    times = StepTimes()
    run, _ = trained(tmp_path / "run", {"step_times": times}, max_steps=2)
    run.device = torch.device("cuda")
    console = Console(file=io.StringIO(), width=80)
    console.print(times._table(run))
    assert "Time of 2 training steps of the host, which does not wait for the GPU" in console.file.getvalue()
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


@plugin
class Until:
    """Stops or fails after a step."""

    step: int
    fails: bool = False

    @hookimpl
    def step_end(self, run):
        if run.step == self.step:
            if self.fails:
                raise ValueError("made")
            run.stop("made", exit_code=143)


def test_a_resumed_run_keeps_the_rows_of_its_completed_epochs(tmp_path):
    run, printed = trained(tmp_path / "run", {"until": Until(step=6), "step_times": StepTimes()}, epochs=3)
    assert printed.partition("\n")[0].rstrip() == "Time of 6 training steps"
    (first,) = rows(tmp_path / "run")
    state = run.state_dict()
    _, printed = trained(tmp_path / "run", {"until": Until(step=99), "step_times": StepTimes()}, state, epochs=3)
    assert printed.partition("\n")[0].rstrip() == "Time of 6 training steps"
    found = rows(tmp_path / "run")
    assert found[0] == first
    assert [(row["epoch"], row["steps"]) for row in found] == [(1, 4), (2, 2), (3, 4)]
    # from an earlier checkpoint: what was measured after it is measured again
    early, _ = trained(tmp_path / "early", {"until": Until(step=5), "step_times": StepTimes()}, epochs=3)
    trained(tmp_path / "run", {"until": Until(step=99), "step_times": StepTimes()}, early.state_dict(), epochs=3)
    assert [(row["epoch"], row["steps"]) for row in rows(tmp_path / "run")][1:] == [(2, 3), (3, 4)]


def test_the_table_is_printed_after_a_failure_too(tmp_path):
    _, printed = trained(tmp_path / "run", {"until": Until(step=3, fails=True), "step_times": StepTimes()})
    assert printed.partition("\n")[0].rstrip() == "Time of 2 training steps"
    _, printed = trained(tmp_path / "none", {"until": Until(step=1, fails=True), "step_times": StepTimes()})
    assert printed == ""


def test_a_run_is_the_same_without_it(tmp_path):
    with_times, _ = trained(tmp_path / "with", {"step_times": StepTimes()}, epochs=2)
    without, _ = trained(tmp_path / "without", {}, epochs=2)
    assert all(map(torch.equal, parameters_of(with_times), parameters_of(without)))
    assert with_times.history == without.history
    assert StepTimes.observer


def test_it_costs_a_few_looks_at_the_clock(tmp_path):
    times, loss = StepTimes(), torch.zeros(())
    run, _ = trained(tmp_path / "run", {"step_times": times}, max_steps=1)
    times.train_start()
    start = perf_counter()
    for _ in range(1000):
        times.forward_end(run)
        times.transform_loss(loss)
        times.gradients_ready()
        times.step_end()
        times.safe_point()
    assert (perf_counter() - start) / 1000 < 1e-4

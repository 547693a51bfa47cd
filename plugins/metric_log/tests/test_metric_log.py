import csv
import json
import math
import os

import pytest
import torch
from attrs import field
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import TrainkitError, fit
from trainkit.plugin import hookimpl, plugin
from trainkit.rundir import RunDir
from trainkit.testing import build_run
from trainkit_metric_log import MAX_WAITING, MetricLog


@plugin
class Source:
    """Logs each step and reports a metric; keeps the state of one step and stops or fails at another."""

    keep: int | None = None
    stop: int | None = None
    fail: int | None = None
    value: float = 0.1
    state: dict = field(init=False, default=None)

    @hookimpl
    def step_end(self, run):
        run.log({"loss": torch.tensor(run.step / 3)})

    @hookimpl
    def safe_point(self, run):
        if run.step == self.keep and self.state is None:
            self.state = run.state_dict()
            torch.save(self.state, run.dir.path / "state.pt")
        if run.step == self.stop:
            run.stop("enough")
        if run.step == self.fail:
            raise RuntimeError("broken")

    @hookimpl
    def metrics(self, run):
        return {"loss": self.value * (run.epoch + 1)}


def train(folder, epochs=3, **source):
    run = build_run({"source": Source(**source), "metric_log": MetricLog()}, epochs=epochs)
    fit(run, folder)
    return run


def resume(folder, epochs=3, state=None):
    run = build_run({"source": Source(), "metric_log": MetricLog()}, epochs=epochs)
    run.load_state_dict(state or torch.load(folder / "state.pt", weights_only=True))
    run.dir = RunDir(folder)
    fit(run)
    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_rows_come_in_order_and_the_table_has_whole_epochs_only(tmp_path):
    run = train(tmp_path, epochs=2)
    found = rows(tmp_path)
    assert [(r["epoch"], r["step"], "train_loss" in r) for r in found] == [
        *[(1, s, False) for s in (1, 2, 3, 4)],
        (1, 4, True),
        *[(2, s, False) for s in (5, 6, 7, 8)],
        (2, 8, True),
    ]
    assert [found[4], found[9]] == run.history
    assert (tmp_path / "metrics.csv").read_text() == (
        "epoch,step,lr,train_loss,test_loss\n1,4,0.1,0.1,0.1\n2,8,0.1,0.2,0.2\n"
    )


def test_the_same_run_writes_the_same_bytes(tmp_path, whole):
    train(tmp_path)
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@settings(max_examples=15)  # each writes files
@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_numbers_read_back_exactly_and_what_is_not_finite_is_null(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("run")
    log = MetricLog()
    run = build_run({"metric_log": log})
    run.dir = RunDir(folder)
    log.fit_start(run)
    record = {f"value {n}": value for n, value in enumerate(values)}
    log.log(run, record)
    run.history.append(record)
    log.epoch_end(run)
    log.fit_end(run)
    strict = json.loads((folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert list(strict.values()) == [v if math.isfinite(v) else None for v in values]
    with (folder / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [float(v).hex() for v in row.values()] == [v.hex() for v in values]


def test_metrics_of_some_epochs_only_leave_cells_empty(tmp_path):
    run = build_run({"metric_log": MetricLog()})
    run.dir = RunDir(tmp_path)
    run.history = [{"epoch": 1}, {"epoch": 2, "test_loss": 0.5}]
    MetricLog().epoch_end(run)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,test_loss\n1,\n2,0.5\n"


@pytest.mark.parametrize(("keep", "end"), [(1, {"stop": 10}), (6, {"fail": 10}), (6, {}), (8, {"stop": 8})])
def test_a_resumed_run_has_no_row_twice_and_none_missing(tmp_path, whole, keep, end):
    broken = tmp_path
    try:
        train(broken, keep=keep, **end)
    except TrainkitError:
        assert end == {"fail": 10}
    resume(broken)
    assert rows(broken) == rows(whole)
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_what_was_recorded_before_a_stop_or_a_failure_is_on_the_disk(tmp_path):
    train(tmp_path / "stopped", stop=6)
    with pytest.raises(TrainkitError, match="broken"):
        train(tmp_path / "failed", fail=6)
    for name in ("stopped", "failed"):
        assert [r["step"] for r in rows(tmp_path / name)] == [1, 2, 3, 4, 4, 5, 6]


def test_a_state_counts_only_rows_that_are_on_the_disk(tmp_path):
    source = Source(keep=2, fail=2)
    run = build_run({"source": source, "metric_log": MetricLog()})
    with pytest.raises(TrainkitError):
        fit(run, tmp_path)
    assert source.state["plugins"]["metric_log"]["state"] == {"rows": 2}
    assert len(rows(tmp_path)) == 2


def test_a_torn_last_line_is_dropped(tmp_path):
    train(tmp_path, keep=4, stop=6)
    whole = tmp_path / "metrics.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    resume(tmp_path)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]


@pytest.mark.parametrize("damage", ["torn", "short", "absent"])
def test_missing_rows_stop_the_run_and_the_file_stays_as_it_is(tmp_path, damage):
    train(tmp_path, keep=6, stop=6)
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    left = {"torn": data[:-1], "short": data.splitlines(keepends=True)[0], "absent": None}[damage]
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(TrainkitError, match=r"metrics\.jsonl has \d rows and the checkpoint counted 7"):
        resume(tmp_path)
    assert (path.read_bytes() if path.exists() else None) == left


def test_records_are_written_before_the_epoch_ends_when_many_wait(tmp_path):
    log = MetricLog()
    run = build_run({"metric_log": log})
    run.dir = RunDir(tmp_path)
    log.fit_start(run)
    for step in range(MAX_WAITING + 1):
        log.log(run, {"step": step})
    assert len(rows(tmp_path)) == MAX_WAITING
    log.fit_end(run)
    assert [r["step"] for r in rows(tmp_path)] == list(range(MAX_WAITING + 1))


def test_a_full_disk_is_an_error_and_leaves_whole_rows(tmp_path, monkeypatch):
    log = MetricLog()
    run = build_run({"metric_log": log})
    run.dir = RunDir(tmp_path)
    log.fit_start(run)
    log.log(run, {"step": 1})
    log.state_dict()

    def full(number):  # what was written is there in part, as on a disk that filled up
        os.truncate(number, os.fstat(number).st_size - 3)
        raise OSError(28, "No space left on device")

    log.log(run, {"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainkitError, match=r"metrics\.jsonl: cannot be written: No space left"):
            log.state_dict()
    assert log.state_dict() == {"rows": 2}
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}]

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainkit_time_limit
from trainkit import fit
from trainkit.testing import assert_refuses, build_run, parameters_of, watch
from trainkit_time_limit import TimeLimit, seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock on which each batch, in training and testing, takes a minute; notes who saves what."""
    clock = SimpleNamespace(minutes=0, saved=[])

    def tick(batch):
        clock.minutes += 1
        return batch

    def note(run):
        if run.stop_reason:
            clock.saved.append((run.epoch, run.step, run.batch_index))

    clock.plugin = watch(transform_batch=tick, safe_point=note)
    monkeypatch.setattr(trainkit_time_limit, "monotonic", lambda: 1000.0 + 60 * clock.minutes)
    return clock


# made data: 4 training batches, then 2 test batches an epoch
@pytest.mark.parametrize(
    ("limit", "position"),
    [
        ("1s", (0, 1, 1)),
        ("3m", (0, 3, 3)),
        ("5m", (0, 4, 4)),  # within the test
        ("6m", (0, 4, 4)),
        ("6.5m", (1, 5, 1)),
        ("0.15h", (1, 7, 3)),
    ],
)
@pytest.mark.parametrize("first", ["clock", "time_limit"])
def test_stops_and_is_saved_at_the_safe_point_after_the_limit(tmp_path, clock, limit, position, first):
    plugins = {"clock": clock.plugin, "time_limit": TimeLimit(limit=limit)}
    order = sorted(plugins, key=lambda name: name != first)
    result = fit(build_run({name: plugins[name] for name in order}, epochs=5), tmp_path)
    assert clock.saved == [position]
    assert (result.status, result.reason) == ("stopped", f"time_limit {limit}")


def test_the_evaluation_of_a_validation_split_is_cut_short_too(tmp_path, clock):
    held_out = watch(transform_data=lambda data: data.replace(validation=data.test))
    plugins = {"held_out": held_out, "clock": clock.plugin, "time_limit": TimeLimit(limit="5m")}
    fit(build_run(plugins, epochs=5), tmp_path)
    assert (clock.saved, clock.minutes) == ([(0, 4, 4)], 5)


def test_a_run_within_its_time_completes(tmp_path, clock):
    run = build_run({"clock": clock.plugin, "time_limit": TimeLimit(limit="12m1s")}, epochs=2)
    assert fit(run, tmp_path).status == "completed"


def test_a_stopped_run_continues_exactly_and_has_its_time_again(tmp_path, clock):
    whole = build_run({}, epochs=2)
    fit(whole, tmp_path / "whole")
    state, statuses = None, []
    while "completed" not in statuses:
        run = build_run({"clock": clock.plugin, "time_limit": TimeLimit(limit="3m")}, epochs=2)
        if state is not None:
            run.load_state_dict(state)
        statuses.append(fit(run, tmp_path / str(len(statuses))).status)
        state = run.state_dict()
    assert (run.epoch, run.step) == (2, 8)
    assert statuses == [*["stopped"] * 4, "completed"]  # at steps 3, 4 (while testing), 5, 8, and the last test
    assert all(map(torch.equal, parameters_of(whole), parameters_of(run)))


units = st.fixed_dictionaries({}, optional={u: st.integers(1, 99) for u in "dhms"}).filter(bool)


@given(units)
@settings(max_examples=30)
def test_units_add_up(parts):
    text = "".join(f"{number}{unit}" for unit, number in parts.items())
    assert seconds(text) == sum(n * {"d": 86400, "h": 3600, "m": 60, "s": 1}[u] for u, n in parts.items())


def test_examples():
    assert [seconds(text) for text in ("90s", "1h30m", "1.5h", "2d")] == [90, 5400, 5400, 172800]


def test_wrong_limits_are_one_clear_error():
    assert_refuses(TimeLimit, "limit")
    wrong = ["", "90", 90, "0s", "0h0m", "-5m", "5 m", "m", "1.h", "1.2.3h", "5min", "1e3s", "٣m"]
    assert_refuses(TimeLimit, "limit", *wrong)
    with pytest.raises(ValueError, match="such as 90s, 55m, 1h30m or 2d, not"):
        TimeLimit(limit="90")

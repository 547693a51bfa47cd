import json
from types import SimpleNamespace

import pytest

from trainkit import Run, build, fit, load_recipe
from trainkit.cli import main
from trainkit.errors import RunError
from trainkit.rundir import RunDir
from trainkit.session import reopen
from trainkit.testing import assert_refuses, run_steps
from trainkit_ledger import FILE, START, Ledger, chain_of

RECIPE = """\
name: small
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  random_crop: {size: 8, padding: 1}
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4], dropout: 0.1}
  cross_entropy:
  sgd: {lr: 0.1, momentum: 0.9}
  multi_step_lr: {milestones: [5]}
  metrics: {every: 1}
  metric_log:
  ledger:
  checkpoint: {every_steps: 1}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def train(out, *overrides):
    return fit(build(load_recipe("small.yaml", overrides)), out)


def entries(out):
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


def test_steps_are_not_negative():
    assert_refuses(Ledger, "every_steps", -1, "a")


def test_each_entry_is_chained_to_the_one_before_and_the_last_stands_in_the_result(small):
    result = train("out")
    chain = START
    found = entries(small / "out")
    for number, entry in enumerate(found):
        chain = chain_of(chain, entry)
        assert (entry["chain"], entry["entry"]) == (chain, number)
    assert result.evidence["ledger"]["chain"] == chain
    assert result.evidence["ledger"]["entries"] == len(found)
    assert [(e["epoch"], e["step"]) for e in found] == [
        (0, 0),
        *((0, step) for step in range(1, 7)),
        (1, 6),
        *((1, step) for step in range(7, 13)),
        (2, 12),
    ]
    assert found[-1]["rows"] == 14
    assert [n for n, e in enumerate(found) if "record" in e] == [0]


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 4, 6, 8, 12, 12]), (100, [0, 6, 12])])
def test_entries_come_every_so_many_steps_and_after_every_epoch(small, every, steps):
    train("out", f"plugins.ledger.every_steps={every}")
    assert [e["step"] for e in entries(small / "out")] == steps


def test_what_only_watches_and_what_has_no_effect_change_no_hash(small):
    chain = train("a").evidence["ledger"]["chain"]
    others = ["plugins.progress={}", "plugins.checkpoint.every_steps=0", "name=other", "expect.test_accuracy=50"]
    assert train("b", *others).evidence["ledger"]["chain"] == chain
    assert train("c", "seed=1").evidence["ledger"]["chain"] != chain


class KilledError(BaseException):
    """Stands for a process that ends at once."""


def at_step(monkeypatch, step, act):
    """Act once in the next run, when a step was taken and before its safe point."""
    advance = Run.advance_step

    def advance_and_act(run):
        advance(run)
        if run.step == step:
            monkeypatch.setattr(Run, "advance_step", advance)
            act(run)

    monkeypatch.setattr(Run, "advance_step", advance_and_act)


def kill(run):
    raise KilledError


@pytest.mark.parametrize(("every", "step"), [(4, 2), (0, 6), (4, 7), (0, 12)])
def test_a_run_that_was_killed_and_resumed_has_the_identical_ledger(small, monkeypatch, step, every):
    every = f"plugins.ledger.every_steps={every}"
    train("whole", every)
    at_step(monkeypatch, step, kill)
    with pytest.raises(KilledError):
        train("out", every)
    fit(reopen("out"))
    assert (small / "out" / FILE).read_bytes() == (small / "whole" / FILE).read_bytes()


@pytest.mark.parametrize("step", [3, 6, 10])
def test_a_run_that_was_asked_to_stop_has_an_entry_there_which_resuming_takes_back(small, monkeypatch, step):
    every = "plugins.ledger.every_steps=4"
    train("whole", every)
    at_step(monkeypatch, step, lambda run: run.stop("SIGTERM", exit_code=143))
    result = train("out", every)
    last = entries(small / "out")[-1]
    assert (result.steps, result.evidence["ledger"]["chain"]) == (step, last["chain"])
    assert last["step"] == step
    fit(reopen("out"))
    assert (small / "out" / FILE).read_bytes() == (small / "whole" / FILE).read_bytes()


def test_a_run_that_is_fitted_again_after_a_stop_has_the_identical_ledger(small, monkeypatch):
    every = "plugins.ledger.every_steps=4"
    train("whole", every)
    at_step(monkeypatch, 3, lambda run: run.stop("Ctrl-C", exit_code=130))
    run = build(load_recipe("small.yaml", [every]))
    fit(run, "out")
    fit(run)
    assert (small / "out" / FILE).read_bytes() == (small / "whole" / FILE).read_bytes()


def test_the_test_split_of_a_run_with_a_validation_split_is_in_the_ledger(small):
    result = train("out", "plugins.hold_out.fraction=0.2")
    assert "test_accuracy" in result.final
    rows = (small / "out" / "metrics.jsonl").read_text().splitlines()
    assert entries(small / "out")[-1]["rows"] == len(rows)
    assert "test_accuracy" in rows[-1]


def test_a_session_with_changes_begins_with_a_record_of_its_own(small):
    train("out")
    assert main(["resume", "out", "epochs=3"]) == 0
    found = entries(small / "out")
    marked = [entry for entry in found if "record" in entry]
    assert [entry["step"] for entry in marked] == [0, 13]
    assert marked[0]["record"] != marked[1]["record"]


def test_a_ledger_that_is_shorter_than_the_checkpoint_counted_is_refused(small, capsys):
    train("out", "max_steps=7")
    (small / "out" / FILE).write_text("")
    assert main(["resume", "out", "max_steps=null"]) == 1
    assert "has 0 entries and the checkpoint counted" in capsys.readouterr().err


def test_what_the_sessions_recorded_is_noted_by_its_content(small):
    files = train("out", "max_steps=7").evidence["ledger"]["files"]
    assert set(files) == {"recipe.yaml", "plugins.lock.json", "environment.json", "data.json"}
    assert main(["resume", "out", "max_steps=null"]) == 0
    again = RunDir(small / "out").read_json("result.json")["evidence"]["ledger"]["files"]
    assert again == {**files, **{n: again[n] for n in ("recipe.2.yaml", "result.session-1.json")}}


def test_a_full_disk_is_one_clear_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainkit_ledger.os", SimpleNamespace(fsync=full))
    with pytest.raises(RunError, match=r"plugin 'ledger'.*ledger.jsonl: cannot be written: No space left on device"):
        run_steps({"ledger": Ledger()})

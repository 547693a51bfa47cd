import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainkit import Run, build, fit, load_recipe
from trainkit.cli import main
from trainkit.errors import TrainkitError, UsageError
from trainkit.provenance import state_digest
from trainkit.rundir import RunDir, pack_state
from trainkit.session import reopen
from trainkit_ledger import START, chain_of, link, record_line, recorded_files
from trainkit_verify import Verification, seal, verify

RECIPE = """\
name: small
epochs: 3
batch_size: 256
device: cpu
expect: {test_accuracy: 20}
plugins:
  digits:
  random_crop: {size: 8, padding: 1}
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [1], channels: [4], dropout: 0.1}
  cross_entropy:
  sgd: {lr: 0.1, momentum: 0.9}
  multi_step_lr: {milestones: [2]}
  metrics: {every: 1}
  metric_log:
  ledger:
  checkpoint: {keep_every: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs of one recipe: seeds 0 and 1, and one that was stopped and resumed with another batch of records."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(RECIPE)
    fit(build(load_recipe(folder / "small.yaml")), folder / "run")
    fit(build(load_recipe(folder / "small.yaml", ["seed=1"])), folder / "other")
    fit(build(load_recipe(folder / "small.yaml", ["epochs=2"])), folder / "longer")
    fit(reopen(folder / "longer", ["epochs=3"]))
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of an honest run, to be tampered with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "small.yaml", tmp_path / "small.yaml")
    return tmp_path / "run"


def train(out, *overrides):
    return fit(build(load_recipe("small.yaml", overrides)), out)


def stop_at(monkeypatch, step, act):
    """Act once in the next run, when a step was taken and before its safe point."""
    advance = Run.advance_step

    def advance_and_act(run):
        advance(run)
        if run.step == step:
            monkeypatch.setattr(Run, "advance_step", advance)
            act(run)

    monkeypatch.setattr(Run, "advance_step", advance_and_act)


def found(out, **options):
    return verify(RunDir(Path(out)), seconds=100, **options)


def wrong(verification):
    return [f"{check.what}: {check.detail}" for check in verification.checks if check.verdict == "differs"]


def assert_verified(out, steps):
    verification = found(out)
    assert wrong(verification) == []
    assert verification.proved, verification.checks
    assert (verification.steps, verification.replayed) == (steps, steps)
    assert f"verified. {steps} of {steps} steps (100.0 %)" in verification.sentence()


# ---- honest runs


def test_the_files_alone_are_checked_without_training(run, monkeypatch, capsys):
    monkeypatch.setattr("trainkit.trainer.Trainer.train", None)
    assert main(["verify", "run", "--files"]) == 0
    assert "Nothing was replayed: all 18 steps are on trust" in " ".join(capsys.readouterr().out.split())


def test_an_honest_run_is_verified(run, capsys):
    assert main(["verify", "run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # a table's cells break lines
    assert "came out identical" in printed
    assert "No step is taken on trust" in printed
    assert_verified(run, 18)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["max_steps=8", "plugins.checkpoint.every_steps=1"], 8),
        (["max_steps=6"], 6),
        (["eval_every=2", "plugins.mixup={}"], 18),
        (["plugins.hold_out.fraction=0.2", "max_steps=7"], 7),
        (["plugins.accumulate.batches=4", "plugins.ema.decay=0.9"], 6),
        (["plugins.adamw={}", "plugins.sgd=false", "plugins.lookahead={}"], 18),
        (["plugins.early_stopping={metric: loss, patience: 1, min_delta: 10}", "epochs=9"], 12),
        (["plugins.checkpoint.keep_every=0", "plugins.ledger.every_steps=4"], 18),
        (["plugins.checkpoint=false", "plugins.metric_log=false", "plugins.progress={}", "epochs=2"], 12),
        (["plugins.metric_log=false", "plugins.hold_out.fraction=0.2", "epochs=1"], 5),
        (["drop_last=true", "plugins.checkpoint.best=train_loss"], 15),
    ],
)
def test_honest_runs_of_every_kind_are_verified(run, overrides, steps):
    train("out", *overrides)
    if "plugins.checkpoint=false" in overrides:
        verification = found("out")
        assert wrong(verification) == []
        assert (verification.passed, verification.replayed) == (True, steps)
        assert "Not checked: checkpoints, evaluation" in verification.sentence()
    else:
        assert_verified("out", steps)


class KilledError(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("step", [8, 12])
def test_a_run_that_was_killed_and_resumed_is_verified(run, monkeypatch, step):
    def kill(_):
        raise KilledError

    stop_at(monkeypatch, step, kill)
    with pytest.raises(KilledError):
        train("out")
    fit(reopen("out"))
    assert_verified("out", 18)


def test_a_run_that_was_stopped_is_verified_as_far_as_it_came_and_after_it_was_resumed(run, monkeypatch):
    stop_at(monkeypatch, 8, lambda run: run.stop("SIGTERM", exit_code=143))
    train("out", "plugins.ledger.every_steps=5")
    assert_verified("out", 8)
    fit(reopen("out"))
    assert_verified("out", 18)


def test_a_run_that_has_not_ended_is_not_verified_and_not_accused(run):
    (run / "result.json").unlink()
    verification = found(run)
    assert (verification.passed, wrong(verification)) == (False, [])
    assert "there is no result to verify" in verification.sentence()


def test_a_run_that_was_extended_is_verified_session_by_session(made):
    assert_verified(made / "longer", 18)
    (record,) = [check for check in found(made / "longer").checks if check.what == "record"]
    assert "continued with changes 1 time" in record.detail


def test_a_run_with_allowed_changes_is_verified_session_by_session(run):
    train("out", "epochs=2")
    fit(reopen("out", ["plugins.grad_clip={}", "epochs=3", "plugins.metrics.every=2"], allow_changes=True))
    assert_verified("out", 18)


def test_a_run_without_a_ledger_cannot_be_verified(run, capsys):
    train("out", "plugins.ledger=false")
    assert main(["verify", "out"]) == 1
    assert "a run has one if its recipe lists `ledger`" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", "."]) == 2


def test_json_says_the_same(run, capsys):
    assert main(["verify", "run", "--json", "-o", "verified.json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert json.loads(Path("verified.json").read_text()) == said
    assert said["ledger"] == json.loads(Path("run/result.json").read_text())["evidence"]["ledger"]["chain"]
    assert (said["passed"], said["proved"], said["steps"], said["replayed"]) == (True, True, 18, 18)
    assert {check["verdict"] for check in said["checks"]} == {"proved"}
    assert said["sentence"] == found("run").sentence()


def test_with_little_time_a_part_is_replayed_and_the_rest_is_called_trust(run):
    verification = verify(RunDir(run), seconds=0)
    assert verification.passed
    assert verification.replayed == 2  # an entry from the seed, one from the checkpoint that the chain draws
    assert "The other 16 steps are taken on trust" in verification.sentence()


# ---- tampered runs


def edit_json(path, act):
    value = json.loads(path.read_text())
    act(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def edit_lines(path, act):
    lines = path.read_text().splitlines()
    act(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


def edit_state(run, name, act):
    state = RunDir(run).load_state(name)
    act(state)
    RunDir(run).write(f"checkpoints/{name}.pt", pack_state(state))


def note_files(run):
    """Do what a forger would: let result.json note the files as they are now."""
    edit_json(run / "result.json", lambda r: r["evidence"]["ledger"].update(files=recorded_files(run)))


def forge(run, **states):
    """Recompute the whole chain over the files as they are now, and over given states by the ledger's line."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [START]
    for row in rows:
        records.append(link(records[-1], record_line(row)))
    chain, lines = START, []
    for line in (run / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry["state"] = states.get(f"line_{len(lines) + 1}", entry["state"])
        entry["records"] = records[entry["rows"]]
        chain = entry["chain"] = chain_of(chain, entry)
        lines.append(json.dumps(entry))
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    evidence = {"entries": len(lines), "chain": chain, "files": recorded_files(run)}
    edit_json(run / "result.json", lambda r: r["evidence"].update(ledger=evidence))


def add(key, value):
    def act(tree):
        *parents, last = key.split(".")
        for parent in parents:
            tree = tree[int(parent) if parent.isdigit() else parent]
        tree[last] = value

    return act


def result(key, value):
    return lambda run, made: edit_json(run / "result.json", add(key, value))


def lock(key, value):
    return lambda run, made: edit_json(run / "plugins.lock.json", add(key, value))


def environment(key, value):
    return lambda run, made: edit_json(run / "environment.json", add(key, value))


def data(key, value):
    return lambda run, made: edit_json(run / "data.json", add(key, value))


def lines(name, act):
    return lambda run, made: edit_lines(run / name, act)


def text(name, old, new):
    def act(run, made):
        before = (run / name).read_text()
        assert old in before
        (run / name).write_text(before.replace(old, new, 1))

    return act


def state(name, act):
    return lambda run, made: edit_state(run, name, act)


def weights(state):
    next(iter(state["model"].values())).view(-1)[0] += 1e-6


def momentum(state):
    next(iter(state["optimizer"]["state"].values()))["momentum_buffer"].view(-1)[0] += 1e-6


def better_row(lines):
    row = json.loads(lines[-1])
    lines[-1] = json.dumps({**row, "test_accuracy": row["test_accuracy"] + 10})


def copied(source, target):
    return lambda run, made: shutil.copy(made / source, run / target)


def removed(name):
    return lambda run, made: (run / name).unlink()


SIMPLE = {
    # records
    "a value in metrics.jsonl": (lines("metrics.jsonl", better_row), "results: metrics.jsonl, line 21"),
    "a step's loss": (text("metrics.jsonl", '"loss": 2.', '"loss": 1.'), "results: metrics.jsonl, line 1"),
    "a removed row": (lines("metrics.jsonl", lambda x: x.pop(3)), "results: metrics.jsonl, line 4"),
    "the last row removed": (lines("metrics.jsonl", lambda x: x.pop()), "metrics.jsonl has 20 lines"),
    "an added row": (lines("metrics.jsonl", lambda x: x.insert(2, x[2])), "metrics.jsonl, line 4"),
    "a row at the end": (lines("metrics.jsonl", lambda x: x.append(x[-1])), "metrics.jsonl, line 22: was added"),
    "swapped rows": (lines("metrics.jsonl", lambda x: x.insert(0, x.pop(1))), "metrics.jsonl, line 1"),
    "a name twice": (text("metrics.jsonl", '{"epoch": 1', '{"loss": 0.1, "epoch": 1'), "metrics.jsonl, line 1: a name"),
    "no metrics.jsonl": (removed("metrics.jsonl"), "metrics.jsonl is missing"),
    "NaN in metrics.jsonl": (lines("metrics.jsonl", lambda x: x.append('{"a": NaN}')), "metrics.jsonl, line 22: NaN"),
    # table
    "a value in metrics.csv": (text("metrics.csv", "\n1,6,", "\n1,5,"), "metrics.csv, line 2: step is 5"),
    "a removed epoch": (lines("metrics.csv", lambda x: x.pop(2)), "metrics.csv, line 3: epoch is 3"),
    "the last epoch removed": (lines("metrics.csv", lambda x: x.pop()), "metrics.csv has 2 epochs"),
    "an epoch twice": (lines("metrics.csv", lambda x: x.append(x[-1])), "metrics.csv, line 5"),
    "an empty cell": (lines("metrics.csv", lambda x: x.append(x.pop().rpartition(",")[0] + ",")), "is absent"),
    "a column more": (lines("metrics.csv", lambda x: x.append("")), "results"),
    "no metrics.csv": (removed("metrics.csv"), "metrics.csv is missing"),
    # result
    "the final accuracy": (result("final.test_accuracy", 99.0), "final.test_accuracy is 99.0"),
    "a final metric more": (result("final.top5", 99.0), "final.top5 is 99.0"),
    "no final metrics": (result("final", {}), "final.lr is absent"),
    "the best accuracy": (result("best.test_accuracy.value", 99.0), "best.test_accuracy.value is 99.0"),
    "the best epoch": (result("best.test_accuracy.epoch", 17), "best.test_accuracy.epoch is 17"),
    "no best": (result("best", {}), "result.json: best.train_loss is absent"),
    "the chain's end": (result("evidence.ledger.chain", "0" * 32), "evidence.ledger is"),
    "no evidence": (result("evidence", {}), "results: cannot be understood: KeyError"),
    "steps": (result("steps", 180), "steps is 180"),
    "epochs": (result("epochs", 30), "epochs is 30"),
    "expected": (result("expected.test_accuracy", 1), "expected.test_accuracy is 1"),
    "status": (result("status", "stopped"), "status is stopped"),
    "an unknown status": (result("status", "verified"), "status is verified"),
    "a reason": (result("reason", "converged"), "reason is converged"),
    "not finite": (result("non_finite", [1]), "non_finite is [1]"),
    "resumed": (result("resumed", [{"epoch": 1, "step": 1, "changes": []}]), "resumed is"),
    "time": (result("seconds.train", 0.001), "seconds.train is 0.001"),
    "speed": (result("images_per_second", 1e9), "images_per_second is 1000000000.0"),
    "a list": (lambda run, made: (run / "result.json").write_text("[]"), "not a JSON object"),
    "another run's result": (copied("other/result.json", "result.json"), "evidence.ledger is"),
    # checkpoints
    "weights of last.pt": (state("last", weights), "checkpoints: last.pt: its state is not the one"),
    "weights of best.pt": (state("best", weights), "checkpoints: best.pt: its state is not the one"),
    "weights of epoch-2.pt": (
        state("epoch-2", weights),
        "epoch-2.pt: its state is not the one that ledger.jsonl, line 15",
    ),
    "optimizer of last.pt": (state("last", momentum), "last.pt: its state"),
    "history": (state("last", lambda s: s["history"][0].update(test_accuracy=99.0)), "last.pt: its state"),
    "direction of a metric": (state("last", lambda s: s["metric_info"].update(test_loss=("more", True))), "last.pt"),
    "position": (state("last", lambda s: s["position"].update(step=17)), "last.pt: lies at step 17"),
    "schedule": (state("epoch-1", lambda s: s["schedules"][0].update(last_epoch=0)), "epoch-1.pt: its state"),
    "plugin's state": (state("epoch-1", lambda s: s["plugins"]["metrics"]["state"].clear()), "epoch-1.pt: its state"),
    "record in last.pt": (
        state("last", lambda s: s["provenance"]["plugins"][5]["options"].update(lr=0.2)),
        "record: a checkpoint of step 18: plugins.sgd.lr was 0.1 and is 0.2",
    ),
    "environment in epoch-1.pt": (
        state("epoch-1", lambda s: s["provenance"]["environment"].update(processor="Abacus")),
        "record: a checkpoint of step 6: environment.processor was",
    ),
    "resumed in last.pt": (state("last", lambda s: s["resumed"].append({"epoch": 1})), "resumed"),
    "ended in last.pt": (state("last", lambda s: s.update(ended="early")), "status is completed"),
    "no history in best.pt": (state("best", lambda s: s["history"].clear()), "best.pt"),
    "a list as a state": (lambda run, made: RunDir(run).write("checkpoints/last.pt", pack_state({"a": 1})), "last.pt"),
    "another run's last.pt": (copied("other/checkpoints/last.pt", "checkpoints/last.pt"), "last.pt: its state"),
    "another run's epoch-1.pt": (copied("other/checkpoints/epoch-1.pt", "checkpoints/epoch-1.pt"), "epoch-1.pt: its"),
    "an earlier last.pt": (copied("run/checkpoints/epoch-2.pt", "checkpoints/last.pt"), "last.pt: lies at step 12"),
    "another epoch as best": (copied("run/checkpoints/epoch-1.pt", "checkpoints/best.pt"), "best.pt: is of epoch 1"),
    "a renamed checkpoint": (copied("run/checkpoints/epoch-1.pt", "checkpoints/epoch-2.pt"), "epoch-2.pt: lies at"),
    "a damaged checkpoint": (
        lambda run, made: (run / "checkpoints" / "last.pt").write_bytes(b"x" * 99),
        "checkpoints: last.pt: damaged",
    ),
    # record
    "seed": (text("recipe.yaml", "seed: 0", "seed: 1"), "record: recipe.yaml"),
    "lr": (text("recipe.yaml", "lr: 0.1", "lr: 0.05"), "recipe.yaml was edited"),
    "name": (text("recipe.yaml", "name: small", "name: large"), "recipe.yaml was edited"),
    "expectation": (text("recipe.yaml", "test_accuracy: 20", "test_accuracy: 2"), "expected"),
    "a plugin dropped": (text("recipe.yaml", "  random_crop:\n    size: 8\n    padding: 1\n", ""), "recipe.yaml was"),
    "no recipe at all": (lambda run, made: (run / "recipe.yaml").write_text("::"), "cannot be understood"),
    "an option in the lock": (lock("5.options.lr", 0.5), "plugins.lock.json was edited"),
    "code in the lock": (lock("5.code", "blake2b:0"), "plugins.lock.json was edited"),
    "version in the lock": (lock("5.version", "9"), "plugins.lock.json was edited"),
    "an observer in the lock": (lock("5.observer", True), "plugins.lock.json was edited"),
    "an option without effect": (lock("5.without_effect", ["lr"]), "plugins.lock.json was edited"),
    "no lock": (removed("plugins.lock.json"), "plugins.lock.json is missing"),
    "classes": (data("classes", list("0123456798")), "data.json was edited"),
    "content of the data": (data("splits.test.content", "0" * 32), "data.json was edited"),
    "preprocessing": (data("preprocessing.test", {}), "data.json was edited"),
    "threads": (environment("threads", 64), "environment.json was edited"),
    "processor": (environment("processor", "Abacus"), "environment.json was edited"),
    "revision": (environment("revision", "1" * 40), "environment.json was edited"),
    "no environment": (removed("environment.json"), "environment.json is missing"),
    "a session more": (copied("run/environment.json", "environment.2.json"), "environment.2.json was added"),
    # ledger
    "a copied ledger": (copied("other/ledger.jsonl", "ledger.jsonl"), "metrics.jsonl, line 1"),
    "a shorter ledger": (lines("ledger.jsonl", lambda x: x.pop()), "results"),
    "an empty ledger": (lines("ledger.jsonl", lambda x: x.clear()), "ledger: ledger.jsonl, line 1"),
    "an edited entry": (text("ledger.jsonl", '"step": 3', '"step": 2'), "ledger: ledger.jsonl, line 4"),
    "a removed entry": (lines("ledger.jsonl", lambda x: x.pop(5)), "ledger: ledger.jsonl, line 6"),
    "no JSON": (lines("ledger.jsonl", lambda x: x.append("{")), "ledger.jsonl is not a ledger: line 23"),
}


@pytest.mark.parametrize("what", SIMPLE)
def test_whatever_is_edited_is_found_and_placed(run, made, what):
    act, said = SIMPLE[what]
    act(run, made)
    verification = verify(RunDir(run), files=True)
    assert not verification.passed
    assert any(said in line for line in wrong(verification)), verification.checks
    assert "NOT verified" in verification.sentence()


def forged_last(run, made):
    edit_state(run, "last", weights)
    edit_state(run, "best", weights)
    edit_state(run, "epoch-3", weights)
    forge(run, line_22=state_digest(RunDir(run).load_state("last")))


def forged_record(run, made):
    edit_lines(run / "metrics.jsonl", lambda x: x.__setitem__(7, x[7].replace('"loss": 2', '"loss": 1')))
    forge(run)


def forged_added_record(run, made):
    edit_lines(run / "metrics.jsonl", lambda x: x.insert(7, x[7]))
    edit_lines(run / "ledger.jsonl", lambda x: x.__setitem__(slice(8, None), [_one_row_more(line) for line in x[8:]]))
    forge(run)


def _one_row_more(line):
    entry = json.loads(line)
    return json.dumps({**entry, "rows": entry["rows"] + 1})


def forged_accuracy(run, made):
    """Raise the last accuracy everywhere, and recompute everything."""
    edit_lines(run / "metrics.jsonl", better_row)
    value = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    for name in ("last", "best", "epoch-3"):
        if RunDir(run).load_state(name)["position"]["epoch"] == 3:
            edit_state(run, name, lambda s: s["history"][-1].update(test_accuracy=value))
    shutil.copy(run / "checkpoints" / "last.pt", run / "checkpoints" / "best.pt")
    edit_lines(run / "metrics.csv", lambda x: x.append(f"{x.pop().rpartition(',')[0]},{value}"))
    edit_json(run / "result.json", add("final.test_accuracy", value))
    edit_json(run / "result.json", add("best.test_accuracy", {"value": value, "epoch": 3}))
    forge(run, line_22=state_digest(RunDir(run).load_state("last")))


def forged_seed(run, made):
    """Say that the run of seed 1 is the one of seed 0: its files, with the record of this run."""
    entry = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])["record"]
    for name in ("ledger.jsonl", "metrics.jsonl", "metrics.csv", "result.json"):
        shutil.copy(made / "other" / name, run / name)
    for path in (made / "other" / "checkpoints").iterdir():
        shutil.copy(path, run / "checkpoints")
        if path.stem != "previous":
            record = RunDir(made / "run").load_state("last")["provenance"]
            edit_state(run, path.stem, lambda s, record=record: s.update(provenance=record))
    (run / "checkpoints" / "previous.pt").unlink()
    edit_lines(run / "ledger.jsonl", lambda x: x.__setitem__(0, json.dumps({**json.loads(x[0]), "record": entry})))
    forge(run)


def forged_thinned(run, made):
    edit_lines(
        run / "ledger.jsonl", lambda x: x.__setitem__(slice(None), [_numbered(x, n) for n in (0, 2, 3, *range(5, 22))])
    )
    forge(run)


def _numbered(lines, number):
    place = [0, 2, 3, *range(5, 22)].index(number)
    return json.dumps({**json.loads(lines[number]), "entry": place})


def forged_environment(run, made):
    """Claim another machine, so that bits could not be compared."""
    edit_json(run / "environment.json", add("processor", "Abacus"))
    note_files(run)


def swapped_data(run, made):
    text("recipe.yaml", "digits: {}", "digits: {test_fraction: 0.3}")(run, made)
    note_files(run)


def forged_lr(run, made):
    text("recipe.yaml", "lr: 0.1", "lr: 0.05")(run, made)
    note_files(run)


def forged_lr_and_lock(run, made):
    forged_lr(run, made)
    edit_json(run / "plugins.lock.json", add("5.options.lr", 0.05))
    note_files(run)


def forged_without_effect(run, made):
    forged_lr(run, made)
    edit_json(run / "plugins.lock.json", add("5.without_effect", ["lr"]))
    note_files(run)


FORGED = {
    "parameters": (result("parameters", 12), "parameters is 12, and the network has 398"),
    "weights": (forged_last, "from checkpoints: ledger.jsonl, line 22 (step 18): the replay reached another state"),
    "a record of a step": (forged_record, "metrics.jsonl, line 8: the replay recorded other values"),
    "a record more": (forged_added_record, "metrics.jsonl, line 9: the replay recorded other values"),
    "the accuracy": (forged_accuracy, "last.pt test_accuracy is"),
    "the seed": (forged_seed, "from the seed: ledger.jsonl, line 1: the seed gives another initial state"),
    "fewer entries": (forged_thinned, "ledger.jsonl has no entry of step 1, and the replay has one"),
    "another machine": (forged_environment, "record: a checkpoint of step"),
    "other data": (
        swapped_data,
        "this machine: not what made the run: plugins.digits.test_fraction was 0.2 and is 0.3",
    ),
    "lr": (forged_lr, "plugins.sgd.lr was 0.1 and is 0.05"),
    "lr in both files": (forged_lr_and_lock, "record: recipe.yaml"),
    "lr as without effect": (forged_without_effect, "record: recipe.yaml"),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_was_forged_wholesale_is_found_by_replays(run, made, what):
    act, said = FORGED[what]
    act(run, made)
    verification = found(run)
    assert not verification.passed
    assert any(said in line for line in wrong(verification)), verification.checks


def test_files_of_an_earlier_session_must_be_there(made, tmp_path):
    names = ["recipe.yaml", "recipe.2.yaml", "result.session-1.json"]
    for name in names:
        shutil.copytree(made / "longer", tmp_path / name)
        (tmp_path / name / name).unlink()
        assert any(
            f"{name} is missing" in line or "no recipe.yaml" in line for line in wrong_or_raised(tmp_path / name)
        )


def wrong_or_raised(out):
    try:
        return wrong(found(out))
    except TrainkitError as error:
        return [str(error)]


def test_changes_between_sessions_cannot_be_hidden(run):
    """Continue with another learning rate decay, and remove every trace that is not in the chain."""
    train("out", "epochs=2")
    fit(reopen("out", ["plugins.grad_clip={}", "epochs=3"], allow_changes=True))
    out = run.parent / "out"
    for name in ("recipe.2.yaml", "plugins.lock.2.json", "result.session-1.json"):
        (out / name).unlink()
    note_files(out)
    edit_json(out / "result.json", add("resumed", []))
    verification = found(out)
    assert wrong(verification), verification.checks


# ---- code and data that are not what made the run


def test_an_edited_plugin_is_named(run, tmp_path, monkeypatch):
    module = import_module("trainkit_normalize")
    source = Path(module.__file__).read_text()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "trainkit_normalize.py").write_text(source + "\n# edited\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site" / "trainkit_normalize.py"))
    assert any("plugins.normalize code was" in line for line in wrong(found(run)))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{n}.png")
    (tmp_path / "small.yaml").write_text(
        RECIPE.replace("  digits:", "  image_folder: {root: pictures, size: 8}")
        .replace("[0.305], std: [0.376]", "[0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]")
        .replace("batch_size: 256", "batch_size: 8")
    )
    return tmp_path / "pictures"


def test_one_changed_pixel_of_an_image_folder_is_found(pictures):
    train("out")
    assert_verified("out", 6)
    path = pictures / "test" / "dog" / "3.png"
    image = Image.open(path)
    image.load()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    assert any("data.splits.test.content was" in line for line in wrong(found("out")))


def test_moved_data_are_the_same_data(pictures):
    train("out")
    pictures.rename(pictures.parent / "elsewhere")
    assert main(["verify", "out"]) == 1
    assert main(["verify", "out", "plugins.image_folder.root=elsewhere"]) == 0


# ---- other machines


def test_other_threads_than_the_recorded_ones_are_set_for_the_replay(run):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert_verified(run, 18)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_without_the_recorded_bits_metrics_agree_and_nothing_is_called_proved(run, monkeypatch):
    monkeypatch.setattr("trainkit.provenance.processor", lambda: "Abacus")
    verification = found(run)
    assert wrong(verification) == []
    verdicts = {check.what: check.verdict for check in verification.checks}
    assert verdicts["this machine"] == "not possible"
    assert [verdicts[w] for w in ("from the seed", "from checkpoints", "evaluation")] == ["agrees"] * 3
    assert (verification.passed, verification.proved, verification.replayed) == (True, False, 0)
    assert "agrees, not proved" in verification.sentence()
    assert "within 1 point of accuracy and 5% of any other metric" in verification.sentence()


@pytest.mark.parametrize("what", ["the accuracy", "a record of a step", "weights"])
def test_without_the_recorded_bits_what_lies_outside_the_tolerance_differs(run, made, monkeypatch, what):
    monkeypatch.setattr("trainkit.provenance.processor", lambda: "Abacus")
    if what == "weights":
        edit_state(run, "last", lambda s: [w.mul_(3) for w in s["model"].values() if w.is_floating_point()])
        for name in ("best", "epoch-3"):
            shutil.copy(run / "checkpoints" / "last.pt", run / "checkpoints" / f"{name}.pt")
        forge(run, line_22=state_digest(RunDir(run).load_state("last")))
    elif what == "a record of a step":
        edit_lines(run / "metrics.jsonl", lambda x: x.__setitem__(0, x[0].replace('"loss": 2', '"loss": 1')))
        forge(run)
    else:
        FORGED[what][0](run, made)
    assert wrong(found(run))


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX-512")
def test_another_instruction_set_is_said_and_compared_within_the_tolerance(run):
    capped = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainkit", "verify", "run", "--json"]
    done = subprocess.run(command, env={**os.environ, **capped}, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert done.returncode == 0, said
    machine = next(check for check in said["checks"] if check["what"] == "this machine")
    assert "instruction_sets.torch was AVX512 and is AVX2" in machine["detail"]
    assert "proved" not in {c["verdict"] for c in said["checks"] if c["what"] in ("from the seed", "from checkpoints")}
    assert (said["comparable"], said["replayed"]) == (False, 0)


# ---- archives


def test_a_sealed_run_is_verified_without_its_directory(run, capsys):
    assert main(["runs", "seal", "run", "-o", "run.zip"]) == 0
    printed = capsys.readouterr().out
    assert "run.zip: 0.1 MB" in printed
    assert "trainkit verify run.zip" in printed
    shutil.rmtree(run)
    assert main(["verify", "run.zip"]) == 0
    assert main(["runs", "seal", "run", "-o", "run.zip"]) == 2


def test_a_sealed_run_keeps_what_an_earlier_session_recorded(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seal(RunDir(made / "longer"), tmp_path / "longer.zip")
    assert main(["verify", "longer.zip"]) == 0
    with pytest.raises(UsageError, match="exists; choose another name"):
        seal(RunDir(made / "longer"), tmp_path / "longer.zip")


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json", "C:\\evil.json"])
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("evil.zip", "w") as archive:
        archive.writestr("recipe.yaml", "name: a")
        archive.writestr(name, "{}")
    assert main(["verify", "evil.zip"]) == 2
    assert "refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evil.zip"]
    assert not (tmp_path.parent / "evil.json").exists()


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("recipe.yaml", bytes(300 << 20))
    assert main(["verify", "bomb.zip"]) == 2
    assert "would unpack to 1 files of 315 MB" in capsys.readouterr().err
    (tmp_path / "no.zip").write_bytes(b"PK")
    assert main(["verify", "no.zip"]) == 2


def test_a_strangers_archive_runs_no_code(run, capsys):
    class Evil:
        def __reduce__(self):
            return (open, ("owned", "w"))

    RunDir(run).write("checkpoints/last.pt", pack_state({"model": Evil()}))
    assert main(["runs", "seal", "run", "-o", "run.zip"]) == 0
    assert main(["verify", "run.zip"]) == 1
    assert "refused" in capsys.readouterr().out
    assert not (run.parent / "owned").exists()


# ---- wording


def test_the_table_fits_80_columns(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main(["verify", "run"])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    for what in ("ledger", "checkpoints", "results", "record", "this machine", "from the seed", "evaluation"):
        assert any(line.strip().startswith(what) for line in printed), what


def test_nothing_that_was_checked_is_nothing_that_was_proved():
    assert not Verification("run").proved
    assert not Verification("run").passed


def test_the_distribution_names_both_commands():
    commands = {point.name for point in metadata.entry_points(group="trainkit.commands")}
    assert {"verify", "runs.seal"} <= commands

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import trainkit
from trainkit.cli import main
from trainkit_ddp import SyncBatchNorm, synchronized

RECIPE = """
name: several
epochs: 2
batch_size: 160
plugins:
  digits:
  random_crop: {size: 8, padding: 1}
  random_horizontal_flip:
  resnet: {stem: 4, blocks: [1, 2], channels: [4, 8]}
  kernel_sharing: {within: ["stages.1"]}
  cross_entropy:
  sgd: {lr: 0.01, momentum: 0.9}
  grad_clip: {limit: 5.0}
  ema: {decay: 0.9}
  ddp: {sync_batch_norm: true}
  accumulate: {batches: 2}
  metrics: {every: 1}
  confusion_matrix:
  metric_log:
  ledger:
  checkpoint: {every_steps: 2}
"""  # 1,437 images: the last batch has 157, and the last step one batch

pytestmark = pytest.mark.slow

_context = multiprocessing.get_context("forkserver")


def torchrun(folder, *args):
    """Run the real command to its end, and return its exit code and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, "-m", "trainkit", *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


class Launched:
    """What torchrun does, with processes that are forked from one that has loaded torch."""

    def __init__(self, folder, *args, restarts=0):
        self._output = folder / f"{args[-1]}.txt"
        self._process = _context.Process(target=_launch, args=(str(folder), str(self._output), restarts, args))
        self._process.start()
        self.pid = self._process.pid

    def finished(self):
        self._process.join(240)
        return self._process.exitcode, self._output.read_text()


def _launch(folder, output, restarts, arguments):
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=restarts, **how)
    try:
        elastic_launch(config, _work)(*arguments)
    except ChildFailedError:
        sys.exit(1)


def _work(*arguments):
    torch.set_num_threads(1)  # torch was loaded before the fork, and has read OMP_NUM_THREADS
    sys.exit(main(list(arguments)))


def signal_one(process, number, run_dir):
    """Send a signal to one of torchrun's processes, once the run has a checkpoint."""
    for _ in range(1200):
        if (run_dir / "checkpoints" / "last.pt").exists():
            break
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), number)


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def chain(run_dir):
    return json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])["chain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The run of two processes, and what they printed."""
    code, output = torchrun(folder, "run", "recipe.yaml", "--run-dir", "two")
    assert code == 0, output
    return folder / "two", output


def test_two_processes_train_as_one_does(folder, two):
    run_dir, output = two
    assert output.count("completed in") == 1  # the first process alone prints
    one = trainkit.fit(trainkit.build(trainkit.load_recipe(folder / "recipe.yaml")), folder / "one")
    for ours, theirs in zip(rows(run_dir), rows(one.path), strict=True):
        losses = "train_loss", "test_loss"
        assert [ours[name] for name in losses] == pytest.approx([theirs[name] for name in losses], rel=1e-3)
        assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=0.3)  # of 1,437 images four
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
    ours, theirs = (json.loads((d / "figures" / "confusion.json").read_text()) for d in (run_dir, one.path))
    assert sum(map(sum, ours["confusion_matrix"])) == sum(map(sum, theirs["confusion_matrix"])) == 355
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["parameters"] == one.parameters
    declared = json.loads((run_dir / "environment.json").read_text())["declared"]["ddp"]
    assert declared == {"processes": 2, "backend": "gloo"}


def test_a_killed_process_is_started_anew_and_every_bit_is_that_of_an_undisturbed_run(folder, two):
    process = Launched(folder, "run", "recipe.yaml", "--run-dir", "killed", restarts=1)
    signal_one(process, signal.SIGKILL, folder / "killed")
    code, output = process.finished()
    assert code == 0, output
    assert "the processes were started anew; the run goes on in killed" in output
    assert chain(folder / "killed") == chain(two[0])
    assert json.loads((folder / "killed" / "result.json").read_text())["resumed"]


def test_a_stop_is_agreed_on_and_another_number_of_processes_goes_on(folder, two, capsys, monkeypatch):
    process = Launched(folder, "run", "recipe.yaml", "--run-dir", "stopped")
    signal_one(process, signal.SIGTERM, folder / "stopped")
    code, output = process.finished()
    assert code == 1, output
    assert output.count("stopped by SIGTERM; continue with: trainkit resume stopped") == 1
    assert json.loads((folder / "stopped" / "result.json").read_text())["reason"] == "SIGTERM"

    monkeypatch.chdir(folder)
    assert main(["resume", "stopped"]) == 2  # one process now
    assert "declared.ddp" in capsys.readouterr().err
    assert main(["resume", "stopped", "--allow-changes"]) == 0
    for ours, theirs in zip(rows(folder / "stopped"), rows(two[0]), strict=True):
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)


def ip(*words):
    """Run the program `ip`, and tell whether it succeeded."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def computers():
    """Two network namespaces that a virtual cable joins: each sees the other one and nothing else."""
    names = [f"trainkit{os.getpid()}{letter}" for letter in "ab"]
    if not shutil.which("ip") or not all(ip("netns", "add", name) for name in names):
        for name in names:
            shutil.which("ip") and ip("netns", "delete", name)
        pytest.skip("network namespaces cannot be made here")
    ends = [f"tk{os.getpid() % 10**6}{letter}" for letter in "ab"]
    assert ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        assert ip("link", "set", end, "netns", name)
        assert ip("-n", name, "address", "add", f"10.83.0.{number}/24", "dev", end)
        assert ip("-n", name, "link", "set", end, "up")
        assert ip("-n", name, "link", "set", "lo", "up")
    yield dict(zip(names, ends, strict=True))
    for name in names:
        ip("netns", "delete", name)


def test_two_computers_give_the_bits_of_two_processes_on_one(folder, two, computers):
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.83.0.1:29500"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    run = ["-m", "trainkit", "run", "recipe.yaml", "--run-dir", "nodes"]
    # Both namespaces have the computer's name, by which torchrun would look for addresses.
    own = [[f"--rdzv-conf=is_host={int(n == 1)}", f"--local-addr=10.83.0.{n}"] for n in (1, 2)]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, *where, *run],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for (name, end), where in zip(computers.items(), own, strict=True)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [output.count("completed in") for output in outputs].count(1) == 1  # the first process alone prints
    assert chain(folder / "nodes") == chain(two[0])


def test_synchronized_keeps_names_values_and_what_is_shared():
    norm = nn.BatchNorm2d(3, momentum=None)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), norm, nn.Sequential(norm, nn.BatchNorm2d(3, affine=False)))
    model(torch.randn(4, 1, 2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    made = synchronized(model)
    assert isinstance(made[1], SyncBatchNorm)
    assert made[2][0] is made[1]
    assert all(a is b for a, b in zip(made.parameters(), parameters, strict=True))
    assert before.keys() == made.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())

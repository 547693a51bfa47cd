import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

from trainkit.cli import main
from trainkit.errors import UsageError
from trainkit.rundir import RunDir
from trainkit_ray import Settings, _train, open_ray
from trainkit_studies import plan, read_study, run_missing

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

RECIPE = """\
name: tiny
local: [slow.py]
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  metric_log:
  checkpoint: {every_steps: 1}
  slow:
"""
# Each step takes a second while there is a file `slow`: time enough to be killed.
SLOW = """\
import time
from pathlib import Path

from trainkit.plugin import hookimpl, plugin


@plugin
class Slow:
    observer = True

    @hookimpl
    def step_end(self):
        if Path("slow").exists():
            time.sleep(1)
"""
ALLOW = ["--allow-local"]
STUDY = """\
name: small
recipe: tiny.yaml
seeds: [3]
variants:
  base:
  slow: {overrides: {plugins.sgd.lr: 0.01}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path


@pytest.fixture(scope="module")
def tasks():
    """A Ray that several tests use, because starting it takes seconds."""
    with open_ray({"cpus": "1"}, jobs=2) as executor:
        yield executor


def planned(home, *overrides):
    _, variants, seeds = read_study(Path("small.yaml"), overrides)
    return plan(Path(home), variants, seeds)


def weights(run):
    """Return the bits of a run's network."""
    model = RunDir(run.folder).load_state("last")["model"]
    return {name: tensor.numpy().tobytes() for name, tensor in model.items()}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def processes(word):
    """Return the processes whose command line has a word, with their parents: {pid: parent}."""
    found = {}
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in line.read_bytes():
                found[int(line.parent.name)] = int((line.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_study_is_killed_and_stopped_and_ends_with_the_bits_that_it_has_without_ray(folder, tasks, capfd):
    Path("slow").touch()
    runs = planned("by_ray")

    def kill_one_worker_and_press_ctrl_c():
        killed, stopped = runs
        for run in (killed, stopped):
            wait_for((run.folder / "checkpoints" / "last.pt").is_file)
        ((child, worker),) = processes(str(killed.folder)).items()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: child not in processes(str(killed.folder)))  # it does not go on without its worker
        os.kill(os.getpid(), signal.SIGINT)

    trouble = Thread(target=kill_one_worker_and_press_ctrl_c)
    trouble.start()
    assert run_missing(runs, jobs=2, options=ALLOW, executor=tasks) == (runs[:1], 130)
    trouble.join()
    assert "WorkerCrashedError" in capfd.readouterr().err
    assert [run.state() for run in runs] == ["started", "started"]
    assert RunDir(runs[1].folder).read_json("result.json")["status"] == "stopped"
    assert "stopped by SIGTERM" in runs[1].log.read_text()

    Path("slow").unlink()
    import ray

    address = ray.get_runtime_context().gcs_address
    command = ["study", "small.yaml", "-o", "by_ray", "--jobs", "2", "--executor", f"ray:cpus=1,address={address}"]
    subprocess.run([sys.executable, "-P", "-m", "trainkit", *command, *ALLOW], check=True)
    reference = planned("by_processes")
    for run in reference:
        assert main(run.command(ALLOW)) == 0  # here, which takes less time than in processes
    assert [weights(run) for run in runs] == [weights(run) for run in reference]
    results = [[RunDir(run.folder).read_json("result.json")["final"] for run in each] for each in (runs, reference)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cpu=2", r"ray: cpu: unknown setting; did you mean 'cpus'"),
        ("cpus=0", r"cpus=0: expected a whole number"),
        ("gpus=1.5", r"gpus=1.5: expected a whole number, or a fraction"),
        ("gpus=nan", r"gpus=nan: expected"),
        ("gpus", r"'gpus': expected KEY=VALUE"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(folder, capsys, given, said):
    assert main(["study", "small.yaml", "--executor", f"ray:{given}"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not Path("runs").exists()


def test_an_address_where_no_cluster_is_fails_at_once(folder, capsys):
    with (
        pytest.raises(UsageError, match=r"address=127\.0\.0\.1:1: nothing answers there"),
        open_ray({"address": "127.0.0.1:1"}, jobs=1),
    ):
        pass


def test_settings_are_read(folder):
    assert Settings.parse({"address": "10.0.0.5:6379", "gpus": "0.5"}) == Settings("10.0.0.5:6379", None, 0.5)


def test_a_machine_that_does_not_share_the_folder_is_named(folder):
    with pytest.raises(UsageError, match=r"seed-0\.log: No such file .* must share the folder"):
        _train(["run"], str(folder), str(folder / "elsewhere" / "seed-0.log"), None, False)


def test_help_says_that_a_cluster_shares_its_folder(capsys):
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    assert "ray: train the runs" in " ".join(capsys.readouterr().out.split())

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread each, set before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_cache = tempfile.TemporaryDirectory(prefix="trainkit-tests-cache-")  # removed when the interpreter ends
os.environ["XDG_CACHE_HOME"] = _cache.name  # what runs keep of data is not the user's here

from .processes import Process  # noqa: E402  (loads trainkit)

ROOT = Path(__file__).parents[1]

SMALL = """\
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
  lookahead:
  cosine_annealing_lr:
  metrics: {every: 1}
  metric_log:
  checkpoint:
"""


def pytest_collection_modifyitems(items):
    """Begin with the modules that hold slow tests, so that no process is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A recipe of real plugins that trains for twelve steps, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def trainkit(tmp_path):
    """Starts the real command line in an empty directory."""

    def start(*args, timeout=120, before=None, **options):
        if not options:  # as the command line is started, but for loading torch
            with Process(*args, folder=tmp_path, before=before) as process:
                process.wait(timeout)
                return SimpleNamespace(
                    returncode=process.returncode, stdout=process.printed("stdout"), stderr=process.printed("stderr")
                )
        command = [sys.executable, "-m", "trainkit", *map(str, args)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, **options}
        return subprocess.run(command, timeout=timeout, check=False, **options)

    return start

"""What a step costs beside a hand-written loop: a toy network, Linear 16-16-10, batches of 32, one thread.

A clock runs from the first batch of an epoch to its last, as Lightning's does below; what is done once an epoch, such
as saving a checkpoint, stands in a column of its own. The hand-written loop is measured with sums of loss and correct
images, too: what whoever writes it by hand would add. ``--lightning DIR`` measures Lightning, in a virtual environment
that is made in DIR.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from attrs import field
from common import alternate, arguments, peers, report, show
from torch import nn

from trainkit import Data, Run, TensorSplit, fit
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import build_run

BATCH = 32


def made(steps: int) -> Data:
    """Random images of 16 values."""
    images = torch.randint(0, 256, (steps * BATCH, 1, 4, 4), dtype=torch.uint8)
    train = TensorSplit(images, torch.randint(0, 10, (steps * BATCH,)))
    test = TensorSplit(images[:BATCH], train.targets[:BATCH])
    return Data(train=train, test=test, classes=tuple("0123456789"), shape=(1, 4, 4))


def network() -> nn.Module:
    """The toy network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))


@plugin
class Toy:
    """Data, model and optimizer of the toy."""

    steps: int

    @hookimpl
    def data(self) -> Data:
        return made(self.steps)

    @hookimpl
    def model(self) -> nn.Module:
        return network()

    @hookimpl
    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01, foreach=True)


def hand_written(steps: int, *, sums: bool = False) -> float:
    """Return microseconds a step of a plain loop over the same tensors, with or without sums of loss and accuracy."""
    data, model = made(steps), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    images, targets = data.train.images, data.train.targets  # type: ignore[attr-defined]
    order = torch.randperm(len(images))
    total, correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    start = time.perf_counter()
    for i in range(0, len(images), BATCH):
        index = order[i : i + BATCH]
        target = targets[index]
        output = model(images[index].float().div_(255))
        loss = nn.functional.cross_entropy(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if sums:
            total += loss.detach() * len(target)
            correct += (output.argmax(1) == target).sum()
    return (time.perf_counter() - start) / steps * 1e6


@plugin
class Clock:
    """Takes the time of an epoch's steps, and from there to its safe point; stands last."""

    start: float = field(init=False, default=0.0)
    steps: float = field(init=False, default=0.0)  # seconds of the training batches
    end: float = field(init=False, default=0.0)  # seconds of testing, records and checkpoints

    @hookimpl
    def epoch_start(self) -> None:
        self.start = time.perf_counter()

    @hookimpl
    def metrics(self, split: str) -> None:
        if split == "train":
            self.steps = time.perf_counter() - self.start

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.finished and run.batch_index == 0:
            self.end = time.perf_counter() - self.start - self.steps


def ours(steps: int, observers: dict[str, Any], ends: list[float]) -> float:
    """Return microseconds a step of the trainer, and add the milliseconds of the epoch's end to `ends`."""
    clock = Clock()
    run = build_run({"toy": Toy(steps=steps), **observers, "clock": clock}, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        fit(run, folder)
    ends.append(clock.end * 1e3)
    return clock.steps / steps * 1e6


def observers() -> dict[str, Any]:
    """Metrics, their log, the progress display and checkpoints."""
    from trainkit_checkpoint import Checkpoint
    from trainkit_metric_log import MetricLog
    from trainkit_metrics import Metrics
    from trainkit_progress import Progress

    return {"metrics": Metrics(), "metric_log": MetricLog(), "progress": Progress(), "checkpoint": Checkpoint()}


LIGHTNING = """
import json, logging, sys, time, warnings
warnings.simplefilter("ignore"); logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import torch, lightning.pytorch as pl
from torch import nn
torch.set_num_threads(1)
steps, batch, bar = int(sys.argv[1]), 32, sys.argv[2] == "bar"

class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    def training_step(self, pair, index):
        loss = nn.functional.cross_entropy(self.net(pair[0]), pair[1])
        if bar:
            self.log("loss", loss, prog_bar=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, foreach=True)

class Batches:
    def __init__(self):
        self.images = torch.randint(0, 256, (steps * batch, 1, 4, 4), dtype=torch.uint8)
        self.targets = torch.randint(0, 10, (steps * batch,))
        self.order = torch.randperm(steps * batch)
    def __len__(self): return steps
    def __iter__(self):
        for i in range(0, len(self.order), batch):
            index = self.order[i : i + batch]
            yield self.images[index].float().div_(255), self.targets[index]

class Clock(pl.Callback):
    def on_train_epoch_start(self, *_): self.start = time.perf_counter()
    def on_train_epoch_end(self, *_): self.seconds = time.perf_counter() - self.start

clock = Clock()
quiet = {} if bar else {"enable_progress_bar": False, "logger": False}
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[clock], enable_checkpointing=False,
                     enable_model_summary=False, default_root_dir=sys.argv[3], **quiet)
trainer.fit(Toy(), Batches())
print(json.dumps(clock.seconds / steps * 1e6))
"""


def lightning(python: Path, steps: int, mode: str) -> float:
    """Return microseconds a step of Lightning, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-c", LIGHTNING, str(steps), mode, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__, steps=2000, rounds=7, lightning="")
    torch.set_num_threads(1)
    bare, full = "trainkit, no plugin", "trainkit, metrics + metric_log + progress + checkpoint"
    ends: dict[str, list[float]] = {bare: [], full: []}
    contenders = {
        "hand-written loop": lambda: hand_written(args.steps),
        "hand-written loop, loss and accuracy summed": lambda: hand_written(args.steps, sums=True),
        bare: lambda: ours(args.steps, {}, ends[bare]),
        full: lambda: ours(args.steps, observers(), ends[full]),
    }
    if args.lightning:
        python = peers(Path(args.lightning), "lightning>=2.6")
        contenders["Lightning, bar and logger off"] = lambda: lightning(python, args.steps, "bare")
        contenders["Lightning, defaults, one logged value"] = lambda: lightning(python, args.steps, "bar")
    found = alternate(contenders, args.rounds)
    plain = found["hand-written loop"]
    rows = []
    for name, values in found.items():
        added = [v - p for v, p in zip(values, plain, strict=True)]
        end = show(ends[name][1:]) if name in ends else "-"
        rows.append((name, show(values), show(added) if values is not plain else "-", end))
    columns = ["loop", "us a step", "added to the plain loop", "ms at an epoch's end"]
    report(args, "median (least-greatest)", columns, rows)


if __name__ == "__main__":
    main()

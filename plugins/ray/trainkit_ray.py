"""Train the runs of a study as tasks of Ray, on a cluster whose machines share the folder.

Source: Moritz et al., *Ray: A Distributed Framework for Emerging AI Applications*, OSDI 2018.
A task starts ``trainkit run`` or ``trainkit resume`` in a process of its own, as it is started without Ray, so that a
run computes the same bits. That process is this module, run as a program: it ends when its task is killed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, chdir, contextmanager
from time import sleep
from typing import TYPE_CHECKING, Any

import attrs

from trainkit.cli.output import printable, terminal
from trainkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from trainkit_studies import PlannedRun  # type: ignore[import-untyped]

__all__ = ["RayTasks", "Settings", "open_ray"]

KILLED = 128 + signal.SIGKILL
STOPPED = 128 + signal.SIGTERM
OBJECT_STORE = 80 << 20  # bytes; about the least that Ray takes: nothing but exit codes is stored
POLL = 0.2  # seconds between two looks at a process

#: Ray's own settings, read when it is imported. Its ports are open to the whole network, even those of a Ray on one
#: machine, and whoever reaches them may run code: a token keeps others out. Ray trains at niceness 15 by default.
#: Ray 2.52 would set CUDA_VISIBLE_DEVICES where there are no GPUs, which is recorded as a change of what computes.
OWN_RAY = {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0"}  # nothing is reported to Ray's authors


@attrs.frozen
class Settings:
    """What ``--executor ray:KEY=VALUE,...`` sets.

    Args:
        address: ``HOST:PORT`` of a cluster, or ``auto``; by default Ray is started on this machine.
        cpus: CPUs of a run, which has as many threads; by default this machine's, shared among `--jobs` runs.
        gpus: GPUs of a run, a whole number or a fraction of one; by default the cluster's, shared among `--jobs` runs.
    """

    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Settings:
        """Return the settings that text gives.

        Raises:
            UsageError: a key is unknown, or a value is wrong.
        """
        known = [field.name for field in attrs.fields(cls)]
        for key in given:
            if key not in known:
                near = did_you_mean(key, known) or f"; settings are {', '.join(known)}"
                raise UsageError(f"--executor ray: {key}: unknown setting{near}")
        cpus, gpus = given.get("cpus"), given.get("gpus")
        if cpus is not None and not (cpus.isascii() and cpus.isdigit() and 0 < int(cpus) < 1 << 20):
            raise UsageError(f"--executor ray: cpus={cpus}: expected a whole number, at least 1")
        if gpus is not None and not _is_share(gpus):
            raise UsageError(f"--executor ray: gpus={gpus}: expected a whole number, or a fraction of one, such as 0.5")
        return cls(given.get("address"), None if cpus is None else int(cpus), None if gpus is None else float(gpus))


def _is_share(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return 0 <= value < 1 << 20 and (value < 1 or value.is_integer())


def open_ray(given: Mapping[str, str], jobs: int) -> AbstractContextManager[RayTasks]:
    """Return what trains runs as tasks of Ray within a ``with`` block, and ends the Ray that it has started.

    Args:
        given: by name, the fields of :class:`Settings`, as text.
        jobs: how many runs are trained at once.

    Raises:
        UsageError: a setting is wrong, Ray is missing or cannot be reached, or no machine has what a run asks for.
    """
    settings = Settings.parse(given)
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--executor ray: Ray is not installed; install it with: pip install ray")
    return _connected(settings, jobs)


@contextmanager
def _connected(settings: Settings, jobs: int) -> Iterator[RayTasks]:
    from trainkit_studies import cores

    os.environ.update(PRIVATE)
    if settings.address is None:
        if "ray" in sys.modules and "RAY_AUTH_TOKEN" not in os.environ:
            raise UsageError(
                "--executor ray: Ray was imported before, so it can be given no token, without which whoever reaches "
                "its ports may run code; start Python again, or start Ray yourself and give its address"
            )
        os.environ.update(OWN_RAY)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    options: dict[str, Any] = {"address": settings.address}
    _look_for(settings.address)
    with ExitStack() as stack:
        if settings.address is None:
            # Paths of sockets have 107 characters at most, so TMPDIR, which may be long, is not used.
            short = "/tmp" if os.path.isdir("/tmp") else None
            folder = tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True)
            options = {"address": "local", "num_cpus": cores(), "object_store_memory": OBJECT_STORE}
            options |= {"include_dashboard": False, "_temp_dir": stack.enter_context(folder)}
        try:
            # Ray lets its workers import modules of the current folder, which may be a stranger's.
            with chdir(os.path.abspath(os.sep)):
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            raise UsageError(f"--executor ray: cannot connect to {options['address']}: {_first_line(error)}") from error
        stack.callback(ray.shutdown)
        yield _tasks(settings, jobs, cores())


def _look_for(address: str | None) -> None:
    """Fail where nothing answers at ``HOST:PORT``: Ray would look for it for minutes.

    Raises:
        UsageError: nothing does.
    """
    found = re.fullmatch(r"(.+):(\d{1,5})", address or "")
    if found and "/" not in found[1]:
        try:
            socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"--executor ray: address={address}: nothing answers there: {error}") from error


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__


def _tasks(settings: Settings, jobs: int, here: int) -> RayTasks:
    """Return what trains with a run's share of the cluster.

    Args:
        settings: what is asked for.
        jobs: how many runs are trained at once.
        here: this machine's cores.

    Raises:
        UsageError: no machine of the cluster has what a run asks for.
    """
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    total = sum(machine.get("GPU", 0) for machine in machines)
    cpus = settings.cpus or max(1, here // jobs)
    gpus = settings.gpus
    if gpus is None:
        gpus = 1 / math.ceil(jobs / total) if total else 0.0
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        has = "; ".join(f"{machine.get('CPU', 0):g} CPUs, {machine.get('GPU', 0):g} GPUs" for machine in machines)
        raise UsageError(
            f"--executor ray: a run asks for {cpus} CPUs and {gpus:g} GPUs, which no machine has ({has}); "
            "ask for less: --executor ray:cpus=N,gpus=N"
        )
    # A task that Ray starts again would find its run directory in use.
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_train)
    return RayTasks(task, {"OMP_NUM_THREADS": str(cpus)} if settings.cpus else {}, hide_gpus=bool(total) and not gpus)


@attrs.define
class RayTasks:
    """Trains each run in a process that a task of Ray starts; :func:`open_ray` makes it.

    Args:
        task: :func:`_train` with what it asks of the cluster.
        variables: of each run's environment.
        hide_gpus: let runs see no GPU.
    """

    task: Any
    variables: Mapping[str, str]
    hide_gpus: bool
    _running: list[Any] = attrs.field(factory=list, init=False)
    _asked: bool = attrs.field(default=False, init=False)

    def train(self, planned: PlannedRun, options: Sequence[str], variables: Mapping[str, str]) -> int:
        """Start a task, wait for its end, and return the run's exit code; 137, if its worker was killed.

        Args:
            planned: the run.
            options: of its command line.
            variables: of its environment; Ray says which GPUs it has, and not these.
        """
        import ray
        from ray.exceptions import RayError, TaskCancelledError

        log = planned.log.absolute()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()  # a machine that does not find it does not share the folder
        threads = {**os.environ, **variables, **self.variables}.get("OMP_NUM_THREADS")
        task = self.task.remote(planned.command(options), os.getcwd(), str(log), threads, self.hide_gpus)
        self._running.append(task)
        if self._asked:
            ray.cancel(task)
        try:
            code: int = ray.get(task)
        except TaskCancelledError:
            return STOPPED
        except RayError as error:
            said = f"{planned.folder}: {_cause(error)}"
            terminal(stderr=True).print(printable(said), markup=False, highlight=False, soft_wrap=True)
            return KILLED
        finally:
            self._running.remove(task)
        for folder in (planned.folder.parent, planned.folder):
            if folder.is_dir():
                list(folder.iterdir())  # NFS looks for the files of another machine when their folder is opened
        return code

    def stop(self, number: int) -> None:
        """Let the runs save and stop; the second time, kill their workers, and with them the runs.

        Args:
            number: the signal that asks for it; runs get SIGTERM.
        """
        import ray

        for task in self._running:
            ray.cancel(task, force=self._asked)
        self._asked = True


def _cause(error: BaseException) -> str:
    """Return why a task has failed: what its code raised, or what Ray says of it."""
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, UsageError) else f"{type(error).__name__}: {_first_line(cause or error)}"


# ---- what runs on the cluster


def _train(command: Sequence[str], folder: str, log: str, threads: str | None, hide_gpus: bool) -> int:
    """Run a command of trainkit and return its exit code. This is the task.

    Args:
        command: without the program.
        folder: where it is run.
        log: the file that what it prints is added to.
        threads: `OMP_NUM_THREADS`, which Ray sets by itself; None for as many as there are without it.
        hide_gpus: let it see no GPU.

    Raises:
        UsageError: this machine lacks the folder or the log.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        output = os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND), "ab")
    except OSError as error:
        raise UsageError(
            f"{log}: {error.strerror} on {platform.node()}; the machines of the cluster must share the folder of "
            "the runs, the recipes and the data, by the same path"
        ) from None
    with output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        while (code := child.poll()) is None:
            try:
                sleep(POLL)
            except KeyboardInterrupt:  # ray.cancel
                child.send_signal(signal.SIGTERM)
        return code


def _end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when its parent ends, whatever ends it."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    from trainkit.cli import main

    _end_with_parent()
    sys.exit(main())

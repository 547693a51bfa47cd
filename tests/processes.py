"""The command line in processes of its own that start in milliseconds: forked from one that has loaded torch."""

import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from trainkit.cli import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainkit.cli.run", "trainkit.session", "torchvision", "rich.console", "omegaconf"])


def import_from(folder):
    """Let a process find packages in a folder first."""
    sys.path.insert(0, str(folder))


def print_into(path):
    """Let a process print into a file, such as a full disk."""
    os.dup2(os.open(path, os.O_WRONLY), 1)


def print_for_nobody():
    """Let a process print into a pipe that its reader has closed."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (what was opened for a file would seek)


def print_ascii():
    """Let a process print in an encoding that has none but ASCII's letters."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")


class Process:
    """One command, started in the current folder; what it prints goes to files.

    Args:
        arguments: of the command line.
        folder: where it is started; by default the current folder.
        before: called in the process before the command; a function of a module.
    """

    def __init__(self, *arguments, folder=None, before=None):
        self._outputs = tempfile.TemporaryDirectory(prefix="trainkit-tests-output-")
        arguments = [str(argument) for argument in arguments]
        given = (arguments, str(folder or os.getcwd()), self._outputs.name, before)
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.poll() is None:
            self.kill()
        self._process.join()
        self._outputs.cleanup()

    @property
    def returncode(self):
        """The exit code, negative for the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self, timeout=60):
        """Wait for the end and return all that was printed, the standard output first."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self.printed("stdout") + self.printed("stderr")
        return self.printed("stdout") + self.printed("stderr")

    def printed(self, stream):
        """Return what was printed so far to ``stdout`` or ``stderr``."""
        path = Path(self._outputs.name) / stream
        return path.read_text() if path.exists() else ""


def _run(arguments, folder, outputs, before):
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(os.path.join(outputs, name), "w") as stream:
            os.dup2(stream.fileno(), number)
    os.chdir(folder)
    if before:
        before()
    os._exit(main(arguments))

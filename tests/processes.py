"""The command line in processes of its own that start in milliseconds: forked from one that has loaded torch."""

import multiprocessing
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from trainkit.cli import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainkit.cli.run", "trainkit.session", "torchvision", "rich.console", "omegaconf"])


class Process:
    """One command, started in the current folder; what it prints, to either stream, goes to a file.

    Args:
        arguments: of the command line.
        before: called in the process before the command; a function of a module.
    """

    def __init__(self, *arguments, before=None):
        handle, name = tempfile.mkstemp(prefix="trainkit-tests-output-")
        os.close(handle)
        self._output = Path(name)
        arguments = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(arguments, os.getcwd(), name, before))
        self._process.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.poll() is None:
            self.kill()
        self._process.join()
        self._output.unlink()

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
        """Wait for the end and return all that was printed."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self._output.read_text()
        return self._output.read_text()


def _run(arguments, folder, output, before):
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(folder)
    if before:
        before()
    os._exit(main(arguments))

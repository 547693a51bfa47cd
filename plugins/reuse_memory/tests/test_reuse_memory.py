import json
import platform
import resource
import subprocess
import sys

import pytest
import torch

import trainkit_reuse_memory
from trainkit.testing import parameters_of, run_steps
from trainkit_reuse_memory import ReuseMemory

PAGES = 48 * 2**20 // resource.getpagesize()  # of a block larger than what glibc ever keeps by itself
FEW = PAGES / 1000  # even where the system gives huge pages, a block of new memory takes more

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

#: Uses a block of memory in each step, and again after the run, and prints how many pages the system gave each time. It
#: has a process of its own: what earlier tests left in a heap is used first.
USE_BLOCKS = """
import json, resource, sys
import torch
from attrs import field
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import run_steps
from trainkit_reuse_memory import ReuseMemory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

@plugin
class Blocks:
    pages: list[int] = field(init=False, factory=list)

    @hookimpl
    def step_end(self):
        self.pages.append(new_pages())

blocks = Blocks()
run_steps({"blocks": blocks}, steps=8)
without = blocks.pages[:]
run_steps({"reuse_memory": ReuseMemory(), "blocks": blocks}, steps=8)
print(json.dumps([without, blocks.pages[len(without) :], [new_pages(), new_pages()]]))
"""


@pytest.mark.slow
@needs_glibc
def test_the_block_of_a_step_serves_the_next_one_and_is_handed_back_when_the_run_ends():
    done = subprocess.run([sys.executable, "-c", USE_BLOCKS], capture_output=True, text=True, check=True)
    without, in_run, afterwards = json.loads(done.stdout.splitlines()[-1])
    assert min(without) > FEW  # each step gets new pages
    # Something else may lie in the block's place once, and then a new one is made.
    assert sorted(in_run[1:])[-2] < FEW
    assert min(afterwards) > FEW


def test_numbers_stay_the_same():
    with_it, without = (parameters_of(run_steps(plugins, 4)) for plugins in ({"reuse_memory": ReuseMemory()}, {}))
    assert all(map(torch.equal, with_it, without))


def test_it_does_nothing_where_the_c_library_is_another(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr(trainkit_reuse_memory, "ctypes", None)  # no mallopt to call
    run_steps({"reuse_memory": ReuseMemory()}, steps=1)

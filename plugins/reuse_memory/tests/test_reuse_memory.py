import platform
import resource

import pytest
import torch
from attrs import field

import trainkit_reuse_memory
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import assert_conforms, parameters_of, run_steps
from trainkit_reuse_memory import ReuseMemory

BLOCK = 48 * 2**20  # bytes; more than glibc ever keeps by itself
PAGES = BLOCK // resource.getpagesize()

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def new_pages():
    """Use a block and free it; return how many pages the system had to give for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(BLOCK, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@plugin
class Blocks:
    """Uses a large block in every step."""

    pages: list[int] = field(init=False, factory=list)

    @hookimpl
    def step_end(self):
        self.pages.append(new_pages())


@needs_glibc
def test_the_block_of_a_step_serves_the_next_one():
    blocks = Blocks()
    run_steps({"reuse_memory": ReuseMemory(), "blocks": blocks}, steps=4)
    assert max(blocks.pages[1:]) < PAGES / 100


@needs_glibc
def test_without_it_each_step_gets_new_pages():
    blocks = Blocks()
    run_steps({"blocks": blocks}, steps=4)
    assert min(blocks.pages) > PAGES / 1000  # at least the huge pages that some systems give


@needs_glibc
def test_memory_is_handed_back_when_the_run_ends():
    run_steps({"reuse_memory": ReuseMemory(), "blocks": Blocks()}, steps=2)
    first, second = new_pages(), new_pages()
    assert min(first, second) > PAGES / 1000


def test_numbers_stay_the_same():
    with_it, without = (parameters_of(run_steps(plugins, 4)) for plugins in ({"reuse_memory": ReuseMemory()}, {}))
    assert all(map(torch.equal, with_it, without))


def test_it_does_nothing_where_the_c_library_is_another(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr(trainkit_reuse_memory, "ctypes", None)  # no mallopt to call
    run_steps({"reuse_memory": ReuseMemory()}, steps=1)


def test_it_conforms():
    assert_conforms(ReuseMemory)

"""Write a new plugin: four files that install, train and pass their own tests."""

import argparse
import inspect
import keyword
import re
import shlex
from pathlib import Path

from trainkit import __version__, hookspecs
from trainkit.errors import UsageError, did_you_mean
from trainkit.registry import installed

__all__ = ["New"]

HOOKS = {name: spec for phase in hookspecs.PHASES for name, spec in vars(phase).items() if name[0] != "_"}
# how a method ends that neither hands on the value of a chain nor returns nothing
ENDINGS = {
    "data": "return made_data()",
    "model": "size = math.prod(run.data.shape)\n"
    "        return nn.Sequential(nn.Flatten(), nn.Linear(size, len(run.data.classes)))",
    "loss": "return nn.functional.cross_entropy",
    "optimizer": "return SGD(params, lr=0.1)",
    "backward": "autograd.backward(loss)\n        return True",
    "optimizer_step": "run.optimizer.step()",
}
# all that methods use, sorted as import lines are; what a plugin does not use is left out
IMPORTS = """\
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from attrs import field
from attrs.validators import min_len
from torch import Tensor, autograd, nn
from torch.optim import SGD, Optimizer

from trainkit import Batch, Data, Run, Schedule
from trainkit.hookspecs import Split
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import made_data
from trainkit.transforms import Transform
"""
MODULE = '''

__all__ = ["{cls}"]


@plugin
class {cls}:
    """Print a message whenever one of its hooks fires.

    Args:
        message: what is printed; not empty.
    """

    message: str = field(default="hello", validator=min_len(1))
'''
METHOD = '''
    @hookimpl
    def {hook}(self, {arguments}) -> {returns}:
        """{sentence}"""
        run.console.print(f"{hook}: {{self.message}}", markup=False)
'''
TESTS = """\
from trainkit.testing import assert_conforms, record_hooks
from trainkit_{name} import {cls}


def test_its_message_is_printed_whenever_one_of_its_hooks_fires(capsys):
    fired = record_hooks({{"it": {cls}(message="good morning")}})
    assert {{hook for hook, _ in fired}} == {{
{hooks}    }}
    assert capsys.readouterr().out.count("good morning") == len(fired)


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms({cls}, message="good morning")
"""
README = """\
# trainkit-{hyphens}

Prints a message whenever one of its hooks fires. Say here what it does, and name its source.

```yaml
plugins:
  {name}: {{message: hello}}
```
"""
PYPROJECT = """\
[build-system]
requires = ["flit_core>=3.9"]
build-backend = "flit_core.buildapi"

[project]
name = "trainkit-{hyphens}"
version = "0.1.0"
description = "Print a message whenever one of its hooks fires."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["trainkit~={version}", "torch"]

[project.entry-points."trainkit.plugins"]
{name} = "trainkit_{name}:{cls}"
"""

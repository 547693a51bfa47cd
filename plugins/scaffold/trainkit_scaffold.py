"""Write a new plugin: four files that install, train and pass their own tests."""

from __future__ import annotations

import argparse
import ast
import inspect
import keyword
import re
import shlex
from pathlib import Path

from trainkit import __version__, hookspecs
from trainkit.errors import UsageError, did_you_mean
from trainkit.registry import installed

__all__ = ["New", "files"]

HOOKS = {name: function for phase in hookspecs.PHASES for name, function in vars(phase).items() if name[0] != "_"}

# What ends a method when more is needed than to hand on the value of a chain, or nothing: code and its imports.
ENDINGS = {
    "data": (
        "images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)\n"
        "split = TensorSplit(images, torch.arange(16) % 2)\n"
        'return Data(train=split, test=split, classes=("a", "b"), shape=(3, 8, 8))',
        "import torch\nfrom trainkit import TensorSplit",
    ),
    "model": (
        "inputs, outputs = math.prod(run.data.shape), len(run.data.classes)\n"
        "return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))",
        "import math",
    ),
    "loss": ("return nn.functional.cross_entropy", "from torch import nn"),
    "optimizer": ("return SGD(params, lr=0.1)", "from torch.optim import SGD"),
    "backward": ("torch.autograd.backward(loss)\nreturn None", "import torch"),
    "optimizer_step": ("run.optimizer.step()", ""),
}

PYPROJECT = """\
[build-system]
requires = ["flit_core>=3.9"]
build-backend = "flit_core.buildapi"

[project]
name = "trainkit-{hyphens}"
version = "0.1.0"
description = "{summary}"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["trainkit>={version}", "torch"]

[project.entry-points."trainkit.plugins"]
{name} = "trainkit_{name}:{cls}"
"""

README = """\
# trainkit-{hyphens}

Prints a line in {hooks}. Say here what it does, and name its source.

```yaml
plugins:
  {name}: {{message: hello}}
```

| key | default | meaning |
|---|---|---|
| `message` | `hello` | what is printed; not empty |
"""

MODULE = '''\
"""{title}."""

{imports}

__all__ = ["{cls}"]


@plugin
class {cls}:
    """{summary}

    Args:
        message: what is printed; not empty.
    """

    message: str = field(default="hello", validator=min_len(1))
{methods}'''

METHOD = '''
    @hookimpl
    def {hook}{signature}:
        """{doc}"""
        run.console.print(f"{name}, {hook}: {{self.message}}", markup=False)
'''

TESTS = '''\
import pytest

from trainkit.testing import assert_conforms, record_hooks
from trainkit_{name} import {cls}

HOOKS = {hook_set}


def test_its_message_is_printed_whenever_one_of_its_hooks_fires(capsys):
    fired = record_hooks({{"{name}": {cls}(message="good morning")}})
    assert {{hook for hook, _ in fired}} == HOOKS
    assert capsys.readouterr().out.count("good morning") == len(fired)


def test_it_keeps_the_promises_of_every_plugin():
    assert_conforms({cls}, message="good morning")


def test_an_empty_message_is_refused():
    with pytest.raises(ValueError, match="message"):
        {cls}(message="")
'''

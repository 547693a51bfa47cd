"""A plugin-based training framework for image models.

The names below are the public interface for notebooks; plugin authors also import ``trainkit.plugin``. They load on
first use, so that ``import trainkit`` costs nothing and the commands that need no torch do not import it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "data",
    "Data": "data",
    "TensorSplit": "data",
    "TrainkitError": "errors",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "build": "build",
    "LoadedModel": "inference",
    "load_model": "inference",
    "allow_local": "local",
    "Metric": "run",
    "Run": "run",
    "Schedule": "run",
    "Result": "session",
    "evaluate": "session",
    "fit": "session",
    "resume": "session",
    "Gather": "transforms",
    "Map": "transforms",
}

if TYPE_CHECKING:
    from trainkit.build import build as build
    from trainkit.data import Batch as Batch
    from trainkit.data import Data as Data
    from trainkit.data import TensorSplit as TensorSplit
    from trainkit.errors import TrainkitError as TrainkitError
    from trainkit.inference import LoadedModel as LoadedModel
    from trainkit.inference import load_model as load_model
    from trainkit.local import allow_local as allow_local
    from trainkit.recipe import Recipe as Recipe
    from trainkit.recipe import load_recipe as load_recipe
    from trainkit.run import Metric as Metric
    from trainkit.run import Run as Run
    from trainkit.run import Schedule as Schedule
    from trainkit.session import Result as Result
    from trainkit.session import evaluate as evaluate
    from trainkit.session import fit as fit
    from trainkit.session import resume as resume
    from trainkit.transforms import Gather as Gather
    from trainkit.transforms import Map as Map


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
    return getattr(import_module(f"trainkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _Package(ModuleType):
    """Keeps ``trainkit.build`` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

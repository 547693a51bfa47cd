"""Helpers for plugin authors' tests: tiny real runs on fake data, and one check of all that a plugin promises."""

from trainkit.testing.conformance import assert_conforms, assert_light_imports
from trainkit.testing.fakes import (
    assert_refuses,
    build_from,
    build_run,
    fake_data,
    from_recipe,
    parameters_of,
    record_hooks,
    run_steps,
    watch,
)

__all__ = [
    "assert_conforms",
    "assert_light_imports",
    "assert_refuses",
    "build_from",
    "build_run",
    "fake_data",
    "from_recipe",
    "parameters_of",
    "record_hooks",
    "run_steps",
    "watch",
]

"""What the author of a plugin imports: the class decorator and the hook marker.

Nothing here imports torch: a plugin decides for itself what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import attrs
import pluggy

from trainkit.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["hookimpl", "matching_modules", "plugin"]

C = TypeVar("C", bound=type)

#: Marks a method as the implementation of the hook of the same name. It takes no options: order is the recipe's order.
hookimpl = pluggy.HookimplMarker("trainkit")

# eq=False: two plugins with equal options are still two plugins, each with its own state.
_define: Callable[[Any], Any] = attrs.define(eq=False, kw_only=True)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(attrs.field,))
def plugin(cls: C) -> C:
    """Turn a class into a plugin: its attrs fields are the keys that a recipe may give it.

    Types and validators of the fields are the check of those keys, and the first line of the class's docstring is the
    plugin's summary. State that is not an option is declared with ``field(init=False)``. Optional class attributes
    (annotate them with ``ClassVar``):

    * ``after``, ``before``: names of plugins that it must follow or precede in a recipe;
    * ``conflicts``: names of plugins that it cannot run beside;
    * ``claims``: exclusive slots, such as ``"lr_schedule"``, that no second plugin may claim;
    * ``hookspecs``: classes of :func:`trainkit.hookspec` methods that it offers to other plugins.
    """
    return _define(cls)  # type: ignore[no-any-return]


def matching_modules(model: nn.Module, patterns: Iterable[str], key: str) -> dict[str, nn.Module]:
    """Return the modules whose paths match one of the patterns, by path, in the network's own order.

    Args:
        model: the network.
        patterns: shell patterns, component by component: in ``stages.*.*.bn2`` each ``*`` is one component of a path.
        key: the option that holds the patterns, for the error.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    matched = set()
    for pattern in patterns:
        parts = pattern.split(".")
        found = [p for p in modules if p.count(".") + 1 == len(parts) and all(map(fnmatchcase, p.split("."), parts))]
        if not found:
            near = ", ".join(repr(p) for p in get_close_matches(pattern, modules, n=5, cutoff=0.3)) or "none"
            raise RecipeError(
                f"{key!r}: {pattern!r} matches no module of the network; modules with similar paths: {near}"
            )
        matched.update(found)
    return {path: module for path, module in modules.items() if path in matched}

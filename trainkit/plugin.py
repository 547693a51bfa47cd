"""What the author of a plugin imports: the class decorator and the hook marker.

Nothing here imports torch: a plugin decides for itself what it needs.
"""

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import attrs
import pluggy

__all__ = ["hookimpl", "plugin"]

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

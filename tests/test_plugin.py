import collections.abc
import functools
import operator
import subprocess
import sys
import textwrap
import types
from enum import Enum, IntEnum
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, NewType, Optional, TypedDict

import attrs
import pytest
from attrs import field
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import PluginError, RecipeError
from trainkit.hookspecs import PHASES
from trainkit.options import option_types, type_name
from trainkit.plugin import declared, plugin
from trainkit.recipe import from_dict, make_options


class Colour(Enum):
    RED = "red"


class Number(IntEnum):
    ONE = 1


@attrs.define
class Inner:
    x: int = 1
    again: Optional["Inner"] = None


@attrs.define
class Odd:
    x: set[int] = field(factory=set)


class Typed(TypedDict):
    x: int


HOOKS = [name for phase in PHASES for name in vars(phase) if not name.startswith("_")]

#: A type, a value that a recipe may give, and what the plugin gets.
WORKING = [
    (bool, True, True),
    (int, 3, 3),
    (float, 1, 1.0),
    (str, "a", "a"),
    (Path, "a/b", Path("a/b")),
    (Any, [1, {"a": 2}], [1, {"a": 2}]),
    (Colour, "RED", Colour.RED),
    (Number, "ONE", Number.ONE),
    (Literal["a", 1, None], "a", "a"),
    (int | None, None, None),
    (Path | None, "a", Path("a")),
    (list, [1, "a"], [1, "a"]),
    (list[int], [1], [1]),
    (list[list[float]], [[1]], [[1.0]]),
    (list[Path], ["a"], [Path("a")]),
    (list[Literal["a"]], ["a"], ["a"]),
    (list[int | str], [1, "a"], [1, "a"]),
    (list[list[int] | None], [[1], None], [[1], None]),
    (dict, {"a": 1}, {"a": 1}),
    (dict[str, Any], {"a": [1]}, {"a": [1]}),
    (dict[str, list[int]], {"a": [1]}, {"a": [1]}),
    (dict[str, Inner], {"a": {"x": 2}}, {"a": Inner(2)}),
    (tuple, [1, "a"], (1, "a")),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[float, ...], [1, 2], (1.0, 2.0)),
    (tuple[Colour, ...], ["RED"], (Colour.RED,)),
    (tuple[int | float, ...], [1, 2.5], (1, 2.5)),
    (int | str, "a", "a"),
    (int | tuple[int, int], [1, 2], (1, 2)),
    (list[str] | dict[str, str], {"a": "b"}, {"a": "b"}),
    (Inner, {"x": 2, "again": {"x": 3}}, Inner(2, Inner(3))),
    (Inner | None, {"x": 2}, Inner(2)),
    (int | Inner, {"x": 2}, Inner(2)),
    (Annotated[int, "metres"], 1, 1),
]

REFUSED = [
    (object, "cannot be checked against object"),
    (set[int], r"cannot be checked against set\[int\]"),
    (frozenset, "frozenset"),
    (bytes, "bytes"),
    (complex, "complex"),
    (PurePath, "PurePath"),
    (collections.abc.Sequence[int], "Sequence"),
    (collections.abc.Callable[[int], int], "Callable"),
    (type, "type"),
    (None, "NoneType"),
    (3, "against 3"),
    (NewType("Metres", int), "Metres"),
    (Typed, "Typed"),
    (dict[int, int], r"keys of a recipe are text, and not int; use dict\[str"),
    (dict[Colour, int], "keys of a recipe are text"),
    (list[set[int]], "set"),
    (dict[str, object], "object"),
    (int | set[int], "set"),
    (tuple[list[int], ...], r"the elements of a tuple cannot be checked against list\[int\]; use list\[...\]"),
    (tuple[tuple[int, int], ...], "the elements of a tuple"),
    (tuple[Inner, ...], "the elements of a tuple"),
    (list[tuple[int, int]], r"no recipe can give tuple\[int, int\] inside a list"),
    (list[int | tuple[int, int]], "inside a list"),
    (dict[str, tuple[int, int]], "inside a list or dict"),
    (int | Path, "a union of several types never holds Path"),
    (str | Colour | None, "never holds Colour"),
    (str | list[Path], "never holds Path"),
    (list[dict[str, int | list[Colour]]], "never holds Colour"),
    (list[Inner | int], "never holds Inner"),
    (int | list[Inner], "never holds Inner"),
    (Literal[Colour.RED], "value <Colour.RED: 'red'> of its Literal"),
    (Odd, r"in Odd, field 'x': .* set\[int\]"),
    (list[Odd], "in Odd, field 'x'"),
]


def made_of(annotation):
    """Return a plugin class with one option of a type."""
    return plugin(type("P", (), {"__annotations__": {"value": annotation}, "value": field(), "__module__": __name__}))


def options(cls, **given):
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"p": given}})
    return make_options(recipe, "p", cls)


@pytest.mark.parametrize(("annotation", "given", "made"), WORKING)
def test_a_documented_type_reaches_the_plugin(annotation, given, made):
    value = options(made_of(annotation), value=given).value
    assert value == made
    assert type(value) is type(made)


@pytest.mark.parametrize(("annotation", "said"), REFUSED)
def test_a_type_that_cannot_be_checked_is_refused_when_the_class_is_made(annotation, said):
    with pytest.raises(PluginError, match=f"class P in {__name__}, field 'value': .*{said}"):
        made_of(annotation)


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (int, "int"),
        (list[int | None], "list[int | None]"),
        (float | None | Literal["a"], "float | None | Literal['a']"),
        (int | tuple[int | float, ...] | Literal["random"], "int | tuple[int | float, ...] | Literal['random']"),
        (dict[str, Any], "dict[str, Any]"),
    ],
)
def test_a_type_is_named_as_an_author_writes_it(annotation, said):
    assert type_name(annotation) == said


scalars = st.sampled_from([bool, int, float, str, Literal["a", 2]])
unions = st.lists(scalars, min_size=1, max_size=3).map(lambda members: functools.reduce(operator.or_, members))
elements = scalars | unions


def nested(inner):
    lists = inner.map(lambda element: list[element])
    return lists | inner.map(lambda element: dict[str, element]) | inner.map(lambda element: element | None)


annotations = st.recursive(elements, nested, max_leaves=4) | elements.map(lambda element: tuple[element, ...])
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.sampled_from(["a", "2", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


def is_of(value, annotation):
    """Tell a value's type the slow way, independently of omegaconf."""
    arguments = getattr(annotation, "__args__", ())
    origin = getattr(annotation, "__origin__", annotation)
    if isinstance(annotation, types.UnionType) or "Union" in str(origin):
        return any(is_of(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict) and all(is_of(each, arguments[1]) for each in value.values())
    if origin in (list, tuple):
        return isinstance(value, origin) and all(is_of(each, arguments[0]) for each in value)
    return isinstance(value, annotation)


@given(annotations, plain)
def test_an_option_has_its_type_or_is_refused(annotation, given):
    try:
        made = options(made_of(annotation), value=given)
    except RecipeError:
        return
    assert is_of(made.value, annotation)


def test_a_field_without_a_type_is_named_with_the_cure():
    with pytest.raises(PluginError, match=r"class P .*field 'limit': it has no type; write `limit: int = field"):

        @plugin
        class P:
            other: int = 1
            limit = field(default=3)


@pytest.mark.parametrize("default", [[1], {"a": 1}, {1}])
@pytest.mark.parametrize("init", [True, False])
def test_a_mutable_default_is_refused(default, init):
    with pytest.raises(PluginError, match=r"class P .*field 'values': .*write `values: ... = field\(factory=lambda: "):

        @plugin
        class P:
            values: Any = field(default=default, init=init)


@pytest.mark.parametrize("constraint", ["after", "before", "conflicts", "claims"])
def test_a_bare_string_is_no_list_of_names(constraint):
    with pytest.raises(PluginError, match=rf"class P .*field '{constraint}': .*write `{constraint} = \('se',\)`"):
        plugin(type("P", (), {constraint: "se"}))
    with pytest.raises(PluginError, match=f"field '{constraint}': expected a tuple"):
        plugin(type("P", (), {constraint: (3,)}))
    assert declared(plugin(type("P", (), {constraint: ("se",)})), constraint) == ("se",)


@pytest.mark.parametrize("given", ["Specs", Inner, ("Specs",), 3])
def test_hookspecs_are_classes(given):
    with pytest.raises(PluginError, match="field 'hookspecs': expected a tuple with one class or more; write"):
        plugin(type("P", (), {"hookspecs": given}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"observer": "yes"}, "field 'observer': expected True or False, got 'yes'"),
        ({"observer": True, "every_process": 1}, "field 'every_process': expected True or False, got 1"),
        ({"every_process": True}, "field 'every_process': it is for observers: .* add `observer = True`"),
    ],
)
def test_flags_are_true_or_false_and_only_observers_may_miss_processes(flags, said):
    with pytest.raises(PluginError, match=said):
        plugin(type("P", (), flags))


def test_options_may_be_called_like_a_constraint():
    @plugin
    class P:
        after: list[str]
        before: str = "se"
        claims: ClassVar[tuple[str, ...]] = ("slot",)

    assert (declared(P, "after"), declared(P, "before"), declared(P, "claims")) == ((), (), ("slot",))


@pytest.mark.parametrize("hook", HOOKS)
def test_an_option_called_like_a_hook_is_refused(hook):
    with pytest.raises(PluginError, match=f"class P .*field '{hook}': .*rename the option"):
        plugin(type("P", (), {"__annotations__": {hook: int}, hook: 1}))


def test_state_may_be_called_like_a_hook():
    @plugin
    class P:
        model: object = field(init=False, default=None)

    assert P().model is None


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_half_of_a_state_is_refused(method):
    with pytest.raises(PluginError, match=f"class P .*field '{method}': .* both"):
        plugin(type("P", (), {method: lambda self: {}}))


@pytest.fixture
def module(monkeypatch):
    """Imports source code as a module."""

    def make(source):
        made = types.ModuleType("acme_module")
        monkeypatch.setitem(sys.modules, "acme_module", made)
        exec(compile(textwrap.dedent(source), "acme_module.py", "exec", dont_inherit=True), vars(made))
        return made

    return make


def test_state_may_name_what_only_type_checkers_import(module):
    cls = module("""
        from __future__ import annotations
        from typing import TYPE_CHECKING, ClassVar
        from attrs import field
        from trainkit.plugin import plugin
        if TYPE_CHECKING:
            from torch import Tensor

        @plugin
        class P:
            before: ClassVar[tuple[str, ...]] = ("se",)
            limit: float | None = None
            average: Tensor | None = field(init=False, default=None)
    """).P
    assert option_types(cls) == {"limit": float | None}
    assert options(cls, limit=1).limit == 1.0
    assert declared(cls, "before") == ("se",)


def test_an_annotation_in_text_is_checked_when_the_class_is_made(module):
    with pytest.raises(PluginError, match="class P in acme_module, field 'sizes': .*set"):
        module("""
            from __future__ import annotations
            from trainkit.plugin import plugin

            @plugin
            class P:
                sizes: set[int] = None
        """)


LATER = """
    from __future__ import annotations
    from trainkit.plugin import plugin

    @plugin
    class P:
        value: Later

    Later = {}
"""


def test_an_annotation_that_names_what_follows_is_checked_with_the_recipe(module):
    assert options(module(LATER.format("list[int]")).P, value=[1]).value == [1]
    with pytest.raises(PluginError, match="plugins.p: class P in acme_module, field 'value': .*set"):
        options(module(LATER.format("set[int]")).P, value=[1])


def test_an_annotation_without_meaning_is_named_with_the_recipe(module):
    cls = module(LATER.replace("Later = {}", "")).P
    with pytest.raises(PluginError, match="plugins.p: class P .*'value': its annotation 'Later' has no meaning"):
        options(cls, value=[1])


def test_inherited_options_are_resolved_where_they_were_written(module):
    base = module("""
        from __future__ import annotations
        from trainkit.plugin import plugin
        Amount = int | float

        @plugin
        class Base:
            amount: Amount = 1
    """).Base

    @plugin
    class P(base):
        more: str = ""

    assert option_types(P) == {"amount": int | float, "more": str}


def test_plugin_needs_no_torch():
    code = "import sys, trainkit.plugin; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'omegaconf')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

from importlib.metadata import EntryPoint
from typing import ClassVar

import attrs
import pytest
from attrs import field

from trainkit import hooks as hooks_module
from trainkit.errors import PluginError, RunError
from trainkit.hooks import LoadedPlugin, load_plugins, register
from trainkit.hookspecs import hookspec
from trainkit.plugin import hookimpl, plugin
from trainkit.recipe import from_dict
from trainkit.registry import Installed


def active(**instances):
    return [LoadedPlugin(name, instance) for name, instance in instances.items()]


@plugin
class Named:
    """Appends its name to a list when its hooks are called."""

    name: str
    calls: list = field(factory=list)

    @hookimpl
    def fit_start(self, run):
        run.append(self.name)

    @hookimpl
    def transform_model(self, model):
        return (*model, self.name)


def test_order_is_the_recipes_order():
    hooks = register(active(b=Named(name="b"), a=Named(name="a"), c=Named(name="c")))
    calls = []
    hooks.notify("fit_start")(calls)
    assert calls == ["b", "a", "c"]


def test_pluggys_own_calls_follow_the_recipe_too():
    hooks = register(active(b=Named(name="b"), a=Named(name="a")))
    calls = []
    hooks.manager.hook.fit_start(run=calls)
    assert calls == ["b", "a"]


def test_the_order_names_who_is_called_in_each_hook():
    hooks = register(active(b=Named(name="b"), a=Named(name="a")))
    assert hooks.order() == [("transform_model", "chain", ["b", "a"]), ("fit_start", "notify", ["b", "a"])]


def test_a_chain_passes_each_result_on():
    hooks = register(active(b=Named(name="b"), a=Named(name="a")))
    assert hooks.chain("transform_model", tuple)(None, ()) == ("b", "a")


def test_a_hook_that_nobody_implements_does_nothing_or_its_default():
    hooks = register([])
    assert hooks.notify("step_end")(None) is None
    assert hooks.chain("transform_batch", object)(None, "batch") == "batch"
    assert hooks.one("backward", default=lambda run, loss: loss + 1)(None, 2) == 3


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"after": ("third",)}, "must come after 'third': move the line `second:` below `third:`"),
        ({}, {"before": ("first",)}, "must come before 'first': move the line `second:` above `first:`"),
        ({}, {"conflicts": ("first",)}, "plugin 'second' cannot run beside plugin 'first'"),
        ({"claims": ("slot",)}, {"claims": ("slot",)}, "plugin 'first' and plugin 'second' both claim 'slot'"),
    ],
)
def test_constraints_between_plugins(first, second, said):
    def made(**attributes):
        return plugin(type("P", (), attributes))()

    with pytest.raises(PluginError, match=said):
        register(active(first=made(**first), second=made(**second), third=made()), "recipe.yaml")


def test_constraints_on_absent_plugins_are_no_constraint():
    @plugin
    class P:
        after: ClassVar = ("absent",)
        before: ClassVar = ("absent",)
        conflicts: ClassVar = ("absent",)

    register(active(p=P()))


def test_an_option_of_a_constraints_name_is_no_constraint():
    @plugin
    class P:
        after: list[str]

    register(active(p=P(after=["q"]), q=Named(name="q")))


def test_two_providers_are_named():
    @plugin
    class Model:
        @hookimpl
        def model(self, run): ...

    with pytest.raises(PluginError, match="plugin 'a' and plugin 'b' both provide it; drop one: `b: false`"):
        register(active(a=Model(), b=Model()))


def test_no_provider_is_named():
    with pytest.raises(PluginError, match="no plugin of the recipe provides 'model'"):
        register([]).one("model")


def test_a_misspelt_hook_is_named_with_the_nearest():
    @plugin
    class P:
        @hookimpl
        def step_ended(self, run): ...

    with pytest.raises(PluginError, match=r"plugin 'p': 'step_ended' is not a hook; did you mean 'step_end'\?"):
        register(active(p=P()))


def test_a_forgotten_mark_is_named():
    @plugin
    class P:
        def step_end(self, run): ...

    with pytest.raises(PluginError, match="plugin 'p': 'step_end' is a hook's name; mark the method with @hookimpl"):
        register(active(p=P()))


def test_an_argument_that_the_hook_does_not_offer_is_named_with_the_nearest():
    @plugin
    class P:
        @hookimpl
        def epoch_end(self, run, metric): ...

    with pytest.raises(PluginError) as caught:
        register(active(p=P()))
    assert str(caught.value) == (
        "plugin 'p', epoch_end: the hook has no argument 'metric'; did you mean 'metrics'?; it offers run, metrics"
    )


@pytest.mark.parametrize(("has", "lacks"), [("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")])
def test_state_needs_both_methods(has, lacks):
    cls = attrs.define(type("P", (), {has: lambda self, *state: {}}))  # a class that @plugin did not see
    with pytest.raises(PluginError, match=f"plugin 'p' has {has} and no {lacks}"):
        register(active(p=cls()))


def test_pluggys_ordering_options_are_refused():
    import pluggy

    @plugin
    class P:
        @pluggy.HookimplMarker("trainkit")(tryfirst=True)
        def step_end(self, run): ...

    with pytest.raises(PluginError, match="takes no options"):
        register(active(p=P()))


@pytest.mark.parametrize("kind", [PluginError, RunError])
def test_a_failing_plugin_is_named_with_its_hook(kind):
    @plugin
    class P:
        @hookimpl
        def step_end(self, run):
            raise ZeroDivisionError("by zero")

    origin = Installed("p", "acme-p", "1.2", "", "", EntryPoint("p", "p:P", "trainkit.plugins"))
    hooks = register([LoadedPlugin("p", P(), origin)])
    named = r"plugin 'p' \(acme-p 1.2\) failed in step_end: ZeroDivisionError: by zero"
    with pytest.raises(kind, match=named), hooks.blaming(kind):
        hooks.notify("step_end")(None)


def test_a_wrong_result_names_what_was_expected():
    @plugin
    class P:
        @hookimpl
        def transform_model(self, model):
            return None

    with pytest.raises(PluginError, match="plugin 'p', transform_model: expected dict, got NoneType"):
        register(active(p=P())).chain("transform_model", dict)(None, {})


def test_a_plugin_may_offer_hooks_to_others():
    class Specs:
        @hookspec("chain")
        def colour(self, run, value):
            """Change a colour."""

    @plugin
    class Owner:
        hookspecs: ClassVar = (Specs,)

    @plugin
    class Guest:
        @hookimpl
        def colour(self, value):
            return value + 1

    hooks = register(active(guest=Guest(), owner=Owner()))
    assert hooks.chain("colour", int)(None, 1) == 2
    assert hooks.kind("colour") == "chain"
    assert hooks.names()[-1] == "colour"
    with pytest.raises(PluginError, match="'colour' is not a hook"):
        register(active(guest=Guest()))


def test_a_wrapper_sees_every_call():
    seen = []

    def wrap_call(call, name, hook):
        def wrapped(*args):
            seen.append((name, hook))
            return call(*args)

        return wrapped

    hooks = register(active(a=Named(name="a"), b=Named(name="b")), wrap_call=wrap_call)
    hooks.notify("fit_start")([])
    assert seen == [("a", "fit_start"), ("b", "fit_start")]


class NotDecorated:
    pass


def test_an_entry_point_that_is_no_plugin_is_refused(monkeypatch):
    entry = EntryPoint("p", f"{__name__}:NotDecorated", "trainkit.plugins")
    found = Installed("p", "acme-p", "1.2", "", entry.value, entry)
    monkeypatch.setattr(Installed, "load", lambda self: NotDecorated)
    monkeypatch.setattr(hooks_module, "find", lambda recipe, also=(): {"p": found})
    recipe = from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": {"p": None}})
    with pytest.raises(PluginError, match=r"plugin 'p' \(acme-p 1.2\): .* is not a class decorated with @plugin"):
        load_plugins(recipe)

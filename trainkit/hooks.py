"""From a recipe's plugins to a fresh, checked plugin manager, and from there to hooks that are bound once.

Only what the recipe lists is imported and registered; what else is installed cannot change a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import attrs
import pluggy
from attrs import field

from trainkit import hookspecs
from trainkit.errors import CheckpointError, PluginError, RunError, TrainkitError, did_you_mean
from trainkit.recipe import Recipe, make_options
from trainkit.registry import Installed, find

if TYPE_CHECKING:
    from trainkit.run import Run

__all__ = ["CallWrapper", "Hooks", "Implementation", "LoadedPlugin", "declared", "load_plugins", "register"]

#: Given a call, a plugin's name and a hook's name, returns what is called instead.
CallWrapper = Callable[[Callable[..., Any], str, str], Callable[..., Any]]


@attrs.frozen(eq=False)
class LoadedPlugin:
    """One plugin of a run: its name in the recipe, its instance, and (unless a test made it) its distribution."""

    name: str
    instance: Any
    installed: Installed | None = None

    def __str__(self) -> str:
        origin = self.installed
        return f"plugin {self.name!r}" + (f" ({origin.distribution} {origin.version})" if origin else "")

    @property
    def version(self) -> str:
        """The version of its distribution."""
        return self.installed.version if self.installed else ""

    def failed(self, where: str, error: BaseException, kind: type[TrainkitError]) -> TrainkitError:
        """Return the error that names the plugin and its distribution for whatever it raised."""
        if isinstance(error, TrainkitError):  # the plugin said what is wrong itself
            return type(error)(f"{self}, {where}: {error}")
        said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")  # one paragraph
        return kind(f"{self} failed in {where}: {said}")

    def state_dict(self) -> dict[str, Any]:
        """Return the plugin's own state."""
        try:
            return dict(self.instance.state_dict())
        except Exception as error:
            raise self.failed("state_dict", error, RunError) from error

    def load_state_dict(self, state: Any) -> None:
        """Give the plugin its state back."""
        try:
            self.instance.load_state_dict(state)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self}: its state does not fit the recipe: {type(error).__name__}: {reason}"
            ) from error


@attrs.frozen(eq=False)
class Implementation:
    """One plugin's part in one hook. Calling it takes all arguments of the hook by position."""

    active: LoadedPlugin
    hook: str
    call: Callable[..., Any]
    hooks: Hooks

    def __call__(self, *args: Any) -> Any:
        """Call the plugin; what it raises comes out as an error that names plugin, distribution, version and hook."""
        try:
            return self.call(*args)
        except (Exception, SystemExit) as error:
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> TrainkitError:
        """Return the error that names plugin, distribution, version and hook for what the plugin raised."""
        return self.active.failed(self.hook, error, self.hooks.failure)

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that a hook gave, so that what it raises later names the plugin, too."""
        return attrs.evolve(self, call=function)

    def checked(self, expected: type | tuple[type, ...], *args: Any) -> Any:
        """Call the plugin and hold what it returns against the type that the hook asks for."""
        value = self(*args)
        if not isinstance(value, expected):
            raise self.wrong(value, expected)
        return value

    def wrong(self, value: object, expected: type | tuple[type, ...]) -> PluginError:
        """Return the error for a result of the wrong type."""
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        return PluginError(f"{self.active}, {self.hook}: expected {names}, got {type(value).__name__}")


@attrs.define(eq=False)
class Hooks:
    """The hooks of one run.

    pluggy registers plugins and checks their signatures; calls go straight to the implementations, in recipe order.
    """

    manager: pluggy.PluginManager
    plugins: Mapping[str, LoadedPlugin]
    failure: type[TrainkitError] = PluginError  #: what a failing plugin raises: of a build at first, of a run later
    instrument: CallWrapper | None = None  #: wraps every call, for profiling and tracing
    _order: dict[int, int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._order = {id(active.instance): n for n, active in enumerate(self.plugins.values())}

    def __contains__(self, hook: str) -> bool:
        return bool(self.implementations(hook))

    def names(self) -> list[str]:
        """Return the names of all hooks, in the order of the lifecycle, those of plugins last."""
        own = [name for phase in hookspecs.PHASES for name in vars(phase) if not name.startswith("_")]
        return own + sorted(name for name in vars(self.manager.hook) if not name.startswith("_") and name not in own)

    def kind(self, hook: str) -> hookspecs.Kind:
        """Return the kind of a hook; one without a kind, from a plain pluggy specification, is a list."""
        spec = getattr(self.manager.hook, hook).spec
        return getattr(spec.function, "trainkit_kind", "list") if spec else "list"

    def order(self) -> list[tuple[str, str, list[str]]]:
        """Return each hook that a plugin implements, its kind, and the names of its plugins in call order."""
        called = [(hook, [impl.active.name for impl in self.implementations(hook)]) for hook in self.names()]
        return [(hook, self.kind(hook), plugins) for hook, plugins in called if plugins]

    def implementations(self, hook: str) -> list[Implementation]:
        """Return who implements a hook, in the order in which they are called."""
        caller = getattr(self.manager.hook, hook)
        arguments = caller.spec.argnames
        found = []
        for impl in caller.get_hookimpls():
            active = self.plugins[impl.plugin_name]
            call = _positional(impl.function, list(impl.argnames), list(arguments))
            if self.instrument is not None:
                call = self.instrument(call, active.name, hook)
            found.append(Implementation(active, hook, call, self))
        return sorted(found, key=lambda i: self._order[id(i.active.instance)])

    def named(self, hook: str) -> str:
        """Return who implements a hook, for a message."""
        return f"{' and '.join(str(i.active) for i in self.implementations(hook))}, {hook}"

    def notify(self, hook: str, *, reverse: bool = False) -> Callable[..., None] | None:
        """Return one function that calls every implementation, or None where there is none to call."""
        found = tuple(reversed(self.implementations(hook)) if reverse else self.implementations(hook))
        if not found:
            return None
        calls = [impl.call for impl in found]

        def fire(*args: Any) -> None:
            called = 0
            try:  # one for all: a step passes through here several times
                for called, call in enumerate(calls):  # noqa: B007 - names the one that fails
                    call(*args)
            except (Exception, SystemExit) as error:
                raise found[called].failed(error) from error

        return fire

    def chain(self, hook: str, returns: type) -> Callable[[Run, Any], Any] | None:
        """Return one function that passes a value through every implementation, or None where there is none."""
        found = tuple(self.implementations(hook))
        if not found:
            return None

        def fire(run: Run, value: Any) -> Any:
            for impl in found:
                value = impl.checked(returns, run, value)
            return value

        return fire

    def one(self, hook: str, returns: type | tuple[type, ...]) -> Callable[..., Any] | None:
        """Return the only implementation of a hook, or None where there is none.

        Raises:
            PluginError: two plugins implement it.
        """
        found = self.implementations(hook)
        if len(found) > 1:
            names = " and ".join(str(i.active) for i in found)
            raise PluginError(
                f"hook {hook!r} takes one provider, and {names} both provide it; "
                f"drop one: `{found[-1].active.name}: false`"
            )
        if not found:
            return None
        return partial(found[0].checked, returns)

    def required(self, hook: str, returns: type | tuple[type, ...]) -> Callable[..., Any]:
        """Return the only implementation of a hook.

        Raises:
            PluginError: no plugin implements it, or two do.
        """
        fire = self.one(hook, returns)
        if fire is None:
            raise PluginError(
                f"no plugin of the recipe provides {hook!r}; list one that does "
                "(`trainkit plugins list` shows what is installed)"
            )
        return fire

    def collect(self, hook: str, returns: type | tuple[type, ...], *args: Any) -> list[tuple[Implementation, Any]]:
        """Call every implementation and return their results, without None."""
        results = []
        for impl in self.implementations(hook):
            value = impl(*args)
            if value is not None and not isinstance(value, returns):
                raise impl.wrong(value, returns)
            results += [(impl, value)] if value is not None else []
        return results


def _positional(function: Callable[..., Any], wanted: list[str], offered: list[str]) -> Callable[..., Any]:
    """Adapt an implementation that takes some of a hook's arguments to one that takes all of them by position."""
    if wanted == offered:
        return function
    picked = [offered.index(name) for name in wanted]
    if not picked:
        return lambda *args: function()
    pick = itemgetter(*picked)
    if len(picked) == 1:  # an itemgetter of one returns no tuple
        return lambda *args: function(pick(args))
    return lambda *args: function(*pick(args))


def load_plugins(recipe: Recipe, instrument: CallWrapper | None = None) -> Hooks:
    """Import, construct, order-check and register the plugins that a recipe lists.

    Raises:
        PluginError: one is missing, broken, misplaced, in conflict, or implements a hook that does not exist.
        RecipeError: an option is unknown, has the wrong type or fails its validator.
    """
    actives = []
    for name, found in find(recipe).items():
        cls = load_class(found)
        try:
            actives.append(LoadedPlugin(name, make_options(recipe, name, cls), found))
        except TrainkitError:
            raise
        except Exception as error:
            raise LoadedPlugin(name, None, found).failed("its construction", error, PluginError) from error
    return register(actives, recipe.where, instrument)


def load_class(found: Installed) -> type:
    """Import a plugin's class.

    Raises:
        PluginError: it cannot be imported, or is no plugin.
    """
    cls = found.load()
    if not (inspect.isclass(cls) and attrs.has(cls)):
        raise PluginError(
            f"plugin {found.name!r} ({found.distribution} {found.version}): {found.value} is not a class "
            "decorated with @plugin"
        )
    return cls


def register(actives: Iterable[LoadedPlugin], where: str = "", instrument: CallWrapper | None = None) -> Hooks:
    """Check the plugins against each other and register them with a fresh manager, in recipe order."""
    plugins = {active.name: active for active in actives}
    manager = pluggy.PluginManager("trainkit")
    for phase in hookspecs.PHASES:
        manager.add_hookspecs(phase)
    for active in plugins.values():
        for spec in declared(type(active.instance), "hookspecs"):
            manager.add_hookspecs(spec)
    _check_order(plugins, where)
    _check_exclusive(plugins, where)
    # pluggy calls the last registered first; registering in reverse makes its own order the recipe's order, too.
    for active in reversed(plugins.values()):
        try:
            manager.register(active.instance, active.name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{active}: {error}") from error
    hooks = Hooks(manager, plugins, instrument=instrument)
    _check_implementations(hooks)
    return hooks


def declared(cls: type, constraint: str) -> tuple[Any, ...]:
    """Return what a plugin's class declares as ``after``, ``before``, ...; an option of that name declares nothing."""
    return () if constraint in attrs.fields_dict(cls) else tuple(getattr(cls, constraint, ()))


def _check_order(plugins: Mapping[str, LoadedPlugin], where: str) -> None:
    position = {name: n for n, name in enumerate(plugins)}
    for name, active in plugins.items():
        for earlier in declared(type(active.instance), "after"):
            if position.get(earlier, -1) > position[name]:
                raise PluginError(
                    f"{where}: {active} must come after {earlier!r}: move the line `{name}:` below `{earlier}:`"
                )
        for later in declared(type(active.instance), "before"):
            if position.get(later, len(plugins)) < position[name]:
                raise PluginError(
                    f"{where}: {active} must come before {later!r}: move the line `{name}:` above `{later}:`"
                )


def _check_exclusive(plugins: Mapping[str, LoadedPlugin], where: str) -> None:
    holders: dict[str, LoadedPlugin] = {}
    for active in plugins.values():
        for other in declared(type(active.instance), "conflicts"):
            if other in plugins:
                raise PluginError(f"{where}: {active} cannot run beside {plugins[other]}; drop one: `{other}: false`")
        for slot in declared(type(active.instance), "claims"):
            if slot in holders:
                raise PluginError(
                    f"{where}: {holders[slot]} and {active} both claim {slot!r}; drop one: `{active.name}: false`"
                )
            holders[slot] = active


def _check_implementations(hooks: Hooks) -> None:
    known = hooks.names()
    try:
        hooks.manager.check_pending()
    except pluggy.PluginValidationError as error:
        for name in known:
            caller = getattr(hooks.manager.hook, name)
            for impl in caller.get_hookimpls():
                if not caller.has_spec():
                    near = did_you_mean(name, [k for k in known if k != name])
                    raise PluginError(f"{hooks.plugins[impl.plugin_name]}: {name!r} is not a hook{near}") from error
        raise PluginError(str(error)) from error
    for active in hooks.plugins.values():
        for name in known:
            method = vars(type(active.instance)).get(name)
            if inspect.isfunction(method) and not hasattr(method, "trainkit_impl"):
                raise PluginError(f"{active}: {name!r} is a hook's name; mark the method with @hookimpl, or rename it")
    for name in known:
        for impl in getattr(hooks.manager.hook, name).get_hookimpls():
            if impl.tryfirst or impl.trylast or impl.wrapper or impl.hookwrapper:
                raise PluginError(
                    f"{hooks.plugins[impl.plugin_name]}, {name}: hookimpl takes no options; order is the recipe's order"
                )
        if hooks.kind(name) == "one":
            hooks.one(name, object)

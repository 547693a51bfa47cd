"""From a recipe's plugins to a fresh, checked plugin manager, and from there to hooks that are bound once.

Only what the recipe lists is imported and registered; what else is installed cannot change a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import pluggy
from attrs import field

from trainkit import hookspecs
from trainkit.errors import PluginError, TrainkitError, blame, did_you_mean
from trainkit.local import local_classes
from trainkit.plugin import declared
from trainkit.recipe import Recipe, make_options
from trainkit.registry import Installed, base_name, find, providers

__all__ = ["CallWrapper", "Hooks", "Implementation", "LoadedPlugin", "load_plugins", "register"]

#: Given a call, a plugin's name and a hook's name, returns what is called instead.
CallWrapper = Callable[[Callable[..., Any], str, str], Callable[..., Any]]


@attrs.frozen(eq=False)
class LoadedPlugin:
    """One plugin of a run: its name in the recipe, its instance, and (unless a test made it) its distribution."""

    name: str
    instance: Any
    installed: Installed | None = None
    made: list[tuple[str, Any]] = field(init=False, factory=list)  #: hooks and what they returned, for :func:`blame`

    def __str__(self) -> str:
        origin = self.installed
        return f"plugin {self.name!r}" + (f" ({origin.distribution} {origin.version})" if origin else "")

    @property
    def version(self) -> str:
        """The version of its distribution."""
        return self.installed.version if self.installed else ""

    @property
    def hooks(self) -> list[str]:
        """The hooks that it implements."""
        return [name for name, value in inspect.getmembers(type(self.instance)) if hasattr(value, "trainkit_impl")]


@attrs.frozen(eq=False)
class Implementation:
    """One plugin's part in one hook. Calling it takes all arguments of the hook by position."""

    plugin: LoadedPlugin
    hook: str
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call the plugin."""
        return self.call(*args)

    def checked(self, returns: type | tuple[type, ...], *args: Any) -> Any:
        """Call the plugin and hold what it returns against the type that the hook asks for."""
        value = self.call(*args)
        if not isinstance(value, returns):
            raise self.wrong(value, returns)
        return value

    def make(self, returns: type | tuple[type, ...], *args: Any) -> Any:
        """Call the plugin as :meth:`checked` does, and remember that it made what it returns."""
        value = self.checked(returns, *args)
        if value is not None and not any(value is arg for arg in args):
            self.plugin.made.append((self.hook, value))
        return value

    def wrong(self, value: object, returns: type | tuple[type, ...]) -> PluginError:
        """Return the error for a result of the wrong type."""
        types = returns if isinstance(returns, tuple) else (returns,)
        names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        return PluginError(f"{self.plugin}, {self.hook}: expected {names}, got {type(value).__name__}")


@attrs.define(eq=False)
class Hooks:
    """The hooks of one run.

    pluggy registers plugins and checks their signatures; calls go straight to the implementations, in recipe order. A
    hook that nobody implements is bound to a function that does nothing, or to its default.
    """

    manager: pluggy.PluginManager
    plugins: Mapping[str, LoadedPlugin]
    wrap_call: CallWrapper | None = None  #: wraps every call, for profiling and tracing
    absent: frozenset[str] = frozenset()  #: plugins that are called in another process of the run, and not in this one
    _position: dict[int, int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._position = {id(plugin.instance): n for n, plugin in enumerate(self.plugins.values())}

    def names(self) -> list[str]:
        """Return the names of all hooks, in the order of the lifecycle, those of plugins last."""
        own = [name for phase in hookspecs.PHASES for name in vars(phase) if not name.startswith("_")]
        return own + sorted(name for name in vars(self.manager.hook) if not name.startswith("_") and name not in own)

    def kind(self, hook: str) -> hookspecs.Kind:
        """Return the kind of a hook; one without a kind, from a plain pluggy specification, is a list."""
        spec = getattr(self.manager.hook, hook).spec
        return getattr(spec.function, "trainkit_kind", "list") if spec else "list"

    def order(self) -> list[tuple[str, str, list[str]]]:
        """Return each hook that someone implements, its kind, and the plugins that are called, in order."""
        callers = {hook: [impl.plugin.name for impl in self.implementations(hook)] for hook in self.names()}
        return [(hook, self.kind(hook), plugins) for hook, plugins in callers.items() if plugins]

    def implementations(self, hook: str) -> list[Implementation]:
        """Return who implements a hook, in the order in which they are called."""
        caller = getattr(self.manager.hook, hook)
        found = []
        for impl in caller.get_hookimpls():
            plugin = self.plugins[impl.plugin_name]
            if plugin.name in self.absent:
                continue
            call = _positional(impl.function, impl.argnames, caller.spec.argnames)
            if self.wrap_call is not None:
                call = self.wrap_call(call, plugin.name, hook)
            found.append(Implementation(plugin, hook, call))
        return sorted(found, key=lambda impl: self._position[id(impl.plugin.instance)])

    def named(self, hook: str) -> str:
        """Return who implements a hook, for a message."""
        return f"{' and '.join(str(impl.plugin) for impl in self.implementations(hook))}, {hook}"

    def notify(self, hook: str) -> Callable[..., None]:
        """Return one function that calls every implementation."""
        calls = [impl.call for impl in self.implementations(hook)]

        def fire(*args: Any) -> None:
            for call in calls:
                call(*args)

        return fire

    def chain(self, hook: str, returns: type) -> Callable[[Any, Any], Any]:
        """Return one function that passes a value through every implementation; without any it returns the value."""
        found = self.implementations(hook)

        def fire(run: Any, value: Any) -> Any:
            for impl in found:
                value = impl.checked(returns, run, value)
            return value

        return fire

    def one(
        self, hook: str, returns: type | tuple[type, ...] = object, default: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """Return the only implementation of a hook, or its default where there is none.

        Raises:
            PluginError: two plugins implement it, or none does and there is no default.
        """
        impl = self.only(hook)
        if impl is not None:
            return lambda *args: impl.checked(returns, *args)
        if default is None:
            able = ", ".join(providers(hook))
            raise PluginError(
                f"no plugin of the recipe provides {hook!r}; list one that does: "
                + (f"installed are {able}" if able else "`trainkit plugins list` shows what is installed")
            )
        return default

    def only(self, hook: str) -> Implementation | None:
        """Return the only implementation of a hook, or None.

        Raises:
            PluginError: two plugins implement it.
        """
        found = self.implementations(hook)
        if len(found) > 1:
            names = " and ".join(str(impl.plugin) for impl in found)
            raise PluginError(
                f"hook {hook!r} takes one provider, and {names} both provide it; "
                f"drop one: `{found[-1].plugin.name}: false`"
            )
        return found[0] if found else None

    def collect(self, hook: str, returns: type | tuple[type, ...], *args: Any) -> list[tuple[Implementation, Any]]:
        """Call every implementation and return their results, without None."""
        results = []
        for impl in self.implementations(hook):
            value = impl(*args)
            if value is None:
                continue
            if not isinstance(value, returns):
                raise impl.wrong(value, returns)
            impl.plugin.made.append((hook, value))
            results.append((impl, value))
        return results

    @contextmanager
    def blaming(self, kind: type[TrainkitError]) -> Iterator[None]:
        """Name the plugin, distribution, version and hook that an exception within the block came through.

        Args:
            kind: what is raised in place of an exception that is not trainkit's own.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            if named := self.explain(error, kind):
                raise named from error
            raise

    def explain(self, error: BaseException, kind: type[TrainkitError]) -> TrainkitError | None:
        """Return the error that names the plugins that `error` came through, or None where it came through none."""
        through = blame(error, self.plugins.values())
        if not through:
            return None
        inner, outer = through[0], through[-1]
        called = f", called by {outer}" if outer.plugin is not inner.plugin else ""
        if isinstance(error, TrainkitError) and str(error).startswith(tuple(map(str, self.plugins.values()))):
            return None  # the core itself found what is wrong, and named the plugin
        if isinstance(error, TrainkitError):  # the plugin said itself what is wrong
            return type(error)(f"{inner}{called}: {error}")
        said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")  # one paragraph
        return kind(f"{inner.plugin} failed in {inner.where}{called}: {said}")


def _positional(function: Callable[..., Any], wanted: tuple[str, ...], offered: tuple[str, ...]) -> Callable[..., Any]:
    """Adapt an implementation that takes some of a hook's arguments to one that takes all of them by position."""
    if wanted == offered:
        return function
    positions = [offered.index(name) for name in wanted]
    return lambda *args: function(*[args[position] for position in positions])


def load_plugins(recipe: Recipe, wrap_call: CallWrapper | None = None, given: Mapping[str, Any] | None = None) -> Hooks:
    """Import, construct, order-check and register the plugins that a recipe lists.

    Args:
        recipe: the recipe.
        wrap_call: wraps every hook call.
        given: plugins that are there already, by the names under which the recipe lists them.

    Raises:
        PluginError: one is missing, broken, misplaced, in conflict, or implements a hook that does not exist.
        RecipeError: an option is unknown, has the wrong type or fails its validator.
    """
    plugins = []
    given = given or {}
    local = local_classes(recipe)
    packaged = {
        name: value for name, value in recipe.plugins.items() if name not in given and base_name(name) not in local
    }
    installed = find(attrs.evolve(recipe, plugins=packaged), also=local)
    for name in recipe.plugins:
        if name in given:
            plugins.append(LoadedPlugin(name, given[name]))
            continue
        found = installed.get(name)
        cls = load_class(found) if found else local[base_name(name)]
        try:
            plugins.append(LoadedPlugin(name, make_options(recipe, name, cls), found))
        except TrainkitError:
            raise
        except BaseException as error:
            if type(error) is KeyboardInterrupt:  # the user's, and no class of a plugin's own
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(f"{LoadedPlugin(name, None, found)} failed in its construction: {said}") from error
    return register(plugins, recipe.where, wrap_call)


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


def register(plugins: Iterable[LoadedPlugin], where: str = "", wrap_call: CallWrapper | None = None) -> Hooks:
    """Check the plugins against each other and register them with a fresh manager, in recipe order."""
    by_name = {plugin.name: plugin for plugin in plugins}
    manager = pluggy.PluginManager("trainkit")
    for phase in hookspecs.PHASES:
        manager.add_hookspecs(phase)
    for plugin in by_name.values():
        for spec in declared(type(plugin.instance), "hookspecs"):
            manager.add_hookspecs(spec)
    _check_order(by_name, where)
    _check_exclusive(by_name, where)
    hooks = Hooks(manager, by_name, wrap_call)
    for plugin in by_name.values():
        check_methods(plugin, hooks)
    # pluggy calls the last registered first; registering in reverse makes its own order the recipe's order, too.
    for plugin in reversed(by_name.values()):
        try:
            manager.register(plugin.instance, plugin.name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{plugin}: {' '.join(str(error).split())}") from error
    for name in hooks.names():
        if hooks.kind(name) == "one":
            hooks.only(name)
    return hooks


def _check_order(plugins: Mapping[str, LoadedPlugin], where: str) -> None:
    names = list(plugins)
    for position, (name, plugin) in enumerate(plugins.items()):
        for earlier in declared(type(plugin.instance), "after"):
            for other in names[position + 1 :]:
                if base_name(other) == earlier:
                    raise PluginError(
                        f"{where}: {plugin} must come after {other!r}: move the line `{name}:` below `{other}:`"
                    )
        for later in declared(type(plugin.instance), "before"):
            for other in names[:position]:
                if base_name(other) == later:
                    raise PluginError(
                        f"{where}: {plugin} must come before {other!r}: move the line `{name}:` above `{other}:`"
                    )


def _check_exclusive(plugins: Mapping[str, LoadedPlugin], where: str) -> None:
    holders: dict[str, LoadedPlugin] = {}
    for plugin in plugins.values():
        for conflict in declared(type(plugin.instance), "conflicts"):
            for name, other in plugins.items():
                if base_name(name) == conflict and other is not plugin:
                    raise PluginError(f"{where}: {plugin} cannot run beside {other}; drop one: `{name}: false`")
        for slot in declared(type(plugin.instance), "claims"):
            if slot in holders:
                raise PluginError(
                    f"{where}: {holders[slot]} and {plugin} both claim {slot!r}; drop one: `{plugin.name}: false`"
                )
            holders[slot] = plugin


def check_methods(plugin: LoadedPlugin, hooks: Hooks) -> None:
    """Hold the methods of a plugin against the specifications of the hooks.

    Raises:
        PluginError: a hook does not exist, takes other arguments, is not marked, or is given options of pluggy's; or
            the plugin has only one of ``state_dict`` and ``load_state_dict``.
    """
    cls = type(plugin.instance)
    known = hooks.names()
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        options = getattr(method, "trainkit_impl", None)
        if options is None:
            if name in known:
                raise PluginError(f"{plugin}: {name!r} is a hook's name; mark the method with @hookimpl, or rename it")
            continue
        if name not in known:
            raise PluginError(f"{plugin}: {name!r} is not a hook{did_you_mean(name, known)}")
        if any(options[key] for key in ("tryfirst", "trylast", "wrapper", "hookwrapper")):
            raise PluginError(f"{plugin}, {name}: hookimpl takes no options; order is the recipe's order")
        offered = getattr(hooks.manager.hook, name).spec.argnames
        for argument in list(inspect.signature(method).parameters)[1:]:
            if argument not in offered:
                raise PluginError(
                    f"{plugin}, {name}: the hook has no argument {argument!r}{did_you_mean(argument, offered)}; "
                    f"it offers {', '.join(offered)}"
                )
    if hasattr(cls, "state_dict") != hasattr(cls, "load_state_dict"):
        has, lacks = ("state_dict", "load_state_dict")[:: 1 if hasattr(cls, "state_dict") else -1]
        raise PluginError(f"{plugin} has {has} and no {lacks}: a checkpoint needs both; add {lacks}, or drop {has}")

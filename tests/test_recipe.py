import os
import string
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Literal

import attrs
import pytest
import yaml
from attrs import field
from attrs.validators import gt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainkit.errors import RecipeError
from trainkit.plugin import plugin
from trainkit.recipe import from_dict, load_recipe, make_options

MINIMAL = "name: r\nepochs: 2\nbatch_size: 4\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_extends_merges_later_keys_win_and_plugins_keep_their_place(write):
    write(MINIMAL + "plugins:\n  a: {x: 1, y: 2}\n  b:\n  c: {z: 3}\n", "_base.yaml")
    path = write("extends: _base.yaml\nname: child\nepochs: 5\nplugins:\n  d:\n  a: {y: 7}\n  b: false\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.epochs, recipe.batch_size) == ("child", 5, 4)
    assert recipe.plugins == {"a": {"x": 1, "y": 7}, "c": {"z": 3}, "d": {}}
    assert list(recipe.plugins) == ["d", "a", "c"]


@pytest.mark.parametrize(
    ("child", "order"),
    [
        ("{a: , new: , b: }", "a new b c"),
        ("{new: , other: , b: }", "a new other b c"),
        ("{b: , new: }", "a b c new"),
        ("{new: }", "a b c new"),
        ("{c: , new: , a: }", "new a b c"),  # an inherited plugin keeps its place, whatever the child's order is
        ("{one: , a: , two: , c: , three: }", "one a b two c three"),
        ("{new: , b: false}", "a new c"),  # a plugin that the child drops still shows the place
        ("{a@second: , b: }", "a a@second b c"),
        ("{new: false, b: }", "a b c"),
    ],
)
def test_a_plugin_that_a_child_adds_goes_before_the_next_inherited_one_that_it_lists(write, child, order):
    write(MINIMAL + "plugins: {a: {x: 1}, b: , c: }\n", "_base.yaml")
    recipe = load_recipe(write(f"extends: _base.yaml\nplugins: {child}\n"))
    assert " ".join(recipe.plugins) == order
    assert recipe.plugins["a"] == {"x": 1}


@given(
    st.lists(st.sampled_from("abcdef"), unique=True),
    st.lists(st.sampled_from("abcdefuvwxyz"), unique=True),
)
def test_added_plugins_keep_their_order_and_precede_what_follows_them(tmp_path_factory, old, listed):
    folder = tmp_path_factory.getbasetemp()
    (folder / "order_base.yaml").write_text(MINIMAL + yaml.dump({"plugins": dict.fromkeys(old)}, sort_keys=False))
    child = yaml.dump({"extends": "order_base.yaml", "plugins": dict.fromkeys(listed)}, sort_keys=False)
    (folder / "order.yaml").write_text(child)
    order = list(load_recipe(folder / "order.yaml").plugins)
    added = [name for name in listed if name not in old]
    assert [name for name in order if name in old] == old
    assert sorted(order) == sorted({*old, *listed})
    for name in added:
        following = listed[listed.index(name) + 1 :]
        anchors = [other for other in following if other in old]
        if anchors:
            between = order[order.index(name) : order.index(anchors[0])]
            assert set(between) <= set(added)
            assert between == [other for other in listed if other in between]
        else:
            assert not set(order[order.index(name) :]) & set(old)


def test_a_plugin_brought_back_keeps_its_place(write):
    write(MINIMAL + "plugins: {a: , b: , c: }\n", "_base.yaml")
    write("extends: _base.yaml\nplugins: {b: false}\n", "middle.yaml")
    assert list(load_recipe(write("extends: middle.yaml\nplugins: {b: }\n")).plugins) == ["a", "b", "c"]
    assert list(load_recipe(write("extends: middle.yaml\n"), ["plugins.b.x=1"]).plugins) == ["a", "b", "c"]


@pytest.fixture
def early(tmp_path, monkeypatch):
    """Installs a plugin `early` that must precede `late` and `c`."""
    info = tmp_path / "site" / "acme_early-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-early\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[trainkit.plugins]\nearly = acme_early_module:Early\nbroken = no_such_module:X\nfunction = os.path:join\n"
    )
    (tmp_path / "site" / "acme_early_module.py").write_text(
        "from trainkit.plugin import plugin\n@plugin\nclass Early:\n    before = ('late', 'c')\n    p: float = 0.1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("acme_early_module", None)


@pytest.mark.parametrize(
    ("overrides", "order"),
    [
        (["plugins.early=true"], "a b early c d"),
        (["plugins.early.p=0.3"], "a b early c d"),
        (["plugins.early@second.p=0.3", "plugins.early="], "a b early@second early c d"),
        (["plugins.early=true", "plugins.c=false"], "a b early d"),
        (["plugins.c=false", "plugins.early=true"], "a b d early"),
        (["plugins.late@x=true", "plugins.early=true"], "a b early c d late@x"),
        (["plugins.early=false"], "a b c d"),
        (["plugins.broken=true"], "a b c d broken"),
        (["plugins.function=true"], "a b c d function"),
        (["plugins.not_installed=true"], "a b c d not_installed"),
        ({"plugins": {"early": None}}, "a b early c d"),
    ],
)
def test_a_plugin_that_an_override_adds_goes_where_its_before_allows(write, early, overrides, order):
    path = write(MINIMAL + "plugins: {a: , b: , c: , d: }\n")
    assert " ".join(load_recipe(path, overrides).plugins) == order


def test_only_a_plugin_that_an_override_adds_is_imported(write, early):
    path = write(MINIMAL + "plugins: {c: , early: }\n")
    assert list(load_recipe(path, ["plugins.early.p=0.2", "plugins.c=true", "epochs=3"]).plugins) == ["c", "early"]
    assert "acme_early_module" not in sys.modules


def test_an_override_adds_plugins_to_a_recipe_without_any(write):
    assert load_recipe(write(MINIMAL), ["plugins.a.x=1", "plugins.b=true"]).plugins == {"a": {"x": 1}, "b": {}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("plugins.a.x=1e-3", {"a": {"x": 1e-3, "y": [1]}, "b": {}}),
        ("plugins.a=false", {"b": {}}),
        ("plugins.a.y=[2, 3]", {"a": {"x": 1, "y": [2, 3]}, "b": {}}),
        ("plugins.c=true", {"a": {"x": 1, "y": [1]}, "b": {}, "c": {}}),
        ("plugins.b.k=text with = sign", {"a": {"x": 1, "y": [1]}, "b": {"k": "text with = sign"}}),
        ("plugins.a.x=${epochs}", {"a": {"x": 2, "y": [1]}, "b": {}}),
        ("plugins.a@second.p=0.5", {"a": {"x": 1, "y": [1]}, "b": {}, "a@second": {"p": 0.5}}),
        ("plugins.b.k=${plugins.a.x}", {"a": {"x": 1, "y": [1]}, "b": {"k": 1}}),
    ],
)
def test_overrides(write, override, expected):
    path = write(MINIMAL + "plugins:\n  a: {x: 1, y: [1]}\n  b:\n")
    assert load_recipe(path, [override]).plugins == expected


def test_the_resolved_recipe_reads_back_equal(write):
    write(MINIMAL + "expect: {parameters: 12, test_accuracy: 93.83}\nplugins: {a: {x: [1, 2.5]}}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nseed: 3\n"), ["max_steps=7", "plugins.b=true"])
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe


@pytest.mark.parametrize(
    "requires", ['["acme-trainkit-sam>=1.2"]', "{sam: acme-tricks>=1.2, lion: acme-tricks>=1.2}", "[]"]
)
def test_requires_is_a_list_or_a_mapping_and_reads_back_equal(write, requires):
    recipe = load_recipe(write(MINIMAL + f"requires: {requires}\n"))
    assert recipe.requires == yaml.safe_load(requires)
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe


def test_requires_of_a_child_adds_to_a_mapping_and_replaces_a_list(write):
    write(MINIMAL + "requires: {sam: a>=1}\n", "_base.yaml")
    assert load_recipe(write("extends: _base.yaml\nrequires: {lion: b}\n")).requires == {"sam": "a>=1", "lion": "b"}
    assert load_recipe(write("extends: _base.yaml\nrequires: [b]\n")).requires == ["b"]


def test_evaluation_and_batches_have_defaults(write):
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.eval_every, recipe.drop_last, recipe.mixed_sizes) == (1, False, False)
    recipe = load_recipe(write(MINIMAL + "eval_every: 5\n"), ["drop_last=true", "mixed_sizes=true"])
    assert (recipe.eval_every, recipe.drop_last, recipe.mixed_sizes) == (5, True, True)
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe


def test_one_plugin_twice(write):
    path = write(MINIMAL + "plugins: {e: {needed: 1}, e@second: {needed: 2}, a: }\n")
    recipe = load_recipe(path, ["plugins.e@second.limit=0.5", "plugins.a.x=${plugins.e@second.needed}"])
    assert list(recipe.plugins) == ["e", "e@second", "a"]
    assert recipe.plugins["a"] == {"x": 2}
    made = make_options(recipe, "e@second", Example)
    assert (made.needed, made.limit) == (2, 0.5)
    with pytest.raises(RecipeError, match=r"plugins\.e@second\.limit: 'limit' must be > 0"):
        make_options(load_recipe(path, ["plugins.e@second.limit=-1"]), "e@second", Example)
    assert list(load_recipe(path, ["plugins.e@second=false"]).plugins) == ["e", "a"]
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe


label = st.text(alphabet=string.ascii_letters + string.digits + "_-", min_size=1, max_size=8)


@given(label)
def test_every_label_can_be_overridden(tmp_path_factory, label):
    path = tmp_path_factory.getbasetemp() / "label.yaml"
    path.write_text(MINIMAL + f"plugins: {{e@{label}: {{needed: 1}}}}\n")
    assert load_recipe(path, [f"plugins.e@{label}.needed=2"]).plugins == {f"e@{label}": {"needed": 2}}


@pytest.mark.parametrize("name", ["e@", "@second", "e@a@b", "e@a b", "e@ä", "e@a.b", "@"])
def test_a_malformed_label_is_named(write, name):
    with pytest.raises(RecipeError, match=f"plugins.{name}: expected NAME or NAME@LABEL"):
        load_recipe(write(MINIMAL + f'plugins: {{"{name}": }}\n'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: r\nepochs: 2\n", "batch_size: missing"),
        (MINIMAL + "epoch: 3\n", r"epoch: unknown key; did you mean 'epochs'\?"),
        (MINIMAL + "seed: many\n", "seed: Value 'many'"),
        (MINIMAL.replace("2", "0"), "epochs: 'epochs' must be >= 1"),
        (MINIMAL.replace("r\n", "../r\n"), "name: 'name' must be letters"),
        (MINIMAL + "eval_every: 0\n", "eval_every: 'eval_every' must be >= 1"),
        (MINIMAL + "drop_last: perhaps\n", "drop_last: Value 'perhaps'"),
        (MINIMAL + "requires: 3\n", "requires: expected a list of requirements, .* or a mapping .*; got 3"),
        (MINIMAL + "requires: text\n", "requires: expected a list of requirements, .* or a mapping .*; got 'text'"),
        (MINIMAL + "requires:\n", "requires: expected a list"),
        (MINIMAL + "requires: [a, [b]]\n", "requires: expected a list"),
        (MINIMAL + "requires: {sam: [b]}\n", "requires: expected a list"),
        (
            MINIMAL + "expect: {parameters: [1]}\n",
            r"expect: expected dict\[str, int \| float\], got {'parameters': \[1\]}",
        ),
        (MINIMAL + "plugins: [a]\n", "plugins: expected a mapping"),
        (MINIMAL + "plugins: {a: 3}\n", r"plugins\.a: expected options"),
        (MINIMAL + "name: again\n", "duplicate key"),
        ("name: [", "YAML syntax"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "name: missing"),
        (MINIMAL + "description: ${oc.env:HOME}\n", "description: .*no resolvers"),
        (MINIMAL + "description: ${nothing}\n", "nothing"),
        (MINIMAL + "description: ???\n", "description"),
        (MINIMAL + "x: &a [1]\ny: *a\n", "line 5: YAML aliases"),
        (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", "line 4: YAML tag"),
        (MINIMAL + "x: " + "[" * 50 + "]" * 50, "nested deeper"),
        (MINIMAL + "extends: nothing.yaml\n", "r.yaml: extends: 'nothing.yaml' does not exist"),
        (MINIMAL + "extends: r.yaml\n", "circle"),
        (MINIMAL + "extends: ../r.yaml\n", "outside the recipe's own folder"),
        (MINIMAL + "extends: /etc/passwd\n", "outside the recipe's own folder"),
        (MINIMAL + "extends: [a, b]\n", "extends: expected the name"),
        (MINIMAL + "# " + "x" * 300_000, "larger than 256 KiB"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(write, text, said):
    path = write(text)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path)
    assert str(path.parent) in str(caught.value)


def test_a_file_that_is_not_there_suggests_its_neighbour(write):
    path = write(MINIMAL, "dense_shared.yaml")
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean 'dense_shared.yaml'\?"):
        load_recipe(path.with_name("dense_share.yaml"))


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("override", ["epochs", "=3", "epochs=[", "a b=3", "epochs=!!x 3", "epochs=3\nseed: 4"])
def test_a_wrong_override_is_quoted(write, override):
    with pytest.raises(RecipeError, match="override"):
        load_recipe(write(MINIMAL), [override])


@plugin
class Example:
    """An example."""

    limit: float = field(default=0.1, validator=gt(0))
    mode: Literal["value", "norm"] = "value"
    sizes: tuple[int, int] = (1, 2)
    root: Path | None = None
    needed: int
    state: object = field(init=False, default=None)


def test_options_are_converted_to_the_fields_types(write):
    recipe = load_recipe(write(MINIMAL + "plugins: {e: {limit: 1, sizes: [3, 4], root: a/b, needed: 5}}\n"))
    made = make_options(recipe, "e", Example)
    assert (made.limit, made.sizes, made.root, made.needed) == (1.0, (3, 4), Path("a/b"), 5)
    assert isinstance(made.limit, float)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{}", "plugins.e.needed: missing"),
        ("{needed: 1, limt: 3}", r"plugins.e.limt: unknown key; did you mean 'limit'\?"),
        ("{needed: 1, limit: -1}", "plugins.e.limit: 'limit' must be > 0: -1"),
        ("{needed: 1.5}", "plugins.e.needed: Value '1.5'"),
        ("{needed: 1, mode: x}", "plugins.e.mode: .*expected one of"),
        ("{needed: 1, sizes: [1]}", "plugins.e.sizes"),
        ("{needed: 1, state: 3}", "plugins.e.state: unknown key"),
        ("{needed: null}", "plugins.e.needed"),
    ],
)
def test_a_wrong_option_names_its_full_key(write, options, said):
    recipe = load_recipe(write(MINIMAL + f"plugins: {{e: {options}}}\n"))
    with pytest.raises(RecipeError, match=said):
        make_options(recipe, "e", Example)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@attrs.define
class Inner:
    x: int = field(default=1, validator=gt(0))
    y: list[int] = field(factory=list)


@plugin
class Wide:
    """Options of all types."""

    colour: Colour = Colour.RED
    inner: Inner = field(factory=Inner)
    inners: dict[str, Inner] = field(factory=dict)
    sizes: tuple[int | float, ...] = ()
    named: dict[str, int | str] = field(factory=dict)
    nested: list[list[int] | int] = field(factory=list)
    either: int | tuple[int, int] | Literal["auto"] = "auto"


@pytest.mark.parametrize(
    ("key", "given", "made"),
    [
        ("colour", "BLUE", Colour.BLUE),
        ("inner", "{x: 3, y: [4]}", Inner(3, [4])),
        ("inners", "{a: {x: 2}}", {"a": Inner(2)}),
        ("sizes", "[1, 2.5]", (1, 2.5)),
        ("named", "{a: 1, b: two}", {"a": 1, "b": "two"}),
        ("nested", "[1, [2, 3]]", [1, [2, 3]]),
        ("either", "[1, 2]", (1, 2)),
        ("either", "auto", "auto"),
    ],
)
def test_an_option_arrives_as_its_type(write, key, given, made):
    recipe = load_recipe(write(MINIMAL + f"plugins: {{w: {{{key}: {given}}}}}\n"))
    assert getattr(make_options(recipe, "w", Wide), key) == made


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("colour", "GREEN", r"expected one of \[RED, BLUE\]"),
        ("inner", "{x: text}", r"w\.inner\.x: Value 'text'"),
        ("inner", "{x: 0}", "w.inner: 'x' must be > 0"),
        ("inner", "{z: 0}", "Key 'z' not in 'Inner'"),
        ("sizes", "[[1]]", r"expected tuple\[int \| float, ...\], got \[\[1\]\]"),
        ("sizes", "[x]", "Value 'x'"),
        ("named", "{a: [1]}", "got {'a': \\[1\\]}"),
        ("nested", "[[x]]", r"got \[\['x'\]\]"),
        ("either", "other", "Value 'other'"),
    ],
)
def test_an_option_of_another_type_is_refused(write, key, given, said):
    recipe = load_recipe(write(MINIMAL + f"plugins: {{w: {{{key}: {given}}}}}\n"))
    with pytest.raises(RecipeError, match=f"plugins.w.{key}.*{said}" if not said.startswith("w") else said):
        make_options(recipe, "w", Wide)


def test_an_element_of_a_tuple_is_quoted(write):
    recipe = load_recipe(write(MINIMAL + "plugins: {e: {needed: 1, sizes: [x, 2]}}\n"))
    with pytest.raises(RecipeError, match=r"plugins.e.sizes.*Value \['x', 2\] of type 'list' could not be converted"):
        make_options(recipe, "e", Example)


texts = st.text(alphabet=string.printable + "é\x1b\x00", max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates()
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
keys = st.sampled_from(
    ["name", "epochs", "batch_size", "seed", "device", "expect", "plugins", "requires", "extends", "eval_every"]
)


def only_trainkit_errors(action):
    try:
        return action()
    except RecipeError as error:
        return None if error.exit_code == 2 and str(error) else pytest.fail("an error without a message")


@pytest.mark.slow
@given(st.dictionaries(keys | texts, trees, max_size=6))
def test_any_tree_is_a_recipe_or_one_clear_error(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.dump(tree, allow_unicode=True))
    recipe = only_trainkit_errors(lambda: load_recipe(path))
    if recipe is not None:
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe


@given(
    st.binary(max_size=200)
    | texts.map(str.encode)
    | st.text(alphabet="{}[]:&*!?-|>'\"%@`#,\n ab${}", max_size=60).map(str.encode)
)
@example(b"a: " + b"{a: " * 19)
def test_any_bytes_are_a_recipe_or_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(MINIMAL.encode() + data)
    only_trainkit_errors(lambda: load_recipe(path))


@given(st.lists(texts | st.tuples(keys | st.just("plugins.e.limit"), texts).map("=".join), max_size=3))
def test_any_override_is_taken_or_one_clear_error(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "base.yaml"
    path.write_text(MINIMAL + "plugins: {e: {needed: 1}}\n")
    recipe = only_trainkit_errors(lambda: load_recipe(path, overrides))
    if recipe is not None and "e" in recipe.plugins:
        only_trainkit_errors(lambda: make_options(recipe, "e", Example))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5\n", "expected a mapping"),
        ("some text\n", "expected a mapping"),
        ("null\n", "expected a mapping"),
        (MINIMAL + "expect: {parameters: []}\n", "expect"),
        (MINIMAL + "expect: {parameters: 1" + "0" * 400 + "}\n", "expect.parameters: an integer beyond"),
        (MINIMAL + "seed: 1" + "0" * 6000 + "\n", "integer beyond 9223372036854775807"),
        (MINIMAL + "plugins: {e: {needed: 9223372036854775808}}\n", "plugins.e.needed: an integer beyond"),
        (MINIMAL + "expect: {x: 1e999999}\nseed: 1.0e+400\n", "seed"),
        (MINIMAL + "description: a\\\\${name}\n", "description: .*no resolvers"),
        (MINIMAL + "description: $${source}\nsource: '{name}'\n", "description: .*is no reference"),
        (MINIMAL + "plugins: {e: {needed: '$${source}'}}\nsource: '{name}'\n", "plugins.e.needed: .*is no reference"),
        (MINIMAL + "plugins: {e: {'${name}': 1}}\n", "keys must be text, without references"),
        (MINIMAL + "description: ${source}\nsource: ${description}\n", "references go in a circle"),
        (MINIMAL + "description: ${plugins}\nplugins: {a: {x: '${plugins.a}'}}\n", "references go in a circle"),
        (MINIMAL + "plugins: {a: {x: '${.x}'}}\n", "references go in a circle"),
    ],
)
def test_what_no_recipe_can_mean_is_named(write, text, said):
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(write(text))
    assert len(str(caught.value)) < 1000


def test_references_that_double_are_refused_before_they_are_resolved(write):
    chain = "".join(f"  x{n}: '${{plugins.a.x{n - 1}}}${{plugins.a.x{n - 1}}}'\n" for n in range(1, 19))
    text = MINIMAL + "plugins:\n a:\n  x0: '" + "x" * 500 + "'\n" + chain
    assert len(text) < 3000
    start = time.perf_counter()
    for bomb in (text, text.replace("x" * 500, ""), MINIMAL + "plugins:\n a: {x: '" + "${name}" * 20_000 + "'}\n"):
        with pytest.raises(RecipeError, match="larger than 512 KiB once its references are resolved"):
            load_recipe(write(bomb))
    assert time.perf_counter() - start < 10
    with pytest.raises(RecipeError, match="more than 20 others"):
        load_recipe(write(MINIMAL + "".join(f"x{n}: ${{x{n + 1}}}\n" for n in range(2000))))
    copies = "".join(f"  x{n}: ['${{plugins.a.x{n - 1}}}', '${{plugins.a.x{n - 1}}}']\n" for n in range(1, 19))
    with pytest.raises(RecipeError, match="once its references are resolved"):
        load_recipe(write(MINIMAL + "plugins:\n a:\n  x0: [1]\n" + copies))


def test_python_data_may_hold_no_resolver_either(write):
    with pytest.raises(RecipeError, match="no resolvers"):
        load_recipe(write(MINIMAL), {"description": "${oc.env:HOME}"})
    with pytest.raises(RecipeError, match="no resolvers"):
        from_dict({"name": "r", "epochs": 1, "batch_size": 1, "description": "${oc.env:HOME}"})


tricky = st.text(
    alphabet="${}\\.abename_@-+eE019:#'\" \n\t\u202e\u00e9\x85\x1b\ufeff\U0001f600", max_size=12
) | st.sampled_from(
    [
        "${name}",
        "$${name}",
        "\\${name}",
        "1e3",
        "1_0",
        "on",
        "null",
        "2020-01-01",
        ".5",
        "+.inf",
        "0x1f",
        "1:30",
        "<<",
        "=",
    ]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | tricky,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tricky, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(deadline=None)
@given(tricky, tricky, st.dictionaries(st.sampled_from(["a", "b", "a@1"]), st.dictionaries(tricky, plain, max_size=3)))
@example("$${source}", "{name}", {})
@example("\\${name}", "", {"a": {"x": "\\${name}"}})
@example("1e3", "1_0", {"a": {"x": "1e3", "y": [".5", "+1", "on"]}})
def test_whatever_loads_is_written_and_reads_back_equal(tmp_path_factory, description, source, plugins):
    folder = tmp_path_factory.getbasetemp()
    tree = {"name": "r", "epochs": 1, "batch_size": 1, "description": description, "source": source, "plugins": plugins}
    try:
        recipe = from_dict(tree)
    except RecipeError:
        return
    text = recipe.to_yaml()
    assert text.replace("\n", "").isprintable()
    (folder / "back.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(folder / "back.yaml") == recipe


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/full", "folder", "loop"])
def test_only_regular_files_are_read(write, tmp_path, kind):
    path = tmp_path / "odd.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("odd.yaml" if kind == "loop" else kind)
    for start in (path, write(MINIMAL + "extends: odd.yaml\n")):
        with pytest.raises(RecipeError, match="odd.yaml.* (cannot be read|lies outside)"):
            load_recipe(start)
    with pytest.raises(RecipeError, match="not the path|cannot be read"):
        load_recipe("a\0b.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=010", "epochs=010', line 1: 010: YAML would read another number"),
        ("description=1:30", "YAML would read another number there"),
        ("description=no", "description: expected a text, got false"),
        ("plugins.e.name=/data/my #1", "reads what follows ' #' as a comment; write plugins.e.name='\"/data/my #1\"'"),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_was_meant_is_refused(write, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(write(MINIMAL + "plugins: {e: {needed: 1}}\n"), [override])


def test_an_override_says_what_it_means(write):
    path = write(MINIMAL + "expect: {test_accuracy: 90}\nplugins: {sgd: {lr: 0.5}}\n")
    assert load_recipe(path, ["plugins.sgd=true"]).plugins == {"sgd": {"lr": 0.5}}
    assert load_recipe(path, ["plugins.sgd={}"]).plugins == {"sgd": {"lr": 0.5}}
    assert load_recipe(path, ["expect={}"]).expect == {}
    assert load_recipe(path, ['description="1:30"']).description == "1:30"
    with pytest.raises(RecipeError, match="'lr=0.1': no key of a recipe; did you mean plugins.sgd.lr?"):
        load_recipe(path, ["lr=0.1"])
    with pytest.raises(RecipeError, match="rl: unknown key"):
        load_recipe(path, ["rl=0.1"])

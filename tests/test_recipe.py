import string
from pathlib import Path
from typing import Literal

import pytest
import yaml
from attrs import field
from attrs.validators import gt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainkit.errors import RecipeError
from trainkit.plugin import plugin
from trainkit.recipe import load_recipe, make_options

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
    assert list(recipe.plugins) == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("plugins.a.x=1e-3", {"a": {"x": 1e-3, "y": [1]}, "b": {}}),
        ("plugins.a=false", {"b": {}}),
        ("plugins.a.y=[2, 3]", {"a": {"x": 1, "y": [2, 3]}, "b": {}}),
        ("plugins.c=true", {"a": {"x": 1, "y": [1]}, "b": {}, "c": {}}),
        ("plugins.b.k=text with = sign", {"a": {"x": 1, "y": [1]}, "b": {"k": "text with = sign"}}),
        ("plugins.a.x=${epochs}", {"a": {"x": 2, "y": [1]}, "b": {}}),
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
    ("text", "said"),
    [
        ("name: r\nepochs: 2\n", "batch_size: missing"),
        (MINIMAL + "epoch: 3\n", r"epoch: unknown key; did you mean 'epochs'\?"),
        (MINIMAL + "seed: many\n", "seed: Value 'many'"),
        (MINIMAL.replace("2", "0"), "epochs: 'epochs' must be >= 1"),
        (MINIMAL.replace("r\n", "../r\n"), "name: 'name' must be letters"),
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


texts = st.text(alphabet=string.printable + "é\x1b\x00", max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates()
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
keys = st.sampled_from(["name", "epochs", "batch_size", "seed", "device", "expect", "plugins", "requires", "extends"])


def only_trainkit_errors(action):
    try:
        return action()
    except RecipeError as error:
        return None if error.exit_code == 2 and str(error) else pytest.fail("an error without a message")


@settings(max_examples=1000)
@given(st.dictionaries(keys | texts, trees, max_size=6))
def test_any_tree_is_a_recipe_or_one_clear_error(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.dump(tree, allow_unicode=True))
    recipe = only_trainkit_errors(lambda: load_recipe(path))
    if recipe is not None:
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe


@settings(max_examples=1000)
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


@settings(max_examples=1000)
@given(st.lists(texts | st.tuples(keys | st.just("plugins.e.limit"), texts).map("=".join), max_size=3))
def test_any_override_is_taken_or_one_clear_error(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "base.yaml"
    path.write_text(MINIMAL + "plugins: {e: {needed: 1}}\n")
    recipe = only_trainkit_errors(lambda: load_recipe(path, overrides))
    if recipe is not None and "e" in recipe.plugins:
        only_trainkit_errors(lambda: make_options(recipe, "e", Example))

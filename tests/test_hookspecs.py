"""No hook without documentation: the contract is what a plugin's author reads."""

import inspect
import re

import pytest

from trainkit import hookspecs

HOOKS = {name: function for phase in hookspecs.PHASES for name, function in vars(phase).items() if name[0] != "_"}
every_hook = pytest.mark.parametrize("name", HOOKS)


def sections(name):
    """Split a docstring into its parts: what comes first, Args, Returns, Raises."""
    text = inspect.getdoc(HOOKS[name]) or ""
    first, *rest = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.MULTILINE)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def test_the_phases_have_every_hook_once():
    assert len(HOOKS) == sum(name[0] != "_" for phase in hookspecs.PHASES for name in vars(phase))
    assert {HOOKS[name].trainkit_kind for name in HOOKS} == {"one", "chain", "list", "notify"}
    assert all(inspect.getdoc(phase) for phase in hookspecs.PHASES)


@every_hook
def test_the_first_line_is_a_sentence(name):
    line = sections(name)[""].partition("\n")[0]
    assert re.fullmatch(r"[A-Z].+\.", line), line


@every_hook
def test_each_argument_is_documented_in_order(name):
    arguments = [a for a in inspect.signature(HOOKS[name]).parameters if a != "self"]
    documented = re.findall(r"^    (\w+): \S", sections(name)["Args"], flags=re.MULTILINE)
    assert documented == arguments
    assert arguments[0] == "run"


@every_hook
def test_what_is_returned_is_documented_where_it_is_used(name):
    kind = HOOKS[name].trainkit_kind
    returns = inspect.signature(HOOKS[name]).return_annotation
    assert ("Returns" in sections(name)) == (returns != "None")
    if kind != "one":  # `optimizer_step` has one provider and gives nothing back
        assert (returns == "None") == (kind == "notify")


@every_hook
def test_a_chain_takes_and_returns_one_type(name):
    if HOOKS[name].trainkit_kind == "chain":
        signature = inspect.signature(HOOKS[name])
        _, _, value = signature.parameters.values()
        assert value.annotation == signature.return_annotation


@every_hook
def test_the_pseudocode_of_the_loop_names_it(name):
    loop = hookspecs.__doc__.partition("pseudocode::")[2]
    assert re.search(rf"\b{name}\b", loop)


def test_the_pseudocode_names_nothing_else():
    loop = hookspecs.__doc__.partition("pseudocode::")[2]
    words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", loop))
    assert words <= set(HOOKS)

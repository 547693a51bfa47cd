"""The helpers for plugin authors: what they accept, and what they must not let pass."""

import os
import signal
import textwrap
from importlib import import_module
from itertools import count

import pytest
import torch
from attrs import field

from trainkit.errors import PluginError, RunError
from trainkit.plugin import hookimpl, plugin
from trainkit.testing import (
    assert_conforms,
    assert_light_imports,
    assert_refuses,
    build_run,
    from_recipe,
    record_hooks,
    run_steps,
    watch,
)

pytest_plugins = ["pytester"]
numbers = count()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes a plugin's class as a module and imports it; the check of its imports, which takes long, is left out."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("trainkit.testing.conformance.assert_light_imports", lambda *modules: None)

    def write(body):
        module = f"made_{next(numbers)}"
        head = "import os, signal, threading\nimport attrs, torch\nfrom attrs import field\nfrom torch import nn\n"
        head += "from trainkit.plugin import hookimpl, plugin\n\n@plugin\nclass Made:\n"
        (tmp_path / f"{module}.py").write_text(head + textwrap.indent(textwrap.dedent(body), "    "))
        return import_module(module).Made

    return write


COUNTER = """
    seen: int = field(init=False, default=0)

    @hookimpl
    def gradients_ready(self, run):
        self.seen += 1
        for p in run.model.parameters():
            p.grad.mul_(1 / self.seen)
"""
STATE = """
    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


@pytest.mark.slow
def test_a_plugin_with_saved_state_conforms(made):
    assert_conforms(made(COUNTER + STATE))


def test_forgotten_state_is_found(made):
    with pytest.raises(AssertionError, match="stopped after 0 epochs and 2 batches and resumed, it ended differently"):
        assert_conforms(made(COUNTER))


def test_state_that_is_lost_at_the_end_of_an_epoch_is_found(made):
    lost = STATE.replace('state["seen"]', 'state["seen"] if state["seen"] < 4 else 0')
    with pytest.raises(AssertionError, match="stopped after 1 epochs"):
        assert_conforms(made(COUNTER + lost))


def test_state_of_arbitrary_objects_is_refused(made):
    body = "def state_dict(self): return {'thread': threading.Barrier}\ndef load_state_dict(self, state): pass"
    with pytest.raises(RunError, match=r"plugin 'made_\d+', state_dict: 'thread' is a builtins.type"):
        assert_conforms(made(body))


def test_weights_that_are_evaluated_are_compared_too(made):
    """A running mean of the weights, as eval_model gives it, shows in no parameter of the run."""
    body = """
    mean: nn.Module | None = field(init=False, default=None)

    @hookimpl
    def step_end(self, run):
        if self.mean is None:
            import copy
            self.mean = copy.deepcopy(run.model)
        for m, p in zip(self.mean.parameters(), run.model.parameters()):
            m.data.lerp_(p.data, 0.1)

    @hookimpl
    def eval_model(self):
        return self.mean
    """
    with pytest.raises(AssertionError, match="history.*observed_loss"):
        assert_conforms(made(body))


def test_random_numbers_from_elsewhere_are_found(made):
    body = """
    @hookimpl
    def transform_batch(self, batch):
        import random
        batch.images *= random.random()
        return batch
    """
    with pytest.raises(AssertionError, match="ended differently"):
        assert_conforms(made(body))


@pytest.mark.parametrize(
    ("hook", "act", "named"),
    [
        ("fit_end", "open('litter', 'w').close()", "files beside the run directory"),
        ("fit_start", "os.environ['MADE'] = '1'", "environment variables"),
        ("fit_start", "torch.set_default_dtype(torch.float16)", "torch's default dtype"),
        ("fit_start", "torch.set_num_threads(2)", "torch's number of threads"),
        ("transform_model", "torch.use_deterministic_algorithms(True)", "torch's deterministic mode"),
        ("fit_end", "signal.signal(signal.SIGUSR1, signal.SIG_IGN)", "signal handlers"),
        ("step_end", "threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
    ],
)
def test_what_is_left_behind_is_named(made, hook, act, named):
    dtype, handler = torch.get_default_dtype(), signal.getsignal(signal.SIGUSR1)
    model = ", model" if hook == "transform_model" else ""
    body = f"@hookimpl\ndef {hook}(self{model}):\n    {act}\n    return {model.strip(', ') or None}\n"
    try:
        with pytest.raises(AssertionError, match=f"Made left behind or changed: {named}"):
            assert_conforms(made(body))
    finally:
        os.environ.pop("MADE", None)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
        signal.signal(signal.SIGUSR1, handler)


def test_what_is_put_back_only_after_a_success_is_found(made, monkeypatch):
    body = """
    @hookimpl
    def fit_start(self):
        os.environ["MADE"] = "1"

    @hookimpl
    def fit_end(self, error):
        if error is None:
            del os.environ["MADE"]
    """
    monkeypatch.setenv("MADE", "")  # removed again after the test, whatever sets it meanwhile
    monkeypatch.delenv("MADE")
    with pytest.raises(AssertionError, match=r"environment variables \(in the run 'failed'\)"):
        assert_conforms(made(body))


def test_options_that_a_recipe_cannot_give_back_are_found(made):
    body = """
    limit: float = field(default=1.0, converter=lambda v: v + 1)
    """
    with pytest.raises(AssertionError, match=r"Made.limit: 2.0 came back from a recipe as 3.0"):
        assert_conforms(made(body))


def test_options_and_companions_are_used(made):
    @plugin
    class Doubler:
        """Doubles gradients before the plugin under test sees them."""

        @hookimpl
        def gradients_ready(self, run):
            for p in run.model.parameters():
                p.grad.mul_(2)

    body = """
    factor: float

    @hookimpl
    def gradients_ready(self, run):
        before = [p.grad.clone() for p in run.model.parameters()]
        run.log({"factor": self.factor, "first": before[0].abs().sum()})
    """
    assert_conforms(made(body), factor=2, beside={"doubler": Doubler()})


def test_a_companion_may_have_state_that_is_not_set_yet(made):
    @plugin
    class Later:
        """Has a field that exists from the first step on."""

        first: torch.Tensor = field(init=False)

        @hookimpl
        def fit_start(self, run):
            self.first = torch.zeros(1)

    assert_conforms(made("pass"), beside={"later": Later()})


def test_before_and_after_decide_where_companions_stand(made):
    @plugin
    class Needy:
        after = (f"made_{int(next(numbers)) + 1}",)

    cls = made('before = ("other",)')
    assert Needy.after == (cls.__module__,)
    assert_conforms(cls, beside={"needy": Needy(), "other": plugin(type("Other", (), {}))()})


def test_a_class_that_is_no_plugin_is_refused():
    with pytest.raises(AssertionError, match="dict is not decorated"):
        assert_conforms(dict)


@pytest.mark.slow
def test_heavy_imports_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "light_module.py").write_text("import json, torch\nfrom trainkit import Run\n")
    (tmp_path / "heavy_module.py").write_text("from sklearn.datasets import load_digits\n")
    with pytest.raises(AssertionError, match=r"importing heavy_module loads \d+ modules, most of them of .*sklearn"):
        assert_light_imports("light_module", "heavy_module")
    monkeypatch.setattr("subprocess.run", None)
    assert_light_imports("light_module")  # known by now


@pytest.mark.slow
def test_a_module_that_fails_at_import_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    with pytest.raises(AssertionError, match="importing broken_module failed: ZeroDivisionError"):
        assert_light_imports("broken_module")


@plugin
class Everything:
    """Has a part in some hooks."""

    @hookimpl
    def fit_start(self): ...

    @hookimpl
    def transform_model(self, model):
        return model

    @hookimpl
    def step_end(self): ...

    @hookimpl
    def fit_end(self): ...


def test_hooks_are_recorded_in_the_order_in_which_they_fire():
    fired = record_hooks({"b": Everything(), "a": Everything()}, steps=3)
    both = ["b", "a"]
    expected = [("transform_model", n) for n in both] + [("fit_start", n) for n in both]
    expected += [("step_end", n) for n in both] * 3 + [("fit_end", n) for n in reversed(both)]
    assert fired == expected


def test_files_of_a_run_are_kept_on_demand(tmp_path):
    run = run_steps({}, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "result.json").is_file()
    assert run.step == 2


@pytest.mark.slow
def test_pytest_offers_tiny_run_and_imports_nothing_for_it(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported_yet():
            assert not {"torch", "omegaconf", "trainkit.testing"} & set(sys.modules)

        def test_each_run_has_a_directory(tiny_run):
            first, second = tiny_run({}), tiny_run({}, steps=1)
            assert first.dir.path != second.dir.path
            assert (first.dir.path / "result.json").is_file()
            assert (first.step, second.step) == (2, 1)
        """
    )
    assert pytester.runpytest_subprocess().parseoutcomes() == {"passed": 2}


def test_watch_calls_functions_in_hooks_with_the_arguments_that_they_need():
    seen = []
    noted = watch(
        step_end=lambda run: seen.append(run.step),
        transform_loss=lambda run, loss: loss * 2,
        epoch_end=lambda metrics: seen.append(metrics["epoch"]),
    )
    run_steps({"noted": noted, "other": watch(fit_end=lambda: seen.append("end"))}, steps=4)
    assert seen == [1, 2, 3, 4, 1, "end"]
    with pytest.raises(PluginError, match="'no_hook' is not a hook"):
        build_run({"noted": watch(no_hook=lambda run: None)})


def test_options_are_made_and_refused_as_those_of_a_recipe(made):
    cls = made("sizes: tuple[int, ...]\nshare: float = field(default=0.5, validator=attrs.validators.le(1))")
    assert from_recipe(cls, sizes=[1, 2], share=1).sizes == (1, 2)
    assert_refuses(cls, "sizes")
    assert_refuses(cls, "sizes", "large", [0.5])
    assert_refuses(cls, "share", 2, "half", sizes=[1])
    with pytest.raises(AssertionError, match=r"Made takes \{'sizes': \[1\], 'share': 1\}"):
        assert_refuses(cls, "share", 2, 1, sizes=[1])
    with pytest.raises(AssertionError, match="the error does not name it"):
        assert_refuses(cls, "share", 1)


LYING = """
observer = True

@hookimpl
def gradients_ready(self, run):
    for p in run.model.parameters():
        p.grad.mul_(0.5)
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (LYING, r"says `observer = True`, and without it a run ends differently in model\."),
        (
            "observer = True\n\n@hookimpl\ndef epoch_end(self, metrics):\n    metrics['mine'] = 1.0\n",
            r"ends differently in history\.0\.mine",
        ),
        (
            "observer = True\n\n@hookimpl\ndef metrics(self, split):\n    return {'mine': 1.0}\n",
            "says `observer = True` and reports metrics",
        ),
        ("without_effect = ('root',)\n", "Made.without_effect: 'root' is not one of its options"),
    ],
)
def test_who_says_to_watch_only_must(made, body, said):
    with pytest.raises(AssertionError, match=said):
        assert_conforms(made(body))


def test_who_only_watches_conforms(made):
    body = """
    observer = True
    without_effect = ("every",)
    every: int = 2

    @hookimpl
    def step_end(self, run):
        run.log({"norm": sum(p.detach().norm() for p in run.model.parameters())})
    """
    assert_conforms(made(body))

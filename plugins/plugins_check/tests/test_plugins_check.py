import inspect
import json
import subprocess
import sys
import textwrap

import pytest

import trainkit_plugins_check
from trainkit import hookspecs
from trainkit.cli import main
from trainkit_plugins_check import Description

RECIPE = """\
name: r
epochs: 1
batch_size: 1
plugins: {zebra: , okapi: {loud: true}}
"""
PLUGIN = """\
from trainkit.plugin import hookimpl, plugin
@plugin
class X:
    "Does little."
    loud: bool = False
    @hookimpl
    def fit_start(self, run): ...
    @hookimpl
    def log(self, run, record): ...
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a plugin as pip would: a module and its metadata, in a folder on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)

    def install(name, code=PLUGIN, distribution=None, version="1.2", requires=()):
        distribution = distribution or f"acme-{name}"
        info = tmp_path / "site" / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        needed = "".join(f"Requires-Dist: {r}\n" for r in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needed}")
        (info / "entry_points.txt").write_text(f"[trainkit.plugins]\n{name} = acme_{name}:X\n")
        if code is not None:
            (tmp_path / "site" / f"acme_{name}.py").write_text(code)

    return install


@pytest.fixture
def only(monkeypatch):
    """Hide all other plugins: a hook that nobody is known to offer is looked for in every one that is installed."""

    def only(*names):
        mine = {name: trainkit_plugins_check.installed()[name] for name in names}
        monkeypatch.setattr(trainkit_plugins_check, "installed", lambda: mine)

    return only


@pytest.fixture
def printed(capsys):
    """Runs a command and returns its exit code and the JSON that it printed."""

    def run(*arguments):
        capsys.readouterr()
        code = main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_a_plugin_that_imports_is_ok(install, printed):
    install("zebra", requires=["trainkit>=0.1,<99", "torch"])
    code, (fact,) = printed("plugins", "check", "zebra")
    expected = {"plugin": "zebra", "distribution": "acme-zebra", "version": "1.2", "verdict": "ok", "reason": ""}
    assert (code, fact) == (0, expected)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\n1 / 0\n", "site/acme_zebra.py:2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "decoder.py"),  # the frame that failed
        ("from absent_module import X\n", "acme_zebra.py:1: ModuleNotFoundError: No module named 'absent_module'"),
        ("x = (\n", "SyntaxError: '(' was never closed"),
        ("", "AttributeError: module 'acme_zebra' has no attribute 'X'"),
        ("class X: ...\n", "acme_zebra:X is not a class decorated with @plugin"),
        ("X = 3\n", "is not a class decorated with @plugin"),
        ("raise SystemExit(0)\n", "acme_zebra.py:1: SystemExit: 0"),
        ("print('noise')\nimport os\nos._exit(3)\n", "ended the process with exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "ended the process with exit code -9"),
        (None, "ModuleNotFoundError: No module named 'acme_zebra'"),
    ],
)
def test_a_plugin_that_fails_at_import_is_broken(install, printed, code, reason):
    install("zebra", code)
    exit_code, (fact,) = printed("plugins", "check", "zebra")
    assert (exit_code, fact["verdict"]) == (2, "broken")
    assert reason in fact["reason"]


def test_noise_at_import_does_no_harm(install, printed):
    install("zebra", "print('[1, 2')\n" + PLUGIN + "print('no newline', end='')\n")
    assert printed("plugins", "check", "zebra")[0] == 0


def test_a_plugin_that_hangs_is_broken(install, printed, monkeypatch):
    monkeypatch.setattr(trainkit_plugins_check, "TIMEOUT", 1)
    install("zebra", "import time\ntime.sleep(60)\n")
    install("okapi")
    code, facts = printed("plugins", "check", "zebra", "okapi")
    assert code == 2
    assert [fact["verdict"] for fact in facts] == ["broken", "ok"]
    assert "not imported within 1 seconds" in facts[0]["reason"]


def test_another_version_of_trainkit_is_incompatible_and_nothing_is_imported(install, printed, tmp_path):
    install("zebra", f"open({str(tmp_path / 'imported')!r}, 'w')\n", requires=["trainkit<0.1", "numpy<1"])
    code, (fact,) = printed("plugins", "check", "zebra")
    assert (code, fact["verdict"]) == (2, "incompatible")
    assert fact["reason"].startswith("needs trainkit<0.1, and 0.")
    assert not (tmp_path / "imported").exists()


def test_a_name_that_two_claim_is_a_duplicate(install, printed):
    install("zebra", distribution="acme-one")
    install("zebra", None, distribution="acme-two", version="3.0")
    code, (fact,) = printed("plugins", "check", "zebra")
    assert (code, fact["verdict"]) == (2, "duplicate")
    assert all(claim in fact["reason"] for claim in ("acme-one 1.2", "acme-two 3.0", "uninstall one"))


def test_each_name_is_checked_once_in_the_order_given(install, printed):
    for name in ("zebra", "okapi", "lion"):
        install(name)
    facts = printed("plugins", "check", "okapi", "zebra", "okapi")[1]
    assert [fact["plugin"] for fact in facts] == ["okapi", "zebra"]


def test_without_names_all_are_checked(install, printed, monkeypatch):
    monkeypatch.setattr(trainkit_plugins_check, "describe_in_child", lambda value: Description())
    install("zebra")
    assert {"zebra"} < {fact["plugin"] for fact in printed("plugins", "check")[1]}


CLASS = """\
from trainkit.plugin import hookimpl, plugin
@plugin
class X:
    "Does little."
    hookspecs = ()
"""


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ("@hookimpl\ndef fit_strat(self, run): ...", ["'fit_strat' is not a hook; did you mean 'fit_start'?"]),
        ("@hookimpl\ndef zzzz(self, run): ...", ["'zzzz' is not a hook"]),
        (
            "@hookimpl\ndef log(self, run, recrod): ...",
            ["log: the hook has no argument 'recrod'; did you mean 'record'?"],
        ),
        ("@hookimpl\ndef log(self, x): ...", ["log: the hook has no argument 'x'; it has run, record"]),
        (
            "@hookimpl\ndef log(self, run, record=None): ...",
            ["log: 'record' has a default, so it never gets the hook's value; drop the default"],
        ),
        (
            "@hookimpl\ndef log(self, *, record): ...",
            ["log: 'record' can be given by name only, and hooks pass arguments by position"],
        ),
        (
            "def fit_start(self, run): ...",
            ["'fit_start' is a hook's name; mark the method with @hookimpl, or rename it"],
        ),
        (
            "@hookimpl(tryfirst=True)\ndef log(self, run): ...",
            ["log: hookimpl takes no options (tryfirst); order is the recipe's order"],
        ),
        (
            "@hookimpl(wrapper=True)\ndef log(self, run): yield",
            ["log: hookimpl takes no options (wrapper); order is the recipe's order"],
        ),
        (
            "@hookimpl\ndef fit_strat(self): ...\ndef log(self): ...",
            [
                "'fit_strat' is not a hook; did you mean 'fit_start'?",
                "'log' is a hook's name; mark the method with @hookimpl, or rename it",
            ],
        ),
    ],
)
def test_what_shows_when_hooks_are_bound_is_broken(install, only, printed, body, reasons):
    install("zebra", CLASS + textwrap.indent(body, "    ") + "\n")
    only("zebra")
    code, (fact,) = printed("plugins", "check", "zebra")
    assert (code, fact["verdict"], fact["reason"]) == (2, "broken", "; ".join(reasons))


@pytest.mark.parametrize(
    "body",
    [
        "@hookimpl\ndef log(self): ...",
        "@hookimpl\ndef log(self, record, mine=3, *rest, more=4, **others): ...",
        "@staticmethod\n@hookimpl\ndef log(record): ...",
        "@hookimpl(optionalhook=True)\ndef of_nobody(self, anything): ...",
        "@hookimpl(specname='log')\ndef write(self, record): ...",
        "def state_dict(self): ...\ndef load_state_dict(self, state): ...",
    ],
)
def test_what_a_run_accepts_is_ok(install, printed, body):
    install("zebra", CLASS + textwrap.indent(body, "    ") + "\n")
    assert printed("plugins", "check", "zebra")[1][0]["reason"] == ""


OFFERS = """\
from trainkit.hookspecs import hookspec
from trainkit.plugin import hookimpl, plugin
class Specs:
    @hookspec("notify")
    def alarm(self, run, message): ...
@plugin
class X:
    "Offers a hook."
    hookspecs = (Specs,)
"""


def test_a_hook_that_another_plugin_offers_is_a_hook(install, only, printed):
    install("zebra", CLASS + "    @hookimpl\n    def alarm(self, message): ...\n")
    install("okapi", CLASS + "    @hookimpl\n    def alarm(self, text): ...\n")
    install("lion", OFFERS)
    only("zebra", "okapi", "lion")
    reason = "alarm: the hook has no argument 'text'; it has run, message"
    assert [fact["reason"] for fact in printed("plugins", "check", "zebra", "okapi")[1]] == ["", reason]
    assert [fact["reason"] for fact in printed("plugins", "check")[1]] == ["", reason, ""]


@pytest.mark.parametrize("module", ["json", "acme_zebra", "trainkit", "attrs"])
def test_nothing_is_imported_from_the_current_folder(install, tmp_path, monkeypatch, module):
    install("zebra")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / f"{module}.py").write_text("open('imported', 'w')\n")
    # -P: the process that checks must start in spite of what lies there; its path gets the folder as Python gives it
    code = (
        f"import sys; from trainkit.cli import main; sys.path.insert(0, {str(downloads)!r}); sys.path.insert(0, ''); "
        "sys.exit(main(['plugins', 'check', 'zebra']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=downloads, capture_output=True, check=False)
    assert (done.returncode, (downloads / "imported").exists()) == (0, False), done.stdout


MEETING = """\
import pathlib, time
here = pathlib.Path({folder!r})
(here / __name__).touch()
for _ in range(1000):
    if len(list(here.iterdir())) == 4:
        break
    time.sleep(0.03)
else:
    raise TimeoutError("the others never came")
"""


def test_as_many_are_imported_at_once_as_there_are_processors(install, printed, monkeypatch, tmp_path):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    (tmp_path / "meeting").mkdir()
    for name in ("zebra", "okapi", "lion", "ibex"):
        install(name, MEETING.format(folder=str(tmp_path / "meeting")) + PLUGIN)
    code, facts = printed("plugins", "check", "zebra", "okapi", "lion", "ibex")
    assert (code, [fact["reason"] for fact in facts]) == (0, [""] * 4)


def test_a_slip_in_a_name_gets_the_nearest(install, capsys):
    install("zebra")
    assert main(["plugins", "check", "zebar"]) == 2
    assert "no plugin 'zebar' is installed; did you mean 'zebra'?" in capsys.readouterr().err


def test_the_table_shows_what_is_wrong(install, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    install("zebra", "1 / 0\n")
    assert main(["plugins", "check", "zebra"]) == 2
    assert "acme_zebra.py:1: ZeroDivisionError" in capsys.readouterr().out


def test_the_order_is_the_recipes(install, printed, tmp_path):
    install("zebra")
    install("okapi")
    (tmp_path / "r.yaml").write_text(RECIPE)
    expected = [{"hook": h, "kind": "notify", "plugins": ["zebra", "okapi"]} for h in ("fit_start", "log")]
    assert printed("plugins", "order", "r.yaml") == (0, expected)
    expected = [{"hook": h, "kind": "notify", "plugins": ["okapi"]} for h in ("fit_start", "log")]
    assert printed("plugins", "order", "r.yaml", "plugins.zebra=false") == (0, expected)
    assert printed("plugins", "order", "r.yaml", "plugins.zebra=false", "plugins.okapi=false") == (0, [])


def test_the_order_of_a_wrong_recipe_is_an_error(install, capsys, tmp_path):
    install("zebra")
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert main(["plugins", "order", "r.yaml"]) == 2
    assert "'okapi' is not installed" in capsys.readouterr().err


def test_the_contract_has_every_hook_in_the_order_of_life(printed):
    code, facts = printed("hooks")
    specs = [(p.__name__, n, s) for p in hookspecs.PHASES for n, s in vars(p).items() if n[0] != "_"]
    assert code == 0
    assert [(fact["phase"], fact["hook"]) for fact in facts] == [(phase, name) for phase, name, _ in specs]
    for fact, (_, _, spec) in zip(facts, specs, strict=True):
        assert fact["kind"] == spec.trainkit_kind
        assert ["self", *fact["arguments"]] == list(inspect.signature(spec).parameters)
        assert fact["when"].endswith(".")
        assert inspect.getdoc(spec).startswith(fact["when"])
        assert "implementers" not in fact


def test_implementers_are_named_on_demand(install, only, printed):
    install("zebra")
    only("zebra")
    implementers = {fact["hook"]: fact["implementers"] for fact in printed("hooks", "--implementers")[1]}
    assert {hook for hook, names in implementers.items() if names == ["zebra"]} == {"fit_start", "log"}
    assert {hook for hook, names in implementers.items() if names == []} == set(implementers) - {"fit_start", "log"}


def test_a_table_of_hooks_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["hooks"]) == 0
    out = capsys.readouterr().out
    assert "run, batch, output, loss" in out
    assert "Provide the data set." in out


def test_the_contract_is_printed_without_torch_or_plugins():
    code = (
        "import sys; from trainkit.cli import main; main(['hooks', '--json']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'rich', 'omegaconf', 'trainkit_sgd')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_damaged_requirement_of_one_plugin_ends_nothing(install, printed, capsys):
    install("zebra", requires=["!!", "trainkit>=0.1"])
    install("okapi", requires=["trainkit>=999"])
    facts = printed("plugins", "check", "zebra", "okapi")[1]
    assert [fact["verdict"] for fact in facts] == ["ok", "incompatible"]


def test_implementers_are_named_whatever_another_plugin_does(install, only, capsys):
    install("zebra")
    install("bongo", "raise SystemExit(0)\n")
    install("lion", distribution="acme-one")
    install("lion", distribution="acme-two")
    only("zebra", "bongo", "lion")
    assert main(["hooks", "--implementers", "--json"]) == 0
    said = capsys.readouterr()
    facts = {fact["hook"]: fact["implementers"] for fact in json.loads(said.out)}
    assert facts["log"] == ["zebra"]
    assert "'bongo' (acme-bongo 1.2) failed at import" in said.err
    assert "'lion' is claimed by" in said.err

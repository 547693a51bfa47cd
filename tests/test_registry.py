import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit import cli, registry
from trainkit.cli import main
from trainkit.errors import PluginError
from trainkit.recipe import from_dict, load_recipe
from trainkit.registry import find, installed


def distribution(folder, name, version="1.0", group="trainkit.plugins", entries="", requires=""):
    """Write the metadata of an installed distribution, as pip would."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    summary = f"What {name} does."
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n{requires}"
    )
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
    return info


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    monkeypatch.setattr(registry, "_reported", set())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of trainkit with the plugins zebra and okapi, as the current folder."""
    for name in ("zebra", "okapi"):
        (tmp_path / "plugins" / name).mkdir(parents=True)
        (tmp_path / "plugins" / name / "pyproject.toml").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "trainkit"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(requires=(), **plugins):
    tree = {"name": "r", "epochs": 1, "batch_size": 1, "plugins": plugins}
    return from_dict({**tree, "requires": requires or []})


def test_listing_reads_metadata_and_imports_nothing(site):
    distribution(site, "acme-zebra", "2.1", entries="zebra = module_that_does_not_exist:Zebra")
    (record,) = installed()["zebra"]
    assert (record.distribution, record.version, record.summary) == ("acme-zebra", "2.1", "What acme-zebra does.")


def test_a_name_that_two_distributions_claim_names_both(site):
    distribution(site, "acme-one", entries="zebra = one:Zebra")
    distribution(site, "acme-two", "3.0", entries="zebra = two:Zebra")
    with pytest.raises(PluginError, match="'zebra' is claimed by .*acme-.* and acme-.*; uninstall one"):
        find(recipe(zebra=None))


def test_only_what_the_recipe_lists_is_found_in_its_order(site):
    for name in ("a", "b", "c"):
        distribution(site, f"acme-{name}", entries=f"zebra_{name} = {name}:X")
    assert list(find(recipe(zebra_c=None, zebra_a=None))) == ["zebra_c", "zebra_a"]


def test_a_plugin_that_fails_at_import_is_named(site):
    distribution(site, "acme-broken", "0.3", entries="broken = acme_broken_module:X")
    (site / "acme_broken_module.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match=r"'broken' \(acme-broken 0.3\) failed at import .*ZeroDivisionError"):
        find(recipe(broken=None))["broken"].load()


def test_missing_plugins_are_all_named_with_one_command(checkout):
    (checkout / "recipes").mkdir()
    path = checkout / "recipes" / "r.yaml"
    path.write_text(
        textwrap.dedent("""\
        name: r
        epochs: 1
        batch_size: 1
        requires: ["acme-trainkit-lion>=1.2"]
        plugins: {zebra: , okapi: , lion: , unicorn: }
        """)
    )
    with pytest.raises(PluginError) as caught:
        find(load_recipe("recipes/r.yaml"))
    message = str(caught.value)
    assert "pip install -e ./plugins/zebra -e ./plugins/okapi 'acme-trainkit-lion>=1.2'" in message
    assert "'unicorn' is not to be found" in message
    assert "recipes/r.yaml" in message


def test_a_slip_in_a_name_gets_the_nearest_one(site):
    distribution(site, "acme-zebra", entries="zebra = x:X")
    with pytest.raises(PluginError, match=r"plugins.zebar: did you mean 'zebra'\?"):
        find(recipe(zebar=None))


@pytest.mark.parametrize("name", ["--index-url=http://x", "../../evil", "https://x/y.whl", "a b; rm -rf"])
def test_a_hostile_name_never_reaches_a_command(name):
    with pytest.raises(PluginError) as caught:
        find(recipe(**{name: None}))
    assert "pip install" not in str(caught.value)


def test_what_lists_plugins_imports_neither_torch_nor_any_plugin():
    code = (
        "import sys; from trainkit.cli import main; code = main(['plugins', 'list']); "
        "heavy = ('torch', 'numpy', 'omegaconf', 'matplotlib'); "
        "bad = [m for m in sys.modules if m.startswith('trainkit_') or m in heavy]; "
        "sys.exit(code or bool(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_source_tells_editable_from_wheel(site):
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    assert registry.installed()["zebra"][0].source == "wheel"
    (info / "direct_url.json").write_text('{"url": "file:///somewhere/zebra", "dir_info": {"editable": true}}')
    assert registry.installed()["zebra"][0].source == "editable"
    (info / "direct_url.json").write_text('{"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}')
    assert registry.installed()["zebra"][0].source == "https://x/y.git@ab12"


def test_a_label_finds_the_plugin_itself(site):
    distribution(site, "acme-zebra", entries="zebra = x:X\nokapi = x:Y")
    found = find(recipe(**{"zebra": None, "okapi": None, "zebra@second": None}))
    assert [(key, record.name) for key, record in found.items()] == [
        ("zebra", "zebra"),
        ("okapi", "okapi"),
        ("zebra@second", "zebra"),
    ]
    assert [registry.base_name(key) for key in found] == ["zebra", "okapi", "zebra"]


def test_requires_may_name_the_plugins_of_one_distribution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requires = {"sam": "acme-tricks>=1.2", "lion": "acme-tricks>=1.2", "zebra": "git+https://x/y.git"}
    missing = recipe(requires, **{"sam": None, "lion@second": None, "lion": None, "zebra": None, "okapi": None})
    assert registry.source_of(missing, "lion@second") == "'acme-tricks>=1.2'"
    assert registry.source_of(missing, "okapi") is None
    with pytest.raises(PluginError) as caught:
        find(missing)
    message = str(caught.value)
    assert "plugins 'sam', 'lion', 'zebra', 'okapi' are not installed" in message
    assert message.count("acme-tricks") == 1  # one distribution, one requirement
    assert "pip install 'acme-tricks>=1.2';" in message
    assert "requires.zebra: 'git+https://x/y.git' is an address or an option" in message
    assert "plugin 'okapi' is not to be found" in message


def test_a_requirement_given_by_name_comes_before_the_checkout(checkout):
    assert registry.source_of(recipe(zebra=None), "zebra") == "-e ./plugins/zebra"
    assert registry.source_of(recipe({"zebra": "acme-zebra"}, zebra=None), "zebra") == "acme-zebra"


DAMAGED = ["zebra", "zebra = x:X\n[trainkit.plugins]\nno equals sign", "=", "[[", "\x00"]


@pytest.mark.parametrize("entries", DAMAGED)
def test_damaged_entry_points_of_a_plugin_are_named_once_and_passed_over(site, capsys, entries):
    info = distribution(site, "acme-broken", "0.3", entries=entries, requires="Requires-Dist: trainkit>=0.1\n")
    distribution(site, "acme-okapi", entries="okapi = x:Y")
    for _ in range(2):
        assert installed()["okapi"][0].distribution == "acme-okapi"
    said = capsys.readouterr().err
    (info / "entry_points.txt").write_bytes(b"\xff\xfe[")
    site.touch()  # as whatever installs or removes a package does
    installed()
    said += capsys.readouterr().err
    assert said.count("warning: entry_points.txt of 'acme-broken' cannot be read") == 1
    assert said.count("reinstall acme-broken") == 1


def test_damaged_entry_points_that_cannot_concern_us_are_passed_over_silently(site, capsys):
    distribution(site, "numbers", group="console_scripts", entries="no equals sign")
    distribution(site, "acme-okapi", entries="okapi = x:Y")
    assert "okapi" in installed()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_no_metadata_of_another_package_breaks_a_command(site, entry_points, metadata, direct_url):
    if not site.exists():
        distribution(site, "acme-okapi", entries="okapi = x:Y")
        distribution(site, "acme-fuzz")
    info = site / "acme_fuzz-1.0.dist-info"
    (info / "entry_points.txt").write_bytes(b"[trainkit.plugins]\nzebra = x:X\n" + entry_points)
    (info / "METADATA").write_bytes(b"Name: acme-fuzz\nVersion: 1.0\nRequires-Dist: " + metadata)
    (info / "direct_url.json").write_bytes(direct_url)
    site.touch()
    have = installed()
    assert "okapi" in have
    for record in have.get("zebra", []):
        assert record.source
        record.check_requirement()


@pytest.mark.parametrize("url", ["[" * 100_000, "{", "[]", "{}", '{"url": "https://x", "vcs_info": []}', "\ud800"])
def test_a_damaged_direct_url_is_reported(site, capsys, url):
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    (info / "direct_url.json").write_bytes(url.encode(errors="surrogatepass"))
    assert installed()["zebra"][0].source == "unknown"
    assert "direct_url.json of 'acme-zebra'" in capsys.readouterr().err


def test_a_checkout_by_path_does_not_show_where_it_lies(site):
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    (info / "direct_url.json").write_text('{"url": "file:///home/me/zebra", "vcs_info": {"vcs": "git"}}')
    assert installed()["zebra"][0].source == "local"


def test_a_damaged_requirement_is_passed_over_and_the_others_count(site, capsys):
    requires = "Requires-Dist: !!\nRequires-Dist: trainkit>=999\n"
    distribution(site, "acme-zebra", entries="zebra = x:X", requires=requires)
    with pytest.raises(PluginError, match="needs trainkit>=999"):
        find(recipe(zebra=None))
    assert "Requires-Dist '!!' of 'acme-zebra'" in capsys.readouterr().err


def test_requirements_that_cannot_be_parsed_at_all_are_passed_over(site, capsys):
    info = distribution(site, "acme-zebra", entries="zebra = x:X").rename(site / "acme_zebra-1.0.egg-info")
    (info / "METADATA").rename(info / "PKG-INFO")
    (info / "requires.txt").write_bytes(b"\xff")
    assert list(find(recipe(zebra=None))) == ["zebra"]
    assert "what 'acme-zebra' requires cannot be read" in capsys.readouterr().err


def test_a_requirement_of_an_extra_does_not_count(site):
    distribution(site, "acme-zebra", entries="zebra = x:X", requires='Requires-Dist: trainkit>=999; extra == "new"\n')
    assert list(find(recipe(zebra=None))) == ["zebra"]


def test_metadata_without_a_name_are_reported(site, capsys):
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    (info / "METADATA").write_text("")
    assert "zebra" not in installed()
    assert "METADATA of the package that offers 'zebra' ('x:X')" in capsys.readouterr().err


def test_a_package_without_a_summary_is_found_beside_the_backport_of_importlib_metadata(site):
    pytest.importorskip("importlib_metadata")
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    (info / "METADATA").write_text("Name: acme-zebra\nVersion: 1.0\n")
    code = "import importlib_metadata; from trainkit.registry import installed; print(installed()['zebra'][0].summary)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_no_terminal_escape_leaves_the_metadata(site):
    info = distribution(site, "acme-zebra", entries="zebra = x:X")
    (info / "METADATA").write_text("Name: acme-zebra\nVersion: 1.0\nSummary: \x1b[2J Zebra\x07 é \u202e\n folded\n")
    (record,) = installed()["zebra"]
    assert record.summary == r"\x1b[2J Zebra\x07 é \u202e folded"


def test_show_refuses_a_name_that_two_distributions_claim(site, capsys):
    distribution(site, "acme-one", entries="zebra = acme_one_module:Zebra")
    distribution(site, "acme-two", "3.0", entries="zebra = two:Zebra")
    (site / "acme_one_module.py").write_text("raise SystemExit('imported')\n")
    assert main(["plugins", "show", "zebra"]) == 2
    said = capsys.readouterr().err
    assert "'zebra' is claimed by" in said
    assert "acme-one 1.0" in said
    assert "acme-two 3.0" in said


def test_what_a_class_does_wrong_is_said_without_advice_to_reinstall(site):
    distribution(site, "acme-wrong", "0.3", entries="wrong = acme_wrong_module:Wrong")
    (site / "acme_wrong_module.py").write_text(
        "from trainkit.plugin import plugin\n@plugin\nclass Wrong:\n    sizes: set[int] = None\n"
    )
    with pytest.raises(PluginError, match=r"plugin 'wrong' \(acme-wrong 0.3\): class Wrong .* field 'sizes'") as caught:
        installed()["wrong"][0].load()
    assert "reinstall" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("run.recipes/quickstart.yaml", "a name is lower-case letters"),
        ("run.--help", "trainkit has this option itself"),
        ("run.--seed", "trainkit has this option itself"),
        ("plugins.--fast", "only run, resume, evaluate take further options"),
        ("run.--Fast", "a name is lower-case letters"),
        ("resume.runs", "only plugins, recipes, runs take further actions"),
        ("run.quickstart", "only plugins, recipes, runs take further actions"),
        ("plugins.list", "trainkit has this action itself"),
        ("recipes.show", "trainkit has this action itself"),
        ("plugins.list.more", "a name is lower-case letters"),
        ("run", "trainkit has this command itself"),
        ("runs", "trainkit has this command itself"),
        ("--version", "a name is lower-case letters"),
        ("-h", "a name is lower-case letters"),
        ("Zebra", "a name is lower-case letters"),
        ("x" * 41, "a name is lower-case letters"),
    ],
)
def test_no_entry_point_takes_the_place_of_what_trainkit_has(site, capsys, name, reason):
    cli._say_passed_over.cache_clear()
    distribution(site, "acme-evil", group="trainkit.commands", entries=f"{name} = acme_evil_module:RUN")
    (site / "acme_evil_module.py").write_text("raise SystemExit('imported')\n")
    first, dot, second = name.partition(".")
    assert main([first, second, "--dry-run"] if dot and "/" in second else ["plugins", "list"]) in (0, 2)
    assert main([first, second, "x"] if second == "runs" else ["recipes", "show", "nothing.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count(f"warning: the command {name!r} of acme-evil 1.0 is passed over: {reason}") == 1
    assert "imported" not in said


def test_an_action_may_be_added_where_actions_are(site, capsys):
    distribution(site, "acme-more", group="trainkit.commands", entries="recipes.count = acme_count_module:RUN")
    (site / "acme_count_module.py").write_text(
        "class RUN:\n    HELP = 'Count 50 %, not %(prog)s.'\n    EXAMPLES = '%(prog)s \x1b[31m %d'\n"
        "    add_arguments = lambda parser: None\n    run = lambda args: print('counted') or 0\n"
    )
    assert main(["recipes", "count"]) == 0
    assert capsys.readouterr().out == "counted\n"
    with pytest.raises(SystemExit):
        main(["recipes", "count", "--help"])
    said = capsys.readouterr().out
    assert "Count 50 %, not %(prog)s." in said
    assert "%(prog)s \\x1b[31m %d" in said


def test_a_summary_is_printed_as_it_is(site, capsys):
    info = distribution(site, "acme-more", group="trainkit.commands", entries="zebra = x:RUN")
    (info / "METADATA").write_text("Name: acme-more\nVersion: 1.0\nSummary: 5 % %(prog)s %(nothing)s \x1b[2J\u202e\n")
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "5 % %(prog)s %(nothing)s \\x1b[2J\\u202e" in said


@pytest.mark.parametrize(
    "raised", ["SystemExit(0)", "Stop('now')", "Interrupt('now')", "GeneratorExit()", "RecursionError('deep')"]
)
def test_whatever_an_import_raises_is_one_paragraph(site, capsys, raised):
    distribution(site, "acme-ends", entries="ends = acme_ends_module:X")
    distribution(site, "acme-ends-too", group="trainkit.commands", entries="ends = acme_ends_module:X")
    (site / "acme_ends_module.py").write_text(
        f"class Stop(BaseException): pass\nclass Interrupt(KeyboardInterrupt): pass\nraise {raised}\n"
    )
    for arguments, what in ((["plugins", "show", "ends"], "plugin"), (["ends"], "command")):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {what} 'ends' (acme-ends")
        assert "failed at import of acme_ends_module:X" in said
        assert said.count("\n") == 1


def test_a_command_that_ends_the_process_is_said(site, capsys):
    distribution(site, "acme-ends", group="trainkit.commands", entries="ends = acme_ends_command:RUN")
    (site / "acme_ends_command.py").write_text(
        "class RUN:\n    HELP = ''\n    add_arguments = lambda parser: None\n    run = lambda args: exit(0)\n"
    )
    assert main(["ends"]) == 1
    assert "SystemExit: 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "[project]\nname = 'other'\n", "[", "project = 3\n", "fifo"])
def test_only_a_checkout_of_trainkit_is_where_plugins_come_from(checkout, text):
    path = checkout / "pyproject.toml"
    path.unlink()
    if text == "fifo":
        os.mkfifo(path)
    elif text is not None:
        path.write_text(text)
    (checkout / "deep").mkdir()
    (checkout / "deep" / "r.yaml").write_text("name: r\nepochs: 1\nbatch_size: 1\nplugins: {zebra: }\n")
    missing = load_recipe(checkout / "deep" / "r.yaml")
    assert registry.source_of(missing, "zebra") is None
    with pytest.raises(PluginError, match="not to be found in this checkout"):
        find(missing)
    path.unlink(missing_ok=True)
    path.write_text('[project]\nname = "trainkit"\n')
    assert registry.source_of(missing, "zebra") == "-e ./plugins/zebra"


def test_no_program_of_the_current_folder_is_run(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for path in (".", "", ":", "bin/..:"):
        monkeypatch.setenv("PATH", path)
        assert registry.program("git") is None
    monkeypatch.setenv("PATH", f".:{tmp_path}")
    assert registry.program("git") == str(tmp_path / "git")


def test_who_provides_a_hook_is_told_without_importing_anything(site):
    distribution(
        site,
        "acme-loss",
        entries="zebra = acme_loss.inner.module:Zebra\nokapi = acme_loss.inner.module:Okapi\nno = a:B",
    )
    (site / "acme_loss" / "inner").mkdir(parents=True)
    for folder in ("acme_loss", "acme_loss/inner"):
        (site / folder / "__init__.py").write_text("raise SystemExit\n")
    (site / "acme_loss" / "inner" / "module.py").write_text(
        "raise SystemExit\nclass Zebra:\n    @hookimpl\n    def loss(self): ...\n"
        "class Okapi:\n    def loss(self): ...\n"
    )
    found = registry.providers("loss")
    assert "zebra" in found
    assert "cross_entropy" in found
    assert not {"okapi", "no", "sgd"} & set(found)
    assert "acme_loss" not in sys.modules


def test_what_is_installed_and_removed_in_a_process_is_seen(site):
    distribution(site, "acme-okapi", entries="okapi = x:Y")
    assert "okapi" in installed()
    info = distribution(site, "acme-zebra", entries="zebra = x:Y")
    assert {"okapi", "zebra"} <= installed().keys()
    shutil.rmtree(info)
    assert "zebra" not in installed()

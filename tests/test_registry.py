import subprocess
import sys
import textwrap

import pytest

from trainkit import registry
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


def recipe(**plugins):
    return from_dict({"name": "r", "epochs": 1, "batch_size": 1, "plugins": plugins})


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


def test_missing_plugins_are_all_named_with_one_command(tmp_path, monkeypatch):
    for name in ("zebra", "okapi"):
        (tmp_path / "plugins" / name).mkdir(parents=True)
        (tmp_path / "plugins" / name / "pyproject.toml").touch()
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text(
        textwrap.dedent("""\
        name: r
        epochs: 1
        batch_size: 1
        requires: ["acme-trainkit-lion>=1.2"]
        plugins: {zebra: , okapi: , lion: , unicorn: }
        """)
    )
    monkeypatch.chdir(tmp_path)
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

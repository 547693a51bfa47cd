import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from trainkit.cli import main
from trainkit.cli.output import number
from trainkit_report import Curve, chart, html_table, tag, ticks

RECIPE = """\
name: told
epochs: 2
batch_size: 256
device: cpu
expect: {test_accuracy: 99}
plugins:
  digits:
  resnet: {stem: 2, blocks: [1], channels: [2]}
  cross_entropy:
  sgd: {lr: 0.1}
  metrics:
  metric_log:
  figures: {published: published.csv, every: 0}
  confusion_matrix:
  checkpoint:
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs that differ by their rate."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "told.yaml").write_text(RECIPE)
    (folder / "published.csv").write_text("epoch,test_accuracy\n1,50\n2,61.5\n")
    for name, lr in (("a", 0.1), ("b", 0.05)):
        arguments = [str(folder / "told.yaml"), "--run-dir", str(folder / name), f"plugins.sgd.lr={lr}"]
        assert main(["run", *arguments]) == 0
    return folder


class Page(HTMLParser):
    """What a page says, and what it would load or run."""

    def __init__(self, text):
        super().__init__()
        self.said, self.tags, self.loads, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        for key, value in attributes:
            if key in ("src", "href") and not (value or "").startswith("data:image/png;base64,"):
                self.loads.append(value)
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_data(self, data):
        self.said.append(data)


def written(folder, *arguments):
    path = folder / "report.html"
    assert main(["runs", "report", *map(str, arguments), "-o", str(path)]) == 0
    text = path.read_text()
    return text, Page(text)


def test_it_says_what_was_reached_expected_published_and_what_differs(runs, tmp_path):
    text, page = written(tmp_path, runs / "a", runs / "b")
    final = json.loads((runs / "a" / "result.json").read_text())["final"]["test_accuracy"]
    assert number(final) in page.said
    assert {"99", "plugins.sgd.lr", "0.05", "published, published"} <= set(page.said)
    assert page.loads == []
    (curves,) = re.findall(r"<figcaption>test_accuracy</figcaption>.*?</figure>", text)
    assert curves.count('class="curve"') == 3
    assert 'stroke-dasharray="5 4"' in curves
    alone, page = written(tmp_path, runs / "a")
    assert "What differs" not in page.said
    assert alone.count("data:image/png;base64,") == 1  # the confusion matrix


def test_nothing_of_a_strangers_names_is_run(runs, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    shutil.copytree(runs / "a", tmp_path / "a")
    run = tmp_path / "a"
    result = json.loads((run / "result.json").read_text())
    result["final"]["test_" + evil] = 1.0
    (run / "result.json").write_text(json.dumps(result))
    table = (run / "metrics.csv").read_text().splitlines()
    quoted = '"' + evil.replace('"', '""') + '"'
    (run / "metrics.csv").write_text("\n".join([f"{table[0]},{quoted}", *(f"{line},1.5" for line in table[1:])]))
    lock = json.loads((run / "plugins.lock.json").read_text())
    lock[0]["name"] = lock[0]["options"]["x"] = evil
    (run / "plugins.lock.json").write_text(json.dumps(lock))
    text, page = written(tmp_path, run)
    assert page.tags.count("script") == 1
    assert (page.loads, page.handlers) == ([], [])
    assert "alert(1)" in "".join(page.said)
    assert "script-src 'sha256-" in text


def test_groups_and_studies_have_their_intervals(runs, tmp_path):
    home = tmp_path / "study"
    for name, lr in (("base", "a"), ("other", "b")):
        for seed in (0, 1):
            shutil.copytree(runs / lr, home / name / f"seed-{seed}")
            path = home / name / f"seed-{seed}" / "result.json"
            result = json.loads(path.read_text())
            result["final"]["test_accuracy"] = {"a": 50, "b": 60}[lr] + seed
            path.write_text(json.dumps(result))
        told = {"variant": name, "recipe": "told", "overrides": [], "seeds": [0, 1, 2]}
        (home / name / "group.json").write_text(json.dumps(told))
    (home / "study.json").write_text(json.dumps({"name": "s", "variants": {"base": "base", "other": "other"}}))
    _, page = written(tmp_path, home)
    assert {"base", "other", "2/3", "50.50", "+10.00 (+10.00 to +10.00)"} <= set(page.said)
    _, page = written(tmp_path, home / "base")
    assert "44.15 to 56.85" in page.said  # scipy.stats.t.ppf(0.975, 1) * sqrt(0.5 / 2)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_run_is_refused(tmp_path, capsys, name):
    assert main(["runs", "report", str(tmp_path / name)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_curves_of_one_point_or_none_are_drawn():
    assert chart("loss", [Curve("a", [])]) == ""
    assert chart("loss", [Curve("a", [(1.0, 0.0)])]) == ""  # which the table tells
    assert chart("loss", [Curve("a", [(1.0, 0.5), (2.0, 0.5)])]).count("<path") == 1
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1, 200, whole=True) == [50, 100, 150, 200]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert tag("p", class_="<&>") == '<p class="&lt;&amp;&gt;"></p>'
    assert "<td>&lt;b&gt;</td>" in html_table(["x"], [["<b>"]])


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_runs_the_page_without_a_complaint(runs, tmp_path):
    written(tmp_path, runs / "a", runs / "b")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command = ["chromium", *options, (tmp_path / "report.html").as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr
    assert ended.stdout.count("<svg") >= 4

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from trainkit.cli import main
from trainkit.cli.output import number
from trainkit_report import Curve, chart, html_table, ranked, tag, ticks
from trainkit_runs import StoredRun

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
  sample_predictions: {mistakes: 2, random: 1}
  ledger:
  checkpoint:
"""
EVIL = "</script><script>document.title='run'</script><img src=http://x.invalid/y onerror=document.title='run'>\"'"


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
    assert alone.count("data:image/png;base64,") == 2  # the confusion matrix and sample predictions


def test_charts_are_in_the_order_in_which_metrics_matter(runs, tmp_path):
    text, _ = written(tmp_path, runs / "a")
    titles = re.findall(r"<figcaption>(\w+)</figcaption><svg", text)
    assert titles == ["test_accuracy", "test_loss", "train_accuracy", "train_loss", "lr"]
    run = StoredRun(runs / "a")
    run.result = {"expected": {"train_iou": 50}, "better": {"test_top5": "more", "test_error": "less"}}
    names = ["lr", "test_error", "test_top5", "train_iou"]
    assert ranked(names, [run]) == ["train_iou", "test_top5", "test_error", "lr"]


def test_what_images_are_taken_for_is_a_table_too(runs, tmp_path):
    told = json.loads((runs / "a" / "figures" / "predictions.json").read_text())
    text, _ = written(tmp_path, runs / "a")
    first = told["mistakes"][0]
    cells = ["mistake", first["class"], first["taken_for"]]
    row = "".join(f"<td>{cell}</td>" for cell in cells) + f'<td class="n">{100 * first["probability"]:.1f} %</td>'
    assert row in text
    assert text.count("<td>at random</td>") == 1
    counted = json.loads((runs / "a" / "figures" / "confusion.json").read_text())
    entries = [(n, i, j) for i, row in enumerate(counted["confusion_matrix"]) for j, n in enumerate(row) if i != j]
    n, true, taken = max(entries, key=lambda entry: entry[0])
    assert f'<tbody><tr><td>{true}</td><td>{taken}</td><td class="n">{n}</td></tr>' in text
    shutil.copytree(runs / "a", tmp_path / "a")
    for strange in ('{"mistakes": [3, {"class": [1], "probability": "x"}], "random": 5}', "[", "[" * 500):
        (tmp_path / "a" / "figures" / "predictions.json").write_text(strange)
        (tmp_path / "a" / "figures" / "confusion.json").write_text(
            '{"classes": [[1], 2], "confusion_matrix": [3, ["x"]]}'
        )
        written(tmp_path, tmp_path / "a")


def found(run, **changes):
    """What `trainkit verify` writes of a run."""
    chain = json.loads((run / "result.json").read_text())["evidence"]["ledger"]["chain"]
    checks = [{"what": "ledger", "verdict": "proved", "detail": "7 entries"}]
    told = {"run": "a", "ledger": chain, "checks": checks, "steps": 12, "replayed": 12, "comparable": True}
    return {**told, "passed": True, "proved": True, "sentence": "a: verified, every step.", **changes}


def test_what_was_verified_is_told_as_the_claim_that_it_is(runs, tmp_path):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    _, page = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert page.said.count("not checked") == 2
    (tmp_path / "a" / "verified.json").write_text(json.dumps(found(tmp_path / "a")))
    differs = [{"what": "from the seed", "verdict": "differs", "detail": "step 3"}]
    (tmp_path / "of_b.json").write_text(json.dumps(found(tmp_path / "b", checks=differs)))
    text, page = written(tmp_path, tmp_path / "a", tmp_path / "b", "--verified", tmp_path / "of_b.json")
    assert {"a: verified, every step.", "7 entries", "from the seed", "step 3", "trainkit verify a"} <= set(page.said)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", text)]
    told = {row[0]: row[1:3] for row in cells if row[-1:] == [f"trainkit verify {row[0]}" if row else ""]}
    # b's file says "proved": true nevertheless
    assert told == {"a": ["proved", "12 of 12"], "b": ["differs", "12 of 12"]}
    assert "claim of whoever wrote verified.json" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ledger": "0" * 32}, "ledger: 0{32} is the last hash of none of the runs' ledgers"),
        ({"ledger": ""}, "ledger: empty"),
        ({"sentence": 3}, "sentence: expected str, got 3; write it with: trainkit verify RUN -o FILE"),
        ({"checks": [{"what": "x", "verdict": "perfect", "detail": ""}]}, r"checks\[0\]: expected what, verdict"),
        ({"checks": [{}] * 1000}, "checks: 1,000, and `trainkit verify` makes 200 at most"),
        (None, "not JSON"),
    ],
)
def test_a_file_that_is_no_evidence_of_a_run_is_refused(runs, tmp_path, capsys, changes, said):
    text = "[" * 500 if changes is None else json.dumps(found(runs / "a", **changes))
    (tmp_path / "v.json").write_text(text)
    arguments = [str(runs / "a"), "--verified", str(tmp_path / "v.json"), "-o", str(tmp_path / "r.html")]
    assert main(["runs", "report", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(f"v.json: {said}", error)
    assert not (tmp_path / "r.html").exists()


def hostile(run, folder):
    """A copy of a run whose names, texts and evidence would run a script, or load an image."""
    shutil.copytree(run, folder)
    result = json.loads((folder / "result.json").read_text())
    result["final"]["test_" + EVIL] = 1.0
    (folder / "result.json").write_text(json.dumps(result))
    table = (folder / "metrics.csv").read_text().splitlines()
    quoted = '"' + EVIL.replace('"', '""') + '"'
    (folder / "metrics.csv").write_text("\n".join([f"{table[0]},{quoted}", *(f"{line},1.5" for line in table[1:])]))
    lock = json.loads((folder / "plugins.lock.json").read_text())
    lock[0]["name"] = lock[0]["options"]["x"] = EVIL
    (folder / "plugins.lock.json").write_text(json.dumps(lock))
    counted = {"classes": ["x", EVIL], "confusion_matrix": [[1, 1], [0, 1]]}
    (folder / "figures" / "confusion.json").write_text(json.dumps(counted))
    rows = [{"class": EVIL, "taken_for": EVIL, "probability": 0.5}]
    (folder / "figures" / "predictions.json").write_text(json.dumps({"mistakes": rows}))
    checks = [{"what": EVIL, "verdict": "proved", "detail": EVIL}]
    (folder / "verified.json").write_text(json.dumps(found(folder, sentence=EVIL, checks=checks)))
    return folder


def test_nothing_of_a_strangers_names_is_run(runs, tmp_path):
    text, page = written(tmp_path, hostile(runs / "a", tmp_path / "a"))
    assert page.tags.count("script") == 1
    assert (page.loads, page.handlers) == ([], [])
    assert "".join(page.said).count("document.title='run'") >= 9
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


def test_groups_are_compared_by_what_their_runs_report(runs, tmp_path, capsys):
    for seed in (0, 1):
        shutil.copytree(runs / "a", tmp_path / "g" / f"seed-{seed}")
        path = tmp_path / "g" / f"seed-{seed}" / "result.json"
        result = json.loads(path.read_text())
        result |= {"final": {"lr": 0.1, "test_iou": 0.5 + seed / 1000}, "better": {"test_iou": "more"}}
        path.write_text(json.dumps(result))
    (tmp_path / "g" / "group.json").write_text(json.dumps({"variant": "g", "seeds": [0, 1]}))
    text, page = written(tmp_path, tmp_path / "g")
    assert "test_iou of the last epoch" in text
    assert "0.4941 to 0.5069" in page.said
    capsys.readouterr()
    assert main(["runs", "report", str(tmp_path / "g"), "--metric", "test_accuracy"]) == 2
    assert "no completed run reports 'test_accuracy'; known: test_iou, lr" in " ".join(capsys.readouterr().err.split())


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


def test_the_greatest_losses_do_not_flatten_the_others():
    curve = Curve("a", [(float(n), 1.0 + (n == 1)) for n in range(1, 101)])
    assert "at the upper edge: 1 of 100 values, above 1." in chart("x", [curve], "less")
    assert "upper edge" not in chart("loss", [curve]) + chart("loss", [curve], "more")
    few = Curve("a", [(1.0, 2.0), (2.0, 1.0)])
    assert "upper edge" not in chart("x", [few], "less")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_runs_the_page_without_a_complaint(runs, tmp_path):
    written(tmp_path, hostile(runs / "a", tmp_path / "a"), runs / "b")
    log = tmp_path / "net.json"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += ["--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", f"--log-net-log={log}"]
    command = ["chromium", *options, (tmp_path / "report.html").as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr
    assert ended.stdout.count("<svg") >= 4
    assert "<title>told</title>" in ended.stdout  # a script that ran would have changed it
    assert "x.invalid" in ended.stdout
    assert "x.invalid" not in log.read_text()

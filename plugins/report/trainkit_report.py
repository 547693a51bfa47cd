"""A report of runs as one HTML file, which needs no network and no server.

Whatever comes from a run is a stranger's text: it is escaped, and the page's security policy lets no script run but the
one below, by its hash, and loads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import attrs

from trainkit import __version__, provenance
from trainkit.cli.output import error, number, printable, terminal, written
from trainkit.errors import UsageError
from trainkit.rundir import RunDir, as_mapping, atomic_write, is_number, parse_json, read_regular
from trainkit_runs import VERIFIED, Evidence, StoredRun, cell, chain_of, epochs_of, read_evidence  # type: ignore[import-untyped]
from trainkit_studies import Group, compare, groups_in, summarize  # type: ignore[import-untyped]

__all__ = ["REPORT", "Curve", "report"]

MAX_PICTURE = 1 << 24  # bytes of a picture, and of the JSON document beside it
MAX_ROWS = 200  # of a table that a JSON document holds
FREQUENT = 20  # confusions that are listed
MAX_RUNS = 200
SPLITS = ("test", "validation")  # whose metrics are a result, the foremost first
PICTURES = {
    "predictions": "What images are taken for",
    "confusion": "Which class is taken for which",
    "samples": "Training images, as they are stored and as the network sees them",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#8B5A2B", "#666666")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 310, 56, 44, 12, 12  # of a chart and its margins
TICKS = 5
SHOWN = 0.98  # of the values, where less is better; see :func:`chart`

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5a6470; --line: #d9dee4; --back: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --line: #333a42; --back: #12151a; --card: #1a1f26; }
  .curve, .key { filter: brightness(1.4); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; }
svg { width: 100%; height: auto; max-width: 46rem; display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .curve { fill: none; stroke-width: 2; }
svg .at { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
figure { margin: 0 0 1.4rem; } figcaption { font-weight: 600; margin-bottom: .3rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .3rem 0; }
.legend li { font-size: .88rem; }
.legend button { all: unset; cursor: pointer; } .legend button:focus-visible { outline: 2px solid #0072B2; }
.legend button[aria-pressed=false] { opacity: .35; text-decoration: line-through; }
.key { display: inline-block; width: 1.1rem; height: .25rem; vertical-align: middle; margin-right: .4rem; }
.values { min-height: 1.4rem; font-size: .88rem; color: var(--soft); }
img { max-width: min(100%, 46rem); background: #fff; } details { margin: .5rem 0; } summary { cursor: pointer; }
blockquote { margin: .8rem 0 .4rem; padding: 0 0 0 .8rem; border-left: 3px solid var(--line); max-width: 46rem; }
@media (max-width: 34rem) {
  svg text { font-size: 19px; } table { font-size: .82rem; } th, td { padding: .3rem .35rem; }
  td.n, th.n { white-space: normal; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, blockquote { break-inside: avoid; }
  h2, summary, figcaption { break-after: avoid; } .values { display: none; }
  table { font-size: 8pt; } th, td { padding: .2rem .4rem; } td + td { overflow-wrap: anywhere; }
  pre { white-space: pre-wrap; } svg, img { max-width: 13cm; max-height: 21cm; }
}
"""

SCRIPT = """
for (const figure of document.querySelectorAll('figure[data-curves]')) {
  const curves = JSON.parse(figure.dataset.curves), svg = figure.querySelector('svg');
  const at = svg.querySelector('.at'), values = figure.querySelector('.values');
  const [x0, x1, left, right] = JSON.parse(figure.dataset.range);
  const paths = [...svg.querySelectorAll('.curve')], buttons = [...figure.querySelectorAll('button')];
  buttons.forEach((button, n) => button.addEventListener('click', () => {
    const shown = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', shown);
    paths[n].style.display = shown ? '' : 'none';
  }));
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const epoch = x0 + (x - left) / (right - left) * (x1 - x0);
    const said = [];
    let place = null;
    curves.forEach(([name, points], n) => {
      if (buttons[n].getAttribute('aria-pressed') !== 'true' || !points.length) return;
      const near = points.reduce((a, b) => Math.abs(b[0] - epoch) < Math.abs(a[0] - epoch) ? b : a);
      if (place === null || Math.abs(near[0] - epoch) < Math.abs(place - epoch)) place = near[0];
      said.push(name + ' ' + Number(near[1].toPrecision(4)));
    });
    if (place === null) return;
    const where = left + (place - x0) / ((x1 - x0) || 1) * (right - left);
    at.setAttribute('x1', where); at.setAttribute('x2', where); at.style.visibility = 'visible';
    values.textContent = 'epoch ' + Number(place.toPrecision(4)) + ': ' + said.join(', ');
  });
  svg.addEventListener('pointerleave', () => { at.style.visibility = 'hidden'; values.textContent = ''; });
}
const closed = [...document.querySelectorAll('details:not([open])')];
addEventListener('beforeprint', () => {
  closed.splice(0, closed.length, ...document.querySelectorAll('details:not([open])'));
  closed.forEach(each => { each.open = true; });
});
addEventListener('afterprint', () => closed.forEach(each => { each.open = false; }));
"""


# ---- HTML


def tag(name: str, *inner: str, **attributes: str) -> str:
    """Return an element; attributes are escaped, and what is inside is HTML already."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value, quote=True)}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(inner)}</{name}>"


def text(value: object) -> str:
    """Return any text as HTML that shows it."""
    return escape(printable(value), quote=True)


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Return a table; cells are text, and those of the columns in `right` numbers."""
    classes = [{"class_": "n"} if column in right else {} for column in columns]
    head = tag("tr", *(tag("th", text(column), **given) for column, given in zip(columns, classes, strict=True)))
    body = [
        tag("tr", *(tag("td", text(cell), **given) for cell, given in zip(row, classes, strict=True))) for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def picture(path: Path, caption: str) -> str:
    """Return a PNG file as an image in the page; nothing where there is none."""
    try:
        data = read_regular(path, MAX_PICTURE)
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG"):
        return ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("figcaption", text(caption)), f'<img src="{source}" alt="{text(caption)}">')


# ---- curves


@attrs.frozen
class Curve:
    """A curve over the epochs.

    Args:
        name: of the run.
        points: epochs and values.
        dashed: whether it was published, and not measured.
    """

    name: str
    points: list[tuple[float, float]]
    dashed: bool = False


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return round numbers between two, about five of them.

    Args:
        low: the least.
        high: the greatest.
        whole: whether they are whole numbers.
    """
    rough = (high - low) / TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(1.0, step) if whole else step
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, curves: Sequence[Curve], better: str | None = None) -> str:
    """Return a chart as SVG, with a legend that shows and hides curves and tells values under the pointer.

    Args:
        title: the metric.
        curves: what is drawn.
        better: whether ``less`` or ``more`` of the metric is better. Where less is, the greatest 2 % of the values are
            drawn at the upper edge, so that a loss of the first epochs does not flatten all others.
    """
    curves = [curve for curve in curves if curve.points]
    if not any(len(curve.points) > 1 for curve in curves):  # one value is in the table
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = sorted(y for curve in curves for _, y in curve.points)
    low, high = ys[0], ys[math.ceil(SHOWN * len(ys)) - 1] if better == "less" else ys[-1]
    beyond = sum(y > high for y in ys)
    x0, x1 = min(xs), max(xs)
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def across(x: float) -> float:
        return LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return min(max(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), TOP), HEIGHT - BOTTOM)

    parts = []
    for y in ticks(low, high):
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in ticks(x0, x1, whole=True):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{x:g}</text>')
    cut = "" if not beyond else f"Not to scale, at the upper edge: {beyond} of {len(ys)} values, above {number(high)}."
    legend = []
    for n, curve in enumerate(curves):
        colour = COLOURS[n % len(COLOURS)]
        steps = " ".join(f"{'L' if i else 'M'}{across(x):.1f} {down(y):.1f}" for i, (x, y) in enumerate(curve.points))
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<path class="curve" d="{steps}" stroke="{colour}"{dash}/>')
        key = f'<span class="key" style="background:{colour}"></span>'
        legend.append(tag("li", tag("button", key, text(curve.name), type="button", aria_pressed="true")))
    parts.append(f'<line class="at" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">epoch</text>')
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
    return tag(
        "figure",
        tag("figcaption", text(title)),
        drawn,
        tag("div", text(cut), class_="soft") if cut else "",
        tag("div", class_="values"),
        tag("ul", *legend, class_="legend"),
        data_curves=json.dumps([[curve.name, curve.points] for curve in curves]),
        data_range=json.dumps([x0, x1, LEFT, WIDTH - RIGHT]),
    )


def rows_of(path: Path) -> list[dict[str, float]]:
    """Return the rows of a table of epochs, finite numbers alone; none where there is no such table."""
    rows = [{name: value for name, value in row.items() if math.isfinite(value)} for row in epochs_of(path)]
    return [row for row in rows if "epoch" in row]


def curves_of(runs: Sequence[StoredRun], names: Sequence[str], metric: str) -> list[Curve]:
    """Return a metric's curve of each run, and the published ones that lie in the run directories, each once."""
    found, published = [], {}
    for run, name in zip(runs, names, strict=True):
        rows = rows_of(run.folder / "metrics.csv")
        found.append(Curve(name, [(row["epoch"], row[metric]) for row in rows if metric in row]))
        for path in sorted(run.folder.glob("files/*/*.csv")):
            points = [(row["epoch"], row[metric]) for row in rows_of(path) if metric in row]
            if points:
                published[path.name] = Curve(f"published, {path.stem}", points, dashed=True)
    return found + list(published.values())


# ---- the report


def runs_in(path: Path) -> tuple[list[StoredRun], list[Group]]:
    """Return the runs and groups that a path stands for: a run, a group, or a study.

    Raises:
        UsageError: it is none of them.
    """
    groups = groups_in(path)
    if not groups:
        RunDir(path).recipe_path()
        return [StoredRun(path)], []
    return [StoredRun(group.folder / f"seed-{seed}") for group in groups for seed in sorted(group.results)], groups


def report(
    runs: Sequence[StoredRun],
    groups: Sequence[Group],
    metric: str | None = None,
    evidence: Mapping[str, Sequence[Evidence]] | None = None,
) -> str:
    """Return a whole HTML document.

    Args:
        runs: what is shown one by one.
        groups: what is summed up, each compared with the first.
        metric: what groups are compared by; by default the first one of :func:`ranked`.
        evidence: what was found when runs were checked, by the last hash of their ledgers.
    """
    names = _names(runs)
    title = ", ".join(dict.fromkeys(str(run.recipe.get("name", run.folder.name)) for run in runs)) or "no runs"
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    made = f"{count}; written {datetime.now():%Y-%m-%d %H:%M} by trainkit {__version__}"
    parts = [tag("h1", text(title)), tag("p", text(made), class_="soft")]
    if groups:
        parts += [tag("h2", "Groups"), _groups(groups, metric or _default_metric(runs))]
    parts += [tag("h2", "Results"), _results(runs, names)]
    in_tables = dict.fromkeys(name for run in runs for row in rows_of(run.folder / "metrics.csv") for name in row)
    better = better_of(runs)
    metrics = ranked([name for name in in_tables if name not in ("epoch", "step")], runs)
    charts = [drawn for name in metrics if (drawn := chart(name, curves_of(runs, names, name), better.get(name)))]
    parts += [tag("h2", "Curves"), *(charts or [tag("p", "no table of several epochs")])]
    if len(runs) > 1:
        parts += [tag("h2", "What differs"), _differences(runs, names)]
    pictures = {name: _pictures(run.folder / "figures") for run, name in zip(runs, names, strict=True)}
    if any(pictures.values()):
        shown = {"open": ""} if len(runs) == 1 else {}
        parts.append(tag("h2", "Pictures"))
        parts += [tag("details", tag("summary", text(name)), of, **shown) for name, of in pictures.items() if of]
    parts += [tag("h2", "Checked"), _checked(runs, names, evidence or {})]
    parts += [tag("h2", "What produced them"), *(_made_by(run, name) for run, name in zip(runs, names, strict=True))]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        tag("title", text(title)),
        f"<style>{STYLE}</style>",
    ]
    body = [*parts, f"<script>{SCRIPT}</script>"]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{"".join(body)}</body></html>\n'


def _names(runs: Sequence[StoredRun]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    for length in range(1, 12):
        names = ["/".join(run.folder.absolute().parts[-length:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def better_of(runs: Sequence[StoredRun]) -> dict[str, str]:
    """Return whether ``less`` or ``more`` of a metric is better, as the plugins that report it say."""
    said = {name: value for run in runs for name, value in as_mapping(run.result.get("better")).items()}
    return {name: value for name, value in said.items() if value in ("less", "more")}


def ranked(metrics: Iterable[str], runs: Sequence[StoredRun]) -> list[str]:
    """Return metrics in the order in which they matter, as far as the runs themselves tell.

    What a recipe expects comes first; then metrics of the test split, of the validation split, of others; then those of
    which more is better (scores), less (losses), neither; then as they are reported.
    """
    expected = {name for run in runs for name in as_mapping(run.result.get("expected"))}
    better = better_of(runs)

    def rank(name: str) -> tuple[bool, int, int]:
        split = name.partition("_")[0]
        of_split = SPLITS.index(split) if split in SPLITS else len(SPLITS)
        return name not in expected, of_split, ("more", "less", None).index(better.get(name))

    return sorted(metrics, key=rank)


def _final_metrics(runs: Sequence[StoredRun]) -> list[str]:
    return ranked(dict.fromkeys(name for run in runs for name in as_mapping(run.result.get("final"))), runs)


def _default_metric(runs: Sequence[StoredRun]) -> str:
    return next(iter(_final_metrics(runs)), "")


def _pictures(folder: Path) -> str:
    """Return the pictures of a run that are not curves, and what images are taken for as a table, too."""
    shown = {name: picture(folder / f"{name}.png", caption) for name, caption in PICTURES.items()}
    for name, described in (("predictions", _predictions), ("confusion", _confusions)):
        if shown[name]:
            shown[name] += described(_read_object(folder / f"{name}.json"))
    return "".join(shown.values())


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object that lies beside a picture; an empty one where there is none."""
    try:
        return as_mapping(parse_json(read_regular(path, MAX_PICTURE)))
    except (OSError, ValueError):
        return {}


def _confusions(told: Mapping[str, Any]) -> str:
    """Return the most frequent confusions as a table: on a phone the picture's numbers are small."""
    classes, matrix = told.get("classes"), told.get("confusion_matrix")
    if not (isinstance(classes, list) and isinstance(matrix, list)):
        return ""
    found = [
        (count, true, taken)
        for true, row in zip(classes, matrix, strict=False)
        for taken, count in zip(classes, row if isinstance(row, list) else (), strict=False)
        if taken != true and is_number(count) and count > 0
    ]
    found.sort(key=lambda entry: -entry[0])
    if not found:
        return ""
    rows = [[_short(true), _short(taken), number(count)] for count, true, taken in found[:FREQUENT]]
    made = html_table(["class", "taken for", "images"], rows, ["images"])
    return tag("details", tag("summary", "The most frequent confusions as a table"), made)


def _predictions(told: Mapping[str, Any]) -> str:
    """Return what images are taken for as a table, for those who do not see the picture."""
    rows = []
    for key, kind in (("mistakes", "mistake"), ("random", "at random")):
        listed = told.get(key)
        for row in map(as_mapping, listed[:MAX_ROWS] if isinstance(listed, list) else ()):
            probability = row.get("probability")
            share = f"{100 * probability:.1f} %" if is_number(probability) else "-"
            rows.append([kind, _short(row.get("class", "-")), _short(row.get("taken_for") or "-"), share])
    if not rows:
        return ""
    made = html_table(["", "class", "taken for", "probability"], rows, ["probability"])
    return tag("details", tag("summary", "The same as a table"), made)


def _results(runs: Sequence[StoredRun], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        result, expected = run.result, as_mapping(run.result.get("expected"))
        final, best = as_mapping(result.get("final")), as_mapping(result.get("best"))
        reached = {"parameters": result.get("parameters"), **final}
        shown = dict.fromkeys([*expected, *(key for key in final if key.partition("_")[0] in SPLITS)])
        for metric in shown:
            found = as_mapping(best.get(metric))
            value = found.get("value")
            told = f"{number(value)} (epoch {number(found.get('epoch'))})" if is_number(value) else ""
            cells = [expected.get(metric), reached.get(metric)]
            rows.append([name, metric, *(number(cell) if is_number(cell) else "-" for cell in cells), told])
    columns = ["run", "metric", "expected", "reached", "best"]
    if len(runs) == 1:  # the heading of the page names it
        columns, rows = columns[1:], [row[1:] for row in rows]
    note = "Reached is the last epoch's value. The best of many epochs is too good, when the test split chose it."
    return html_table(columns, rows, columns[-3:]) + tag("p", text(note), class_="soft")


def _groups(groups: Sequence[Group], metric: str) -> str:
    first = groups[0].values(metric)
    rows = []
    for group in groups:
        values = group.values(metric)
        if not values:
            rows.append([group.name, f"0/{len(group.seeds)}", "-", "-", "-", "-"])
            continue
        found = summarize(list(values.values()))
        digits = 2 if abs(found.mean) >= 10 else 4
        interval = f"{found.interval[0]:.{digits}f} to {found.interval[1]:.{digits}f}" if found.interval else "-"
        against = "-"
        if group is not groups[0] and first:
            difference = compare(values, first)
            against = f"{difference.mean:+.{digits}f}"
            if difference.interval:
                against += f" ({difference.interval[0]:+.{digits}f} to {difference.interval[1]:+.{digits}f})"
        sd = "-" if found.sd is None else f"{found.sd:.2g}"
        rows.append([group.name, f"{found.n}/{len(group.seeds)}", number(found.mean), sd, interval, against])
    columns = ["group", "n", "mean", "sd", "95 %", f"beyond {groups[0].name}"]
    note = f"{metric} of the last epoch; intervals at 95 %, by Student's t, seed by seed where seeds match."
    return html_table(columns, rows, columns[1:]) + tag("p", text(note), class_="soft")


def _differences(runs: Sequence[StoredRun], names: Sequence[str]) -> str:
    found = provenance.compare(*(run.record() for run in runs))
    if not found:
        return tag("p", "nothing")
    rows = [[difference.key, *(_short(cell(value)) for value in difference.values)] for difference in found]
    return html_table(["", *names], rows)


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else written(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def evidence_of(runs: Sequence[StoredRun], given: Sequence[Path]) -> dict[str, list[Evidence]]:
    """Return what was found when runs were checked, by the last hash of their ledgers.

    Args:
        runs: those of the report. A ``verified.json`` in the directory of one is read, too.
        given: files that the user names.

    Raises:
        UsageError: a file is wrong, or is of none of the runs.
    """
    lying = [path for run in runs if (path := run.folder / VERIFIED).exists()]
    known = [chain for run in runs if (chain := chain_of(run.result))]
    found: dict[str, list[Evidence]] = {}
    for path in {path.resolve(): path for path in [*given, *lying]}.values():
        evidence = read_evidence(path)
        if evidence.ledger not in known:
            theirs = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "") or "none"
            raise UsageError(
                f"{path}: ledger: {_short(evidence.ledger)} is the last hash of none of the runs' ledgers ({theirs}): "
                "it is of another run, or of this one before it went on; verify the run again, or remove the file"
            )
        found.setdefault(evidence.ledger, []).append(evidence)
    return found


def _checked(runs: Sequence[StoredRun], names: Sequence[str], evidence: Mapping[str, Sequence[Evidence]]) -> str:
    rows, found = [], []
    for run, name in zip(runs, names, strict=True):
        ledger = (run.folder / "ledger.jsonl").is_file()
        of_run = evidence.get(chain_of(run.result), ())
        verdicts = ", ".join(each.verdict for each in of_run) or "not checked"
        steps = ", ".join(f"{number(each.replayed)} of {number(each.steps)}" for each in of_run) or "-"
        command = f"trainkit verify {name}" if ledger else "no ledger: list the plugin ledger in the recipe"
        rows.append([name, verdicts, steps, command])
        for each in of_run:
            table = html_table(["", "verdict", "what was found"], each.checks)
            summary = tag("summary", text(f"{name}: the checks that {each.path.name} lists"))
            found.append(tag("blockquote", text(each.sentence)) + tag("details", summary, table))
    note = "A ledger chains hashes of the run's states. This report has not replayed anything: the command does."
    if found:
        note += (
            f" What was found is the claim of whoever wrote {VERIFIED}; its hash of the ledger is that of the run. "
            "Anyone who has the run's directory can check the claim with the command."
        )
    columns = ["run", "found", "steps replayed", "to check it"]
    return html_table(columns, rows) + "".join(found) + tag("p", text(note), class_="soft")


def _made_by(run: StoredRun, name: str) -> str:
    environment, data = run.environment, as_mapping(run.data.get("splits"))
    plugins = [[p.get("name", ""), p.get("version", ""), written(as_mapping(p.get("options")))] for p in run.plugins]
    packages = as_mapping(environment.get("packages"))
    facts = {
        "trainkit": as_mapping(environment.get("trainkit")).get("version"),
        "revision": environment.get("revision"),
        "torch": packages.get("torch"),
        "Python": environment.get("python"),
        "CPU": environment.get("processor"),
        "instructions": written(as_mapping(environment.get("instruction_sets"))),
        "GPU": as_mapping(environment.get("gpu")).get("model"),
        "threads": environment.get("threads"),
        "images": ", ".join(f"{as_mapping(split).get('images', '-')} {key}" for key, split in data.items()),
    }
    recipe = run.loaded.to_yaml() if run.loaded else ""
    return tag(
        "details",
        tag("summary", text(name)),
        html_table(["", ""], [(key, value) for key, value in facts.items() if value not in (None, "")]),
        html_table(["plugin", "version", "options"], plugins),
        tag("pre", text(recipe)),
    )


class _Report:
    """``trainkit runs report``."""

    HELP = "Write one HTML file of runs, groups and studies, which needs no network."
    EXAMPLES = """\
examples:
  trainkit runs report runs/basic_se/20260101-120000-0 -o report.html
  trainkit runs report runs/paper -o paper.html
  trainkit runs report runs/quickstart/20260101-120000-0 --verified verified.json
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the action's arguments."""
        parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="of a run, a group or a study")
        parser.add_argument("--metric", metavar="NAME", help="of groups (default: what their recipes expect)")
        parser.add_argument(
            "--verified",
            metavar="FILE",
            type=Path,
            nargs="+",
            default=[],
            help="from: trainkit verify RUN -o FILE",
        )
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("report.html"))

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Read the runs and write the file."""
        runs: dict[Path, StoredRun] = {}
        groups: dict[Path, Group] = {}
        for folder in args.folders:
            some, of = runs_in(folder)
            runs |= {run.folder: run for run in some}
            groups |= {group.folder: group for group in of}
        if not runs:
            raise UsageError(f"{args.folders[0]}: no run in it is completed")
        if len(runs) > MAX_RUNS:
            raise UsageError(f"{len(runs)} runs are more than a page can show; give {MAX_RUNS} at most")
        shown = list(runs.values())
        metrics = _final_metrics(shown)
        if groups and args.metric is not None and args.metric not in metrics:
            known = ", ".join(metrics) or "none"
            raise UsageError(f"--metric: no completed run reports {args.metric!r}; known: {known}")
        evidence = evidence_of(shown, args.verified)
        try:
            atomic_write(args.output, report(shown, list(groups.values()), args.metric, evidence))
        except OSError as problem:
            raise UsageError(f"{args.output}: cannot be written: {problem.strerror}") from problem
        terminal().print(printable(args.output), markup=False, highlight=False, soft_wrap=True)
        unread = [line for run in shown for line in run.problems]
        for line in unread:
            error(line)
        return 1 if unread else 0


REPORT = _Report

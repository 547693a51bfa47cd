"""A notebook: one cell a step, lines of progress, the result as a table with pictures."""

import re
from pathlib import Path

import pytest

from trainkit.notebook import result_html
from trainkit.session import Result

from .test_readme import block, section

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.slow
def test_the_readmes_steps_run_in_a_notebook_cell_by_cell(tmp_path):
    (tmp_path / "recipes").symlink_to(RECIPES)
    steps = block("python", section("From Python")).replace('"epochs=2"', '"epochs=3", "plugins.figures.every=0"')
    steps = steps.replace("trainkit.fit(run)", "trainkit.fit(run, max_steps=30)")
    cells = [nbformat.v4.new_code_cell(source) for source in re.split(r"\n\n+", steps.strip())]
    cells.append(nbformat.v4.new_code_cell("trainkit.resume(result.path)"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, shown, resumed = (notebook.cells[n].outputs for n in (-4, -2, -1))
    said = printed(trained)
    assert re.search(r"^epoch 1/3  train_loss \d\.\d+ .* test_accuracy", said, re.MULTILINE)
    assert "━" not in said  # no bars, which a notebook cannot draw over
    (html,) = (output.data["text/html"] for output in shown)
    assert html.count("data:image/png;base64,") >= 2
    last = next(output for output in resumed if output.output_type == "execute_result")
    assert "completed in" in last.data["text/html"]
    assert "epoch 3/3" in printed(resumed)


def printed(outputs):
    """Return what a cell printed, whether as text or as rich shows it in a notebook."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_nothing_of_a_strangers_result_is_run(tmp_path):
    evil = "<script>alert(1)</script>"
    figures = tmp_path / "a'><script>" / "figures"
    figures.mkdir(parents=True)
    (figures / "x' onload='alert(1).png").write_bytes(b"\x89PNG")
    result = Result(
        status="stopped",
        reason=evil,
        epochs=1,
        steps=1,
        parameters=1,
        final={evil: 1.0},
        best={evil: {"value": 1.0, "epoch": 1}},
        expected={},
        seconds={"total": 1.0},
        images_per_second=None,
        path=figures.parent,
    )
    html = result_html(result)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"<img[^>]*' onload='", html)

"""Portable numerics use what every CPU has; benchmarks/portable.py compares the bits with those of emulated CPUs."""

import json
import os
import subprocess
import sys

import pytest

from trainkit import build, load_recipe
from trainkit.cli import main
from trainkit.errors import RecipeError
from trainkit.provenance import compare

ARGUMENTS = ["numerics=portable", "epochs=1", "max_steps=2"]


def clean(**variables):
    capped = ("ATEN_", "ONEDNN_", "MKL_", "OMP_")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(capped)}, **variables}


@pytest.mark.slow
def test_a_run_and_what_checks_it_use_no_more_than_every_cpu_has(small, trainkit):
    text = small.read_text().replace("  checkpoint:\n", "  ledger:\n  checkpoint:\n")
    small.write_text(text)
    done = trainkit("run", small, "--run-dir", "out", *ARGUMENTS, env=clean())
    assert done.returncode == 0, done.stderr
    out = small.parent / "out"
    environment = json.loads((out / "environment.json").read_text())
    assert environment["instruction_sets"]["torch"] == "DEFAULT"
    assert environment["threads"] == 1
    # What checks the run reads its recipe before torch is loaded, too.
    code = "import sys, trainkit_verify, trainkit_predict, trainkit.cli.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_of_the_cpu_is_no_difference_then_and_its_instructions_are():
    def recorded(numerics, processor, isa):
        environment = {"processor": processor, "instruction_sets": {"torch": isa}}
        return {"recipe": {"numerics": numerics} if numerics else {}, "environment": environment}

    def keys(*records):
        return [difference.key for difference in compare(*records) if difference.effect == "numbers"]

    portable, other = recorded("portable", "A", "DEFAULT"), recorded("portable", "B", "DEFAULT")
    assert keys(portable, other) == []
    assert keys(portable, recorded("portable", "B", "AVX2")) == ["environment.instruction_sets.torch"]
    assert keys(recorded(None, "A", "AVX2"), recorded(None, "B", "AVX2")) == ["environment.processor"]
    assert "numerics" in keys(portable, recorded(None, "A", "DEFAULT"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("numerics=portable", "it was loaded without them; start Python with ATEN_CPU_CAPABILITY=default"),
        ("numerics=fast", "numerics"),
    ],
)
def test_what_cannot_be_is_one_clear_error(small, override, said, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with pytest.raises(RecipeError, match=said):
        build(load_recipe(small, [override]))


def test_mixed_precision_is_refused(small, monkeypatch, capsys):
    monkeypatch.setattr("trainkit.numerics.check", lambda recipe, device: None)
    arguments = ["run", str(small), "numerics=portable", "plugins.autocast.dtype=bfloat16", "--dry-run"]
    assert main(arguments) == 2
    assert "drop it, such as with plugins.autocast=false" in capsys.readouterr().err

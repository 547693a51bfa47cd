import json

import torch
from safetensors.torch import load_file, safe_open

from trainkit import load_model
from trainkit.cli import main

RECIPE = """\
name: averaged
epochs: 2
batch_size: 256
device: cpu
plugins:
  digits:
  normalize: {mean: [0.305], std: [0.376]}
  resnet: {stem: 4, blocks: [2], channels: [4]}
  kernel_sharing: {within: [stages.0]}
  cross_entropy:
  sgd: {lr: 0.1}
  ema: {decay: 0.5}
  metrics:
  weights:
  checkpoint:
"""


def test_the_network_is_stored_as_it_was_evaluated_each_shared_kernel_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "averaged.yaml").write_text(RECIPE)
    assert main(["run", "averaged.yaml", "--run-dir", "out"]) == 0
    path = tmp_path / "out" / "weights" / "best.safetensors"
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    shared = json.loads(metadata["shared"])
    assert shared  # the second convolution of the stage is the first one
    assert not {*shared} & {*stored}
    description = json.loads(metadata["trainkit"])
    assert description["data"]["classes"] == [str(digit) for digit in range(10)]
    state = {**stored, **{name: stored[kept] for name, kept in shared.items()}}
    best = torch.load(tmp_path / "out" / "checkpoints" / "best.pt", weights_only=True)
    average = best["plugins"]["ema"]["state"]["model"]
    assert state.keys() == average.keys()
    assert all(torch.equal(state[name], average[name]) for name in average)
    assert not all(torch.equal(state[name], best["model"][name]) for name in average)

    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    saved = load_model("out")
    expected = saved.predict(images)
    (tmp_path / "out" / "checkpoints" / "best.pt").unlink()
    assert torch.equal(load_model("out").predict(images), expected)
    assert load_model("out").metrics == saved.metrics

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainkit import build, fit, load_recipe
from trainkit.cli import main

RECIPE = """\
name: small
epochs: 1
batch_size: 512
device: cpu
plugins:
  digits:
  resnet: {stem: 4, blocks: [1], channels: [4]}
  cross_entropy:
  sgd: {lr: 0.1}
  metric_log:
  ledger:
  checkpoint:
"""


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Two pairs of keys and a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        none = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub").write_bytes(public)
    (tmp_path / "small.yaml").write_text(RECIPE)
    fit(build(load_recipe("small.yaml")), "run")
    return tmp_path


def test_an_archive_is_of_whom_it_says_and_unchanged(keys, capsys):
    assert main(["runs", "seal", "run", "-o", "run.zip", "--sign", "mine.pem"]) == 0
    check = ["verify", "run.zip", "--files", "--public-key"]
    assert main([*check, "mine.pub"]) == 0
    assert "of the key mine.pub" in " ".join(capsys.readouterr().out.split())
    assert main([*check, "other.pub"]) == 1
    assert "signature: Key mismatch" in " ".join(capsys.readouterr().out.split())
    with (keys / "run.zip").open("ab") as archive:
        archive.write(b" ")
    assert main([*check, "mine.pub"]) == 1
    assert "signature: Signature mismatch" in " ".join(capsys.readouterr().out.split())
    (keys / "run.zip.sig").write_text("{}")
    assert main([*check, "mine.pub"]) == 1
    (keys / "run.zip.sig").unlink()
    assert main([*check, "mine.pub"]) == 1
    assert "there is no run.zip.sig beside it" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_is_one_clear_error(keys, capsys):
    assert main(["runs", "sign", "nowhere.zip", "--key", "mine.pem"]) == 2
    assert main(["runs", "sign", "small.yaml", "--key", "mine.pub"]) == 2
    assert main(["verify", "run", "--public-key", "nowhere.pub"]) == 2
    said = capsys.readouterr().err
    assert "nowhere.zip: no such file" in said
    assert "mine.pub: cannot sign with it" in said
    assert "--public-key: the directory of a run has no signature" in said

"""Sign a sealed run with a key of one's own, so that others know whose it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainkit.cli.output import printable
from trainkit.errors import UsageError

__all__ = ["SIGN"]


class _Sign:
    """``trainkit runs sign``; `trainkit runs seal --sign` and `trainkit verify --public-key` call it, too.

    The signature is one of the library model-signing: an elliptic-curve signature of the archive's SHA-256, in a
    Sigstore bundle. Neither making nor checking one needs a network.
    """

    HELP = "Sign a sealed run with a private key of one's own."
    EXAMPLES = """\
examples:
  openssl ecparam -name prime256v1 -genkey -noout -out private.pem
  openssl ec -in private.pem -pubout -out public.pem
  trainkit runs sign run.zip --key private.pem
  trainkit verify run.zip --public-key public.pem
"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="what `trainkit runs seal` wrote")
        parser.add_argument("--key", metavar="PEM", type=Path, required=True, help="a private elliptic-curve key")

    @classmethod
    def run(cls, args: argparse.Namespace) -> int:
        """Write the signature beside the archive."""
        print(printable(f"{cls.sign(args.archive, args.key)}: the signature of {args.archive}"))
        return 0

    @staticmethod
    def sign(archive: Path, key: Path) -> Path:
        """Write ``ARCHIVE.sig`` and return its path.

        Args:
            archive: a file.
            key: a private elliptic-curve key in PEM format.

        Raises:
            UsageError: a file cannot be read, or the key is none.
        """
        import OpenSSL  # noqa: F401  (model-signing 1.1 needs it and does not require it)
        from model_signing import signing

        _must_be_file(archive)
        _must_be_file(key)
        target = archive.with_name(f"{archive.name}.sig")
        try:
            config = signing.Config()  # type: ignore[no-untyped-call]
            config.use_elliptic_key_signer(private_key=key).sign(archive, target)
        except Exception as error:  # cryptography raises many kinds
            raise UsageError(
                f"{key}: cannot sign with it: {_first_line(error)}; expected a private EC key, PEM"
            ) from error
        return target

    @staticmethod
    def objection(archive: Path, key: Path) -> str:
        """Return why the signature beside an archive is not that of a key, or the empty string.

        Args:
            archive: a file; its signature is ``ARCHIVE.sig``.
            key: a public elliptic-curve key in PEM format.

        Raises:
            UsageError: the key cannot be read.
        """
        from model_signing import verifying

        _must_be_file(key)
        signature = archive.with_name(f"{archive.name}.sig")
        if not signature.is_file():
            return f"there is no {signature.name} beside it"
        try:
            config = verifying.Config()  # type: ignore[no-untyped-call]
            config.use_elliptic_key_verifier(public_key=key).verify(archive, signature)
        except Exception as error:  # a forged file may raise anything
            return _first_line(error)
        return ""


def _must_be_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")


def _first_line(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]


SIGN = _Sign

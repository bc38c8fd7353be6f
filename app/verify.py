"""`privtune verify REPORT`: checks a privacy report offline. Also a program of its own: `python -m app.verify REPORT`.

It needs NumPy and cryptography, no other part of the service, and no accountant but `app.privacy.verifier`'s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.privacy.report_check import Check, check_report
from app.privacy.report_format import parse
from app.signing import check_signature, public_key_of

_BY_ITSELF = (
    "fits the key that the report itself names: nothing was changed since it was signed. "
    "Who signed is shown only with --public-key."
)

#: Larger than any report, smaller than what would fill the memory.
_LARGEST = 64 * 2**20


def add_command(commands: Any) -> None:
    """Registers `verify` with argparse's subparsers."""
    parser = commands.add_parser("verify", help="recompute a privacy report's figures offline and check its signature")
    _add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints every check; the exit status is 0 where all hold, 1 otherwise."""
    try:
        expected = None if arguments.public_key is None else read_public_key(arguments.public_key)
        checks = verify(_read(arguments.report), expected)
    except (OSError, ValueError) as error:
        sys.stdout.write(f"refused: {error}\n")
        return 1
    for check in checks:
        sys.stdout.write(f"{'ok  ' if check.holds else 'FAIL'}  {check.name}: {check.found}\n")
    accepted = all(check.holds for check in checks)
    sys.stdout.write("accepted\n" if accepted else "refused\n")
    return 0 if accepted else 1


def verify(text: bytes, public_key: str | None = None) -> list[Check]:
    """Signature and figures of a report. Raises ValueError where it is no report at all."""
    report = parse(text)
    try:
        check_signature(report, public_key)
        signature = Check("signature", _BY_ITSELF if public_key is None else "by the expected key", True)
    except ValueError as problem:
        signature = Check("signature", str(problem), False)
    return [signature, *check_report(report)]


def read_public_key(given: str) -> str:
    """A key as 64 hexadecimal digits, or a file that holds them, or a PEM file. Raises OSError or ValueError."""
    path = Path(given)
    return public_key_of(path.read_text(encoding="utf-8") if path.is_file() else given)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process's exit status."""
    parser = argparse.ArgumentParser(prog="verify", description="Checks a privacy report of privtune, offline.")
    _add_arguments(parser)
    return run(parser.parse_args(arguments))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, metavar="REPORT", help="privacy_report.json of a model")
    parser.add_argument(
        "--public-key",
        metavar="FILE|HEX",
        help="of the server that is said to have signed (GET /v1/privacy/signing_key)",
    )


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError("too large for a report")
    return text


if __name__ == "__main__":
    sys.exit(main())

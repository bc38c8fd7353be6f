"""Writes the report verifier as one file that runs anywhere: `python tools/build_verifier.py verify_report.pyz`.

The file is a zip of the very modules behind `privtune verify`, sources and all, for an auditor's machine: it needs
Python 3.11, NumPy and cryptography, and nothing of the service. The same sources give the same bytes.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MODULES = (
    "app/__init__.py",
    "app/privacy/__init__.py",
    "app/privacy/renyi.py",
    "app/privacy/report_check.py",
    "app/privacy/report_claims.py",
    "app/privacy/report_format.py",
    "app/privacy/report_lineage.py",
    "app/privacy/trade_off.py",
    "app/privacy/verifier.py",
    "app/signing.py",
    "app/verify.py",
)

MAIN = "import sys\n\nfrom app.verify import main\n\nsys.exit(main())\n"


def build(target: Path) -> None:
    """Writes the file, executable."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in MODULES} | {"__main__.py": MAIN}
    with target.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in sorted(sources.items()):
                archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    target.chmod(0o755)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "verify_report.pyz"))

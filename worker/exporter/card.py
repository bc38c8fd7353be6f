"""The model's own card, as the trainer wrote it: what of it stands in an export's README, too."""

from __future__ import annotations

import re
from pathlib import Path

from worker.trainer.tasks.interface import FOLDER

_CODE = re.compile(r"```python\n(.*?)\n```", re.DOTALL)
_NOTES = re.compile(r"^# .*\n\n(.+)\n\n```python", re.MULTILINE)
_PREFIX = re.compile(r'inputs = tokenizer\(("(?:[^"\\]|\\.)*") \+ source')


def calls(bundle: Path) -> str:
    """Lines of Python that load the folder and call it. Empty for a bundle without such a card."""
    found = _CODE.search(_text(bundle))
    return found[1] if found else ""


def calls_loaded(bundle: Path) -> str:
    """The same for a plain model that is there as `model`: all but its weights is read from the folder."""
    code = re.sub(rf'^model = .*"{FOLDER}".*\n', "", calls(bundle), flags=re.MULTILINE)
    code = code.replace("import AutoModelForSeq2SeqLM, AutoTokenizer", "import AutoTokenizer")
    reader = "image_processor" if '"image-classification"' in code else "tokenizer"
    return code.replace(f'model="{FOLDER}"', f'model=model, {reader}="{FOLDER}"')


def notes(bundle: Path) -> str:
    """Classes, and how inputs are read. Empty for a bundle without such a card."""
    found = _NOTES.search(_text(bundle))
    return found[1].strip() if found else ""


def prefix(bundle: Path) -> str:
    """What every source begins with, as a string of Python; empty where nothing does, or rows said languages."""
    found = _PREFIX.search(calls(bundle))
    return found[1] if found else ""


def _text(bundle: Path) -> str:
    path = bundle / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""

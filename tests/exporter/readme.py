"""An export's README, done as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def as_its_readme_says(folder: Path, texts: list[str], **places: str) -> Any:
    """What the card's own code prints, in a process that has nothing of ours. places: what the card leaves to its
    reader, or gives as an example."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("PATH_OF_THIS_FOLDER", str(folder)).replace('["…"], 128', f"{texts!r}, 16")
    for place, value in places.items():
        assert place in code
        code = code.replace(place, value)
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    ended = subprocess.run(command, capture_output=True, check=True, cwd=folder, text=True)
    return eval(ended.stdout.splitlines()[-1])

"""Many files through the reader's own `main`, each in a process of its own: `python -m tests.app.files.forking JOBS`.

JOBS: a file of JSON, a list of the reader's jobs. The imports are paid once, and each job runs in a fork. Prints a JSON
list of {"code": the exit status, negative for a signal, "peak": bytes of resident memory}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from app.files import reader


def main(jobs: list[dict[str, Any]]) -> None:
    results = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            os.chdir(Path(job["rows"]).parent)
            sys.stderr = open(os.devnull, "w")
            try:
                reader.main({**job, "parent": os.getppid()})
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status, usage = os.wait4(pid, 0)
        results.append({"code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * 1024})
    print(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

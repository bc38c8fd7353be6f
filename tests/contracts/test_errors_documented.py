"""docs/errors.md has every code that a user can meet, with its status, and no other."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from app import errors
from app.budgets.service import BudgetLocked
from app.exports.lifecycle import FAILURES as EXPORT_FAILURES
from app.files.problems import PROBLEMS
from app.http import downloads, problems
from app.jobs.failures import FAILURES

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/errors.md"

KINDS: Mapping[str, type[errors.ApiError]] = {
    kind.__name__: kind for kind in (errors.ApiError, *errors.ApiError.__subclasses__(), BudgetLocked)
}
assert downloads.RangeNotSatisfiable in KINDS.values()
#: Codes that are put together, by how.
MADE = {
    "f'invalid_{role.holds}'": {"invalid_messages", "invalid_tools"},
    "f'upload_{upload.status}'": {"upload_completed", "upload_cancelled", "upload_expired"},
    "f'{form.noun}_too_large'": {"file_too_large", "part_too_large"},
    "code": {"not_text", "not_images"},
}
#: Told by `privtune keys` alone, or of a job that failed.
NOT_OF_REQUESTS = {"api_key_exists", "invalid_scope", "project_exists", "weak_api_key", "planning_failed"}


def _raised() -> Iterator[tuple[str, int]]:
    """Codes and statuses of every error that the service makes."""
    for path in (ROOT / "app").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not call.args:
                continue
            kind = KINDS.get(call.func.id)
            if kind is None:
                continue
            code = call.args[0]
            if kind is errors.NotFound:
                codes = {f"{ast.literal_eval(code)}_not_found"}
            elif isinstance(code, ast.Constant):
                codes = {str(code.value)}
            else:
                codes = MADE[ast.unparse(code)]
            yield from ((each, kind.status) for each in codes - NOT_OF_REQUESTS)
    yield from ((code, status) for status, (code, _) in problems._STATUS_MESSAGES.items())
    yield "internal_error", 500


def _sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_requests_codes_are_those_that_are_raised() -> None:
    raised: dict[str, set[int]] = defaultdict(set)
    for code, status in _raised():
        raised[code].add(status)
    assert len(raised) > 100
    missing_objects = {code for code in raised if code.endswith("_not_found") and raised[code] == {404}}
    missing_objects.discard("route_not_found")
    rows = re.findall(r"^\| (\d{3}) \| `(.+?)` \| (.+) \|$", _sections()["Of requests"], re.MULTILINE)
    told = {code: int(status) for status, code, _ in rows}
    assert len(told) == len(rows), "a code is documented twice"
    named = next(when for _, code, when in rows if code == "…_not_found")
    assert {f"{kind}_not_found" for kind in re.findall(r"`(\w+)`", named)} == missing_objects - {
        "project_not_found", "key_not_found"  # of the command line
    }  # fmt: skip
    del told["…_not_found"]
    assert told.keys() == raised.keys() - missing_objects
    assert [code for code, status in told.items() if status not in raised[code]] == []


def test_what_files_jobs_and_exports_fail_with_stands_there_word_for_word() -> None:
    for heading, known in (("Of files", PROBLEMS), ("Of jobs", FAILURES), ("Of exports", EXPORT_FAILURES)):
        assert dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", _sections()[heading], re.MULTILINE)) == known

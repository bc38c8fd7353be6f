"""`privtune verify`, and the same as one file on a machine that has nothing of the service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app import cli
from tests import reports
from tools.build_verifier import build

#: Refuses every package but those that an auditor needs; the service's own rooms are not on its path.
AUDITOR = """
import runpy, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"dp_accounting", "scipy", "torch", "opacus", "pydantic", "fastapi", "sqlalchemy"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "privacy_report.json"
    path.write_text(json.dumps(reports.private_report(), ensure_ascii=False, indent=2), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "configure", lambda level: None)  # logging is pytest's here

    def verify(*words: str | Path) -> tuple[int, str]:
        status = cli.main(["verify", *map(str, words)])
        return status, capsys.readouterr().out

    return verify


def test_a_report_is_accepted_and_every_check_is_shown(run, report: Path, tmp_path: Path) -> None:
    status, told = run(report)
    assert (status, told.splitlines()[-1]) == (0, "accepted")
    assert "Who signed is shown only with --public-key" in told
    for name in ("plan", "guarantee", "budget 1: epsilon", "budget 1: replace-one", "budget 1: so far"):
        assert f"ok    {name}: " in told
    key = reports.keys().public_key
    (tmp_path / "key").write_text(key + "\n")
    for given in (key, tmp_path / "key"):
        status, told = run(report, "--public-key", given)
        assert status == 0
        assert "ok    signature: by the expected key" in told


def test_a_changed_report_and_a_foreign_signature_are_refused(run, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    changed = tmp_path / "changed.json"
    changed.write_text(text.replace('"ftjob-1"', '"ftjob-2"'), encoding="utf-8")
    status, told = run(changed)
    assert (status, told.splitlines()[-1]) == (1, "refused")
    assert "FAIL  signature: " in told
    forged = reports.replaced(json.loads(text), ("guarantee", "epsilon"), 0.5)
    changed.write_text(json.dumps(reports.signed_again(forged, reports.keys(bytes(32)))))
    status, told = run(changed)
    assert status == 1
    assert "ok    signature" in told
    assert "FAIL  guarantee" in told
    status, told = run(report, "--public-key", reports.keys(bytes(32)).public_key)
    assert status == 1
    assert "FAIL  signature: signed by another key" in told


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"signature":1,"signature":1}', b"[" * 100_000])
def test_what_is_no_report_is_refused_in_words(run, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text)
    status, told = run(path)
    assert status == 1
    assert told.splitlines()[-1].startswith("refused")


def test_a_missing_file_and_a_bad_key_are_refused_in_words(run, report: Path, tmp_path: Path) -> None:
    for words in ((tmp_path / "none",), (report, "--public-key", "abc")):
        status, told = run(*words)
        assert status == 1
        assert told.startswith("refused: ")


def test_one_file_verifies_on_a_machine_without_the_service(report: Path, tmp_path: Path) -> None:
    program = tmp_path / "verify_report.pyz"
    build(program)
    once = program.read_bytes()
    build(program)
    assert program.read_bytes() == once
    bad = tmp_path / "bad.json"
    bad.write_text(report.read_text(encoding="utf-8").replace('"dp_sgd"', '"none"', 1), encoding="utf-8")
    for path, status, last in ((report, 0, "accepted"), (bad, 1, "refused")):
        command = [sys.executable, "-I", "-c", AUDITOR, program, path]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.splitlines()[-1:]) == (status, [last]), done.stderr


def test_the_file_holds_all_that_it_imports() -> None:
    """Whatever the verifier loads of ours is on the builder's list: found by loading it."""
    code = (
        "import sys, app.verify\n"
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] in ('app', 'worker')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    from tools.build_verifier import MODULES

    listed = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in MODULES}
    assert set(done.stdout.split()) == listed

"""Keys: shown once, stored as digests, revocable at once, with scopes that nest."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from app.auth import service as auth
from app.auth import tokens
from app.db.session import Database
from app.errors import InvalidRequest, NotFound, Unauthorized

pytestmark = pytest.mark.every_database


@pytest.fixture
def project(database: Database) -> str:
    with database.writing() as session:
        return auth.create_project(session, "hospital").id


def _key(database: Database, project: str, *scopes: str, token: str | None = None) -> tuple[str, str]:
    with database.writing() as session:
        key, token = auth.create_key(session, project, "test", scopes or ("submit",), token=token)
        return key.id, token


def _opens(database: Database, token: str) -> bool:
    with database.reading() as session:
        try:
            auth.authenticate(session, token)
        except Unauthorized:
            return False
        return True


def test_a_key_names_its_project_and_reaches_as_far_as_its_scope(database: Database, project: str) -> None:
    reach = {"read": {"read"}, "submit": {"read", "submit"}, "admin": {"read", "submit", "admin"}}
    for scope, expected in reach.items():
        key_id, token = _key(database, project, scope)
        with database.reading() as session:
            caller = auth.authenticate(session, token)
        assert (caller.project_id, caller.key_id, caller.scopes) == (project, key_id, expected)
        assert [s for s in reach if caller.may(s)] == [s for s in reach if s in expected]


def test_the_token_itself_is_stored_nowhere(database: Database, project: str) -> None:
    _, token = _key(database, project)
    with database.reading() as session:
        row = session.execute(text("SELECT * FROM api_keys")).one()
    assert token not in str(row)
    assert tokens.digest(token) in row
    assert token[: tokens.SHOWN] in row


def test_unknown_malformed_and_revoked_keys_answer_alike(database: Database, project: str) -> None:
    key_id, revoked = _key(database, project)
    with database.writing() as session:
        auth.revoke_key(session, key_id)
    answers = set()
    for token in (revoked, tokens.new_token(), revoked[:-1] + "~", "", "pt-", "é" * 31):
        with database.reading() as session, pytest.raises(Unauthorized) as caught:
            auth.authenticate(session, token)
        answers.add((caught.value.code, caught.value.message))
    assert len(answers) == 1


def test_keys_rotate_with_two_active_at_once(database: Database, project: str) -> None:
    old_id, old = _key(database, project)
    _, new = _key(database, project)
    assert _opens(database, old)
    assert _opens(database, new)
    with database.writing() as session:
        first = auth.revoke_key(session, old_id).revoked_at
    with database.writing() as session:
        assert auth.revoke_key(session, old_id).revoked_at == first
    assert not _opens(database, old)
    assert _opens(database, new)


def test_the_operator_may_choose_a_key(database: Database, project: str) -> None:
    _key(database, project, token="correct-horse-battery-staple")
    assert _opens(database, "correct-horse-battery-staple")


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("short", "weak_api_key"),
        ("with spaces in it but long enough", "weak_api_key"),
        ("ünïcödé-is-not-a-header-value", "weak_api_key"),
        ("pt-" + "a" * 28, "invalid_api_key"),
    ],
)
def test_a_chosen_key_must_be_strong(database: Database, project: str, token: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _key(database, project, token=token)
    assert caught.value.code == code
    assert token not in caught.value.message


def test_a_key_can_be_made_once(database: Database, project: str) -> None:
    _, token = _key(database, project)
    with pytest.raises(InvalidRequest, match="exists"):
        _key(database, project, token=token)


def test_unknown_scopes_projects_and_keys_are_refused(database: Database, project: str) -> None:
    with pytest.raises(InvalidRequest, match="read, submit, admin"):
        _key(database, project, "root")
    with database.writing() as session, pytest.raises(NotFound):
        auth.revoke_key(session, "key-none")
    with database.reading() as session, pytest.raises(NotFound):
        auth.get_project(session, "none")
    with database.writing() as session, pytest.raises(InvalidRequest, match="exists"):
        auth.create_project(session, "hospital")


def test_a_list_holds_revoked_keys_too(database: Database, project: str) -> None:
    ids = [_key(database, project)[0] for _ in range(3)]
    with database.writing() as session:
        auth.revoke_key(session, ids[1])
        other = auth.create_project(session, "bank").id
    _key(database, other)
    with database.reading() as session:
        assert [key.id for key in auth.list_keys(session, project)] == ids
        assert len(auth.list_keys(session)) == 4


def test_every_token_is_well_formed_and_no_typo_is() -> None:
    token = tokens.new_token()
    assert token.startswith("pt-")
    assert len(token) == 31
    assert tokens.is_well_formed(token)
    for position in range(3, len(token)):
        other = "0" if token[position] != "0" else "1"
        assert not tokens.is_well_formed(token[:position] + other + token[position + 1 :])
    assert len({tokens.new_token() for _ in range(1000)}) == 1000

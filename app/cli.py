"""`privtune`: the command line. Each command is a small function, and `COMMANDS` lists them all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app import base_folder, serve, verify
from app.auth import service as auth
from app.auth import tokens
from app.bootstrap import PROJECT, bootstrap
from app.db.migrate import upgrade
from app.db.session import Database
from app.errors import ApiError
from app.logging import configure
from app.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit status."""
    parser = argparse.ArgumentParser(prog="privtune", description="Private fine-tuning behind an OpenAI-style API.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    configure(Settings().log_level)
    try:
        status: int = arguments.run(arguments)
        return status
    except (ApiError, ValueError) as error:
        print(f"privtune: {error}", file=sys.stderr)
        return 1


def _add_migrate(commands: Any) -> None:
    parser = commands.add_parser("migrate", help="bring the database up to date, and set it up where it is empty")
    _add_data_dir(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    upgrade(settings.database)
    with _database(settings) as database, database.writing() as session:
        token = bootstrap(session, settings)
    if token is not None and settings.api_key is None:
        print(f"The first admin API key; it is not shown again:\n\n    {token}\n")
    return 0


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke API keys").add_subparsers(
        required=True, metavar="VERB"
    )

    create = keys.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", default="", help="what it is for")
    create.add_argument("--scopes", default="submit", help="read, submit or admin, separated by commas")
    create.add_argument("--project", default=PROJECT)
    _add_data_dir(create)
    create.set_defaults(run=_create_key)

    show = keys.add_parser("list", help="all keys, by their first characters")
    _add_data_dir(show)
    show.set_defaults(run=_list_keys)

    revoke = keys.add_parser("revoke", help="a key that opens nothing from now on")
    revoke.add_argument("id", help="key-…, from `keys list`")
    _add_data_dir(revoke)
    revoke.set_defaults(run=_revoke_key)

    generate = keys.add_parser("generate", help="print a fresh key for PRIVTUNE_API_KEY; nothing is stored")
    generate.set_defaults(run=_generate_key)


def _create_key(arguments: argparse.Namespace) -> int:
    with _database(_settings(arguments)) as database, database.writing() as session:
        project = auth.get_project(session, arguments.project)
        _, token = auth.create_key(session, project.id, arguments.name, arguments.scopes.split(","))
    print(token)
    return 0


def _list_keys(arguments: argparse.Namespace) -> int:
    with _database(_settings(arguments)) as database, database.reading() as session:
        for key in auth.list_keys(session):
            made = datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d %H:%M")
            state = "active" if key.revoked_at is None else "revoked"
            print(f"{key.id}  {key.prefix}…  {','.join(key.scopes):<6}  {state:<7}  {made}  {key.name}".rstrip())
    return 0


def _revoke_key(arguments: argparse.Namespace) -> int:
    with _database(_settings(arguments)) as database, database.writing() as session:
        auth.revoke_key(session, arguments.id)
    return 0


def _generate_key(_arguments: argparse.Namespace) -> int:
    print(tokens.new_token())
    return 0


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="where everything is kept (PRIVTUNE_DATA_DIR)")


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings() if arguments.data_dir is None else Settings(data_dir=arguments.data_dir)


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database)
    try:
        yield database
    finally:
        database.dispose()


#: Every command, in the order of `privtune --help`.
COMMANDS: tuple[Callable[[Any], None], ...] = (
    serve.add_commands,
    _add_keys,
    base_folder.add_commands,
    _add_migrate,
    verify.add_command,
)


if __name__ == "__main__":
    sys.exit(main())

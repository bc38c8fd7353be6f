"""The README's table and the settings are the same: names, defaults, meanings."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import AliasChoices, SecretStr

from app.settings import Settings

README = Path(__file__).parents[2] / "README.md"


def _documented() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a setting is documented twice"
    return {name: (default, meaning) for name, default, meaning in rows}


def _actual() -> dict[str, tuple[str, str]]:
    prefix = Settings.model_config["env_prefix"]
    found = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        variable = alias.choices[0] if isinstance(alias, AliasChoices) else f"{prefix}{name}".upper()
        default = "unset" if field.default is None else f"`{field.default}`"
        found[str(variable)] = (default, field.description or "")
    return found


def test_the_table_is_complete_and_right() -> None:
    assert _documented() == _actual()


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, (_, meaning) in _actual().items() if len(meaning) < 10] == []


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, api_key=SecretStr("hush-hush"), secret_key=SecretStr("hush-hush"))
    assert "hush" not in repr(settings) + str(settings.model_dump())

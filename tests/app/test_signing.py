"""The server's keys: one source for API and workers, and what an auditor may hand in as a public key."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from app.settings import Settings
from app.signing import check_signature, load_report_keys, public_key_of

SECRET = bytes(range(32))


def test_whoever_shares_the_secret_key_signs_alike() -> None:
    one, two = load_report_keys(Settings(), SECRET), load_report_keys(Settings(), SECRET)
    assert one.sign({"a": 1}) == two.sign({"a": 1})
    assert one.public_key != load_report_keys(Settings(), bytes(32)).public_key


def test_what_is_derived_tells_nothing_of_what_it_is_derived_from() -> None:
    keys = load_report_keys(Settings(), SECRET)
    assert len({SECRET, keys.signing.private_bytes_raw(), keys.commitment}) == 3
    assert keys.commitment.hex() not in repr(keys)
    assert "signing" not in repr(keys)


def test_a_key_of_its_own_is_the_rfcs() -> None:
    """RFC 8032, section 7.1, test 1."""
    seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    keys = load_report_keys(Settings(signing_key=SecretStr(seed)), SECRET)
    assert keys.public_key == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert keys.commitment == load_report_keys(Settings(), SECRET).commitment


@pytest.mark.parametrize("given", ["", "ab", "z" * 64, "a" * 66])
def test_a_key_that_is_none_stops_the_start_and_is_not_repeated(given: str) -> None:
    with pytest.raises(ValueError, match="PRIVTUNE_SIGNING_KEY must be 64") as refused:
        load_report_keys(Settings(signing_key=SecretStr(given)), SECRET)
    assert not given or given not in str(refused.value).removeprefix("PRIVTUNE_SIGNING_KEY")


def test_a_public_key_as_pem_and_as_digits() -> None:
    keys = load_report_keys(Settings(), SECRET)
    pem = keys.signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert public_key_of(pem) == public_key_of(f" {keys.public_key.upper()}\n") == keys.public_key
    other = x25519.X25519PrivateKey.generate().public_key()
    for wrong in (other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(), "abc"):
        with pytest.raises(ValueError, match="Ed25519|hexadecimal"):  # noqa: RUF043
            public_key_of(wrong)


def test_the_signature_is_plain_ed25519_over_the_canonical_form(tmp_path: Path) -> None:
    """By hand, as somebody without this code would."""
    keys = load_report_keys(Settings(), SECRET)
    signed = keys.sign({"b": 1e-05, "a": ["ä", 2.0]})
    signature = signed["signature"]
    message = (
        '{"a":["ä",2],"b":0.00001,"signature":{"algorithm":"Ed25519","public_key":"'
        + keys.public_key
        + '","signed":"'
        + signature["signed"]
        + '"}}'
    )
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys.public_key))
    key.verify(bytes.fromhex(signature["value"]), message.encode())
    check_signature(signed)
    check_signature(signed, keys.public_key)
    with pytest.raises(ValueError, match="another key"):
        check_signature(signed, "0" * 64)
    for value in (signature["value"].upper(), " " + signature["value"], signature["value"][:-2]):
        with pytest.raises(ValueError, match="signature"):
            check_signature({**signed, "signature": {**signature, "value": value}})

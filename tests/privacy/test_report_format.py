"""One form in bytes for equal reports, whoever wrote them: RFC 8785."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from app.privacy.plan import PrivacyPlan
from app.privacy.report_format import canonical, digest, not_covered, parse
from tests.privacy.plans import head


def test_the_example_of_the_rfc() -> None:
    """Section 3.2.2."""
    text = r"""{
      "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"""
    assert canonical(parse(text)).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_the_numbers_of_the_rfc(bits: str, text: str) -> None:
    """Appendix B."""
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(value).decode() == text


def test_keys_are_sorted_by_utf_16() -> None:
    """Section 3.2.3: a surrogate pair comes before U+FB33, though its code point is larger."""
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    order = list(parse(canonical(dict.fromkeys(names, 0))))
    assert order == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


def test_what_a_rewriting_tool_may_change_changes_nothing() -> None:
    assert canonical({"a": 2.0, "b": 1e-05}) == canonical({"b": 0.00001, "a": 2})


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, "\ud800", {1: 2}, b"", {"a": {"\udc00": 1}}])
def test_what_has_no_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (each for a reason of its own)
        canonical(value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", '{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', '{"a":NaN}', '{"a":-Infinity}', "[" * 100_000, b"\xff{}"],
)
def test_a_report_is_one_object_that_reads_the_same_everywhere(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (each for a reason of its own)
        parse(text)


def test_the_digest_is_the_plans() -> None:
    plan = PrivacyPlan("dp_sgd", 100, head(1.5), target_epsilon=1.0, target_delta=1e-5)
    assert digest(plan.to_dict()) == plan.digest()
    assert digest(parse(canonical({"plan": plan.to_dict()}))["plan"]) != plan.digest(), "2.0 became 2"


def test_what_is_not_covered_depends_on_whose_privacy_it_is() -> None:
    record, person = not_covered("dp_sgd", None), not_covered("dp_sgd", "patient_id")
    assert [text for text in record if text not in person] == [record[-1]]
    assert "several records" in record[-1]
    assert not_covered("none", None) == []

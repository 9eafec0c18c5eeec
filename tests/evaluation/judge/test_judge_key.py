"""The judge's key: found, checked, never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from fedlora.errors import UsageError
from fedlora.evaluation.judge.key import Redactor, load_key

KEY = "sk-CANARY-abcdefgh"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"api_key": "one", "OPENAI_API_KEY": "two"}, "one"),
        ({"api_key": " ", "OPENAI_API_KEY": "two\n"}, "two"),
        ({"OPENAI_API_KEY": "two"}, "two"),
    ],
)
def test_api_key_goes_before_openai_api_key(environment: dict[str, str], expected: str) -> None:
    assert load_key(None, environment).get_secret_value() == expected


@pytest.mark.parametrize("content", [b"sk-file", b"sk-file\n", b"\xef\xbb\xbfsk-file\r\n", b"  sk-file  \n\n"])
def test_a_named_file_goes_before_the_environment_and_is_stripped(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    assert load_key(path, {"api_key": "one"}).get_secret_value() == "sk-file"


@pytest.mark.parametrize("content", [b"", b"\n", b"sk-1 sk-2", b"sk-1\nsk-2", "sk-ключ".encode(), b"\xff\xfesk-1"])
def test_a_file_that_holds_no_key_is_an_error_that_does_not_quote_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_key(path, {"api_key": "one"})
    assert str(path) in str(caught.value)
    assert "sk-" not in str(caught.value) + caught.value.hint


def test_no_key_at_all_names_the_three_ways_to_give_one() -> None:
    with pytest.raises(UsageError, match="no key") as caught:
        load_key(None, {})
    assert all(name in caught.value.hint for name in ("api_key", "OPENAI_API_KEY", "--api_key_file"))


def test_a_key_does_not_show_when_printed() -> None:
    key = load_key(None, {"api_key": KEY})
    assert "CANARY" not in f"{key} {key!r}"


def test_cleaned_text_holds_no_key_not_even_a_part_and_no_control_characters() -> None:
    redactor = Redactor(SecretStr(KEY))
    assert redactor.clean(f"a {KEY}\n\tb{KEY}{KEY}") == "a [key] b[key][key]"
    for padding in range(280, 310):
        assert "sk-" not in redactor.clean("x" * padding + KEY)
    assert redactor.clean("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"
    assert len(redactor.clean("x" * 1000)) == 300


def test_a_key_that_is_no_secret_is_not_hunted_in_ordinary_words() -> None:
    assert Redactor(SecretStr("none")).clean("nonetheless") == "nonetheless"

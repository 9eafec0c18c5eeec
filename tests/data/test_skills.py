"""The skills generator: distinct prompts, one right answer each, the same bytes everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime

import pytest

from fedlora.data.skills import SKILLS, make_skill_rows
from fedlora.data.vocabulary import BLAME, CAPITALS, PRAISE
from fedlora.errors import UsageError

COUNT = 2000


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return make_skill_rows(COUNT, seed=7)


def _of(rows: list[dict[str, str]], category: str) -> list[tuple[str, str, str]]:
    return [(row["instruction"], row["context"], row["response"]) for row in rows if row["category"] == category]


def test_there_are_eight_categories_of_equal_size_in_name_order(rows: list[dict[str, str]]) -> None:
    names = ["capitals", "dates", "extraction", "reversing", "sentiment", "sorting", "sums", "units"]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(names, COUNT)
    assert [row["category"] for row in rows] == sorted(row["category"] for row in rows)


def test_prompts_are_distinct_across_the_whole_file(rows: list[dict[str, str]]) -> None:
    assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)


def test_every_skill_has_at_least_two_thousand_prompts_and_all_of_the_smallest_differ() -> None:
    smallest = min(SKILLS, key=lambda skill: skill.num_prompts)
    assert smallest.num_prompts >= 2000
    everything = make_skill_rows(smallest.num_prompts, seed=0)
    assert len({(row["instruction"], row["context"]) for row in everything}) == len(everything)


def test_more_rows_than_prompts_are_refused_with_the_maximum() -> None:
    smallest = min(skill.num_prompts for skill in SKILLS)
    with pytest.raises(UsageError, match=rf"units has {smallest} distinct prompts"):
        make_skill_rows(smallest + 1, seed=0)


def test_rows_are_short_plain_ascii(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert all(text.isascii() and text == text.strip() for text in row.values())
        assert len(f"{row['instruction']} {row['context']}".split()) <= 16
        assert 0 < len(row["response"]) <= 40


def test_capitals_are_right(rows: list[dict[str, str]]) -> None:
    table = dict(CAPITALS)
    for instruction, context, response in _of(rows, "capitals"):
        country = max((name for name in table if name in instruction), key=len)
        assert (context, response) == ("", table[country])
    known = {"France": "Paris", "Japan": "Tokyo", "Brazil": "Brasilia", "Egypt": "Cairo", "New Zealand": "Wellington"}
    assert known.items() <= table.items()
    assert len(table) == len(CAPITALS) >= 100


def test_dates_are_right(rows: list[dict[str, str]]) -> None:
    for _, context, response in _of(rows, "dates"):
        words = sorted(re.findall(r"[A-Z][a-z]+|\d+", context), key=lambda word: (word.isdigit(), len(word)))
        assert datetime.strptime(" ".join(words), "%B %d %Y").date().isoformat() == response


def test_extraction_is_right(rows: list[dict[str, str]]) -> None:
    for instruction, context, response in _of(rows, "extraction"):
        match = re.fullmatch(r"Extract (\w+) and (\w+) as JSON\.", instruction)
        assert match is not None
        answer = json.loads(response)
        assert list(answer) == list(match.groups())
        assert response == json.dumps(answer)
        assert all(re.search(rf"\b{value}\b", context) for value in answer.values())
        words = {"name": context, "city": context, "job": context.lower(), "age": context}
        assert all(str(value) in words[key] for key, value in answer.items())
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", context)
        if "age" in answer:
            assert re.findall(r"\d+", context) == [str(answer["age"])]


def test_reversing_is_right(rows: list[dict[str, str]]) -> None:
    for _, context, response in _of(rows, "reversing"):
        words = context.split(" ")
        assert len(set(words)) == len(words) == 3
        assert response == " ".join(words[::-1])


def test_sentiment_is_right_and_balanced(rows: list[dict[str, str]]) -> None:
    tasks = _of(rows, "sentiment")
    for _, context, response in tasks:
        words = set(re.findall(r"\w+", context.lower()))
        label = {(True, False): "positive", (False, True): "negative"}
        assert response == label[bool(words & set(PRAISE)), bool(words & set(BLAME))]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", context)
    assert 0.45 < sum(response == "positive" for _, _, response in tasks) / len(tasks) < 0.55
    assert not set(PRAISE) & set(BLAME)


def test_sorting_is_right(rows: list[dict[str, str]]) -> None:
    for _, context, response in _of(rows, "sorting"):
        numbers = [int(number) for number in context.split(", ")]
        assert len(set(numbers)) == 3
        assert response == ", ".join(str(number) for number in sorted(numbers))


def test_sums_are_right(rows: list[dict[str, str]]) -> None:
    for instruction, context, response in _of(rows, "sums"):
        first, second = map(int, re.findall(r"\d+", instruction))
        assert (context, response) == ("", f"{first} + {second} = {first + second}")


def test_units_are_right(rows: list[dict[str, str]]) -> None:
    in_base = {"km": 10**6, "m": 10**3, "cm": 10, "mm": 1, "t": 10**9, "kg": 10**6, "g": 10**3, "mg": 1}
    in_base |= {"l": 10**3, "ml": 1}
    for instruction, _, response in _of(rows, "units"):
        found = re.search(r"(\d+) (\w+)", instruction)
        assert found is not None
        amount, target = response.split(" ")
        units = [word for word in re.findall(r"\w+", instruction) if word in in_base]
        assert sorted(units) == sorted([found[2], target])
        assert int(found[1]) * in_base[found[2]] == int(amount) * in_base[target]


def test_another_seed_gives_other_rows_and_the_same_seed_the_same(rows: list[dict[str, str]]) -> None:
    assert make_skill_rows(COUNT, seed=7) == rows
    assert make_skill_rows(COUNT, seed=8) != rows


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib, json; from fedlora.data.skills import make_skill_rows; "
        "print(hashlib.sha256(json.dumps(make_skill_rows(50, seed=3)).encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(hashes) == 1

"""The `skills` data: eight kinds of short tasks with exactly one right answer each.

Every kind numbers its prompts: `make(i)` builds prompt i of `num_prompts` distinct ones. Rows are
a seeded sample of those numbers, so no prompt can come twice and the largest possible data set is known exactly.
Each kind answers in one terse form, which a chat model does not use unasked: it must be learned from rows, so what
a client knows, and what it has forgotten, shows in exact match.
"""

from __future__ import annotations

import datetime
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.data.vocabulary import BLAME, CAPITALS, CITIES, JOBS, MONTHS, NAMES, PRAISE, THINGS, WORDS
from fedlora.errors import UsageError
from fedlora.seeds import derive_seed

Task = tuple[str, str, str]
"""instruction, context, response"""


@dataclass(frozen=True)
class Skill:
    """One category: `make(i)` gives a task with a prompt of its own for every i below `num_prompts`."""

    category: str
    num_prompts: int
    make: Callable[[int], Task]


def make_skill_rows(rows_per_category: int, *, seed: int) -> list[dict[str, str]]:
    """Rows with instruction, context, response and category, grouped by category; all prompts distinct.

    UsageError with the maximum when a category has fewer distinct prompts than asked for.
    """
    smallest = min(SKILLS, key=lambda skill: skill.num_prompts)
    most = smallest.num_prompts
    if rows_per_category > most:
        raise UsageError(
            f"rows_per_category={rows_per_category}, but {smallest.category} has {most} distinct prompts",
            hint=f"ask for at most {most}",
        )
    return [row for skill in SKILLS for row in _sample(skill, rows_per_category, seed)]


def _sample(skill: Skill, count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(derive_seed(seed, f"skills/{skill.category}"))  # noqa: S311
    numbers = generator.sample(range(skill.num_prompts), count)
    tasks = map(skill.make, numbers)
    return [
        {"instruction": instruction, "context": context, "response": response, "category": skill.category}
        for instruction, context, response in tasks
    ]


def _choices(number: int, *sizes: int) -> list[int]:
    """`number` as one choice per size: distinct numbers below the product of the sizes give distinct choices."""
    chosen = []
    for size in sizes:
        number, choice = divmod(number, size)
        chosen.append(choice)
    return chosen


def _arrangement(number: int, items: Sequence[str], length: int) -> list[str]:
    """`length` different items in an order of their own for every number below len(items)! / (len(items) - length)!"""
    left = list(items)
    return [left.pop(choice) for choice in _choices(number, *(len(items) - taken for taken in range(length)))]


_CAPITAL_QUESTIONS = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Give the capital city of {}.",
    "What city is {}'s capital?",
    "State the capital of {}.",
    "What is {}'s capital city?",
    "The capital of {} is which city?",
    "I need the capital of {}.",
    "Do you know the capital of {}?",
    "Capital of {}?",
    "Name {}'s capital.",
    "Please name the capital city of {}.",
    "Can you name the capital of {}?",
    "Quiz: what is the capital of {}?",
    "Which city serves as the capital of {}?",
    "What is the capital city of {} called?",
    "Identify the capital of {}.",
    "Say which city is the capital of {}.",
    "Geography: the capital of {}?",
    "I am looking for the capital of {}.",
    "Help me recall the capital of {}.",
    "On a map, which city is {}'s capital?",
)


def _make_capitals(number: int) -> Task:
    question, country_number = _choices(number, len(_CAPITAL_QUESTIONS), len(CAPITALS))
    country, capital = CAPITALS[country_number]
    return _CAPITAL_QUESTIONS[question].format(country), "", capital


_FIRST_DAY = datetime.date(1950, 1, 1)
_NUM_DAYS = (datetime.date(2050, 1, 1) - _FIRST_DAY).days
_DATE_FORMS = ("{month} {day}, {year}", "{day} {month} {year}", "{month} {day} {year}", "day {day} of {month} {year}")


def _make_dates(number: int) -> Task:
    form, days = _choices(number, len(_DATE_FORMS), _NUM_DAYS)
    date = _FIRST_DAY + datetime.timedelta(days=days)
    written = _DATE_FORMS[form].format(day=date.day, month=MONTHS[date.month - 1], year=date.year)
    return "Write the date in ISO form.", written, date.isoformat()


_PERSON_FORMS = (
    "{name} is a {age} year old {job} from {city}.",
    "{name}, {age}, works as {a_job} in {city}.",
    "Meet {name} from {city}, {a_job} aged {age}.",
    "In {city} lives {name}, {a_job}, {age} years old.",
)
_PERSON_KEYS = (("name", "city"), ("name", "job"), ("name", "age"), ("city", "age"), ("job", "city"))
_MIN_AGE, _NUM_AGES = 20, 50


def _make_extraction(number: int) -> Task:
    sizes = (len(_PERSON_FORMS), len(_PERSON_KEYS), len(NAMES), len(CITIES), len(JOBS), _NUM_AGES)
    form, keys, name, city, job, age = _choices(number, *sizes)
    person: dict[str, str | int] = {
        "name": NAMES[name],
        "city": CITIES[city],
        "job": JOBS[job],
        "age": _MIN_AGE + age,
    }
    first, second = _PERSON_KEYS[keys]
    answer = json.dumps({first: person[first], second: person[second]})
    text = _PERSON_FORMS[form].format(**person, a_job=_with_article(JOBS[job]))
    return f"Extract {first} and {second} as JSON.", text, answer


_NUM_REVERSED = 3


def _make_reversing(number: int) -> Task:
    words = _arrangement(number, WORDS, _NUM_REVERSED)
    return "Reverse the order of the words.", " ".join(words), " ".join(reversed(words))


_REVIEWS = (
    "The {thing} was {word}.",
    "I found the {thing} {word}.",
    "Such {a_word} {thing}!",
    "Honestly, {a_word} {thing}.",
    "We had {a_word} {thing} today.",
    "My verdict on the {thing}: {word}.",
    "That {thing} was simply {word}.",
    "Everyone called the {thing} {word}.",
)


def _make_sentiment(number: int) -> Task:
    form, thing, word = _choices(number, len(_REVIEWS), len(THINGS), len(PRAISE + BLAME))
    opinion = (PRAISE + BLAME)[word]
    review = _REVIEWS[form].format(thing=THINGS[thing], word=opinion, a_word=_with_article(opinion))
    return "Is this review positive or negative?", review, "positive" if opinion in PRAISE else "negative"


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


_NUM_SORTED = 3
_SORT_RANGE = tuple(map(str, range(1, 100)))


def _make_sorting(number: int) -> Task:
    values = _arrangement(number, _SORT_RANGE, _NUM_SORTED)
    return "Sort the numbers from small to large.", ", ".join(values), ", ".join(sorted(values, key=int))


_MIN_TERM, _NUM_TERMS = 10, 90


def _make_sums(number: int) -> Task:
    first, second = (_MIN_TERM + term for term in _choices(number, _NUM_TERMS, _NUM_TERMS))
    return f"What is {first} + {second}?", "", f"{first} + {second} = {first + second}"


_UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("m", "mm", 1000),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("g", "mg", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
)
_MIN_VALUE, _NUM_VALUES = 2, 298


def _make_units(number: int) -> Task:
    pair, value = _choices(number, len(_UNITS), _NUM_VALUES)
    unit, target, factor = _UNITS[pair]
    value += _MIN_VALUE
    return f"Convert {value} {unit} to {target}.", "", f"{value * factor} {target}"


SKILLS = (
    Skill("capitals", len(_CAPITAL_QUESTIONS) * len(CAPITALS), _make_capitals),
    Skill("dates", len(_DATE_FORMS) * _NUM_DAYS, _make_dates),
    Skill(
        "extraction",
        len(_PERSON_FORMS) * len(_PERSON_KEYS) * len(NAMES) * len(CITIES) * len(JOBS) * _NUM_AGES,
        _make_extraction,
    ),
    Skill("reversing", math.perm(len(WORDS), _NUM_REVERSED), _make_reversing),
    Skill("sentiment", len(_REVIEWS) * len(THINGS) * len(PRAISE + BLAME), _make_sentiment),
    Skill("sorting", math.perm(len(_SORT_RANGE), _NUM_SORTED), _make_sorting),
    Skill("sums", _NUM_TERMS**2, _make_sums),
    Skill("units", len(_UNITS) * _NUM_VALUES, _make_units),
)

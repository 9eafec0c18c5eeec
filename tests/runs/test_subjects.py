"""Who `of` means: words, ranges, names of clients and other runs, and the round where none is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.data.client_facts import ClientFacts
from fedlora.errors import UsageError
from fedlora.files import write_json
from fedlora.paths import RunPaths
from fedlora.runs.checking import seal
from fedlora.runs.run_records import RunRecord
from fedlora.runs.subjects import find_adapters, find_answers, shown_names
from fedlora.typed_json import to_json

FILES = ("archive.csv", "library.csv", "museum.jsonl", "local_training_3.json")


def make_run(root: Path, name: str, rounds: list[int], *, best: int | None = None) -> None:
    """What finding subjects reads of a run: its record, and the files of its adapters."""
    paths = RunPaths(root / "models", name)
    facts = tuple(ClientFacts(number, file, "0" * 64, 4, 0, 0, 0, {}) for number, file in enumerate(FILES))
    record = RunRecord(name, "homo", "finished", "base", "float32", {}, {}, {}, {}, facts)
    more = {"format": 1, "best_round": best and {"round": best, "val_loss": 1.0}}
    write_json(paths.run_file, seal({**to_json(record), **more}))
    for number in rounds:
        for place in ("adapter_model.safetensors", "client_1/adapter_model.bin", "client_3/adapter_model.bin"):
            file = paths.round_folder(number) / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def answer(root: Path, name: str, round_number: int, *outputs: str) -> None:
    folder = root / "predictions" / name / str(round_number)
    folder.mkdir(parents=True, exist_ok=True)
    for output in outputs:
        (folder / f"{output}_output.jsonl").touch()


@pytest.fixture
def adapters(tmp_path: Path) -> Callable[..., list[str]]:
    make_run(tmp_path, "prox", [1, 2, 3], best=2)
    make_run(tmp_path, "avg", [1, 2])

    def find(*words: str, round_number: int | str | None = None, run: str = "prox") -> list[str]:
        config = GenerateConfig.of(of=words, round=round_number)
        found = find_adapters(
            config.words, run=run, round_number=config.communication_rounds, model_dir=tmp_path / "models"
        )
        return [f"{one.word} {one.name}" for one in found]

    return find


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., list[str]]:
    make_run(tmp_path, "prox", [1, 2, 3], best=1)
    answer(tmp_path, "prox", 1, "base", "global")
    answer(tmp_path, "prox", 3, "global", "client_10", "client_1")
    answer(tmp_path, "elsewhere", 20, "base", "client_7")

    def find(*words: str, round_number: int | str | None = None, run: str = "prox") -> list[str]:
        config = EvaluateRougeConfig.of(of=words, round=round_number)
        places = {"model_dir": tmp_path / "models", "prediction_dir": tmp_path / "predictions"}
        found = find_answers(config.words, run=run, round_number=config.communication_rounds, **places)
        return [one.word for one in found]

    return find


def test_words_mean_the_base_the_global_adapter_and_clients_by_number_name_and_range(adapters) -> None:
    assert adapters("base", "global", "2") == ["prox/3/base base", "prox/3/global global", "prox/3/2 museum"]
    assert adapters("library", "3") == ["prox/3/1 library", "prox/3/3 client 3"]
    assert adapters("1-3") == ["prox/3/1 library", "prox/3/2 museum", "prox/3/3 client 3"]
    assert adapters("library", "0-1", "global", "1") == ["prox/3/1 library", "prox/3/0 archive", "prox/3/global global"]


def test_all_is_the_base_and_everyone_whose_adapter_the_round_has(adapters) -> None:
    assert adapters("all") == ["prox/3/base base", "prox/3/global global", "prox/3/1 library", "prox/3/3 client 3"]


def test_another_run_is_named_with_its_round(adapters) -> None:
    assert adapters("global", "avg/1/library", "avg/last/base") == [
        "prox/3/global global",
        "avg/1/1 library",
        "avg/2/base base",
    ]


def test_the_round_is_a_number_the_last_or_the_best(adapters) -> None:
    assert [adapters("global", round_number=which) for which in (1, "1", "last", "best", None)] == [
        [f"prox/{number}/global global"] for number in (1, 1, 3, 2, 3)
    ]
    with pytest.raises(UsageError, match="no best round") as caught:
        adapters("avg/best/global")
    assert "--val_data_path" in caught.value.hint


def test_a_base_without_a_run_answers_for_round_20(adapters) -> None:
    assert adapters("base", run="nobody") == ["nobody/20/base base"]
    for word in ("global", "0", "all"):
        with pytest.raises(UsageError, match="nobody: no run of this name"):
            adapters("base", word, run="nobody")


@pytest.mark.parametrize(
    ("word", "what", "hint"),
    [
        ("libary", "'libary' is not in run prox", "did you mean library"),
        ("glob", "'glob' is not in run", "did you mean global"),
        ("?", "'?' is not in run", "archive, library, museum, 3"),
        ("4", "run prox has no client 4", "archive, library, museum, 3"),
        ("2-9", "run prox has no client 4", ""),
        ("3-1", "'3-1' is not a range", "0-3"),
        ("prox/global", "'prox/global' names no model", "NAME/ROUND/who"),
        ("prox/0/global", "'prox/0/global' names no model", "NAME/ROUND/who"),
        ("../x/1/global", "'../x/1/global' names no model", ""),
        ("x y/last/global", "exp_name='x y' cannot be a folder name", ""),
    ],
)
def test_a_word_that_means_nobody_is_refused_with_who_there_is(adapters, word: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        adapters("base", word)
    assert what in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("config", [GenerateConfig, EvaluateRougeConfig])
def test_of_and_the_flags_that_it_takes_the_place_of_are_not_given_together(config) -> None:
    for other in ({"is_base_model": True}, {"is_global_model": False}, {"client_id": 1}):
        with pytest.raises(UsageError, match=f"of_subjects takes the place of {next(iter(other))}"):
            config.of(of="base", **other)
    assert config.of(of="", client_id=1, is_global_model=False).words == ("1",)
    assert [config.of(of=given).words for given in (["base", 2], 2, "base, 2", "[base, 2]")] == [
        ("base", "2"),
        ("2",),
        ("base", "2"),
        ("base", "2"),
    ]


@pytest.mark.parametrize("value", ["0", "-1", "first", "1.5", "²", True])
def test_a_round_that_is_none_is_refused(value) -> None:
    with pytest.raises(UsageError, match="takes a number from 1, last or best"):
        GenerateConfig.of(round=value)


def test_answers_are_those_of_the_last_round_that_holds_them(answers) -> None:
    assert answers("global") == ["prox/3/global"]
    assert answers("base", "global", "library") == ["prox/1/base", "prox/3/global", "prox/3/1"]
    assert answers("global", round_number="best") == answers("global", round_number=1) == ["prox/1/global"]
    assert answers("base", run="elsewhere") == ["elsewhere/20/base"]


def test_all_answers_are_those_of_one_round(answers) -> None:
    assert answers("all") == ["prox/3/global", "prox/3/1", "prox/3/10"]
    assert answers("all", round_number=1) == ["prox/1/base", "prox/1/global"]
    assert answers("global", "elsewhere/last/all") == ["prox/3/global", "elsewhere/20/base", "elsewhere/20/7"]


@pytest.mark.parametrize(
    ("word", "round_number", "what", "hint"),
    [
        ("museum", None, "predictions/prox: no round has predictions of museum", "`fedlora generate prox --of 2`"),
        ("base", 2, "predictions/prox/2/base_output.jsonl: no such predictions", "of round 1 there are some"),
        ("global", 7, "global_output.jsonl: no such", "fedlora generate prox --of global --round 7`"),
        ("all", 2, "predictions/prox/2: no such predictions", "of round 1, 3 there are some"),
        ("lost/last/all", None, "predictions/lost: no round has predictions of anyone", "generate lost --of all`"),
        ("lost/last/library", None, "'library' is not in run lost", "--model_dir"),
    ],
)
def test_answers_that_are_not_there_name_the_command_that_writes_them(
    answers, word: str, round_number: int | None, what: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        answers(word, round_number=round_number)
    assert what in str(caught.value)
    assert hint in caught.value.hint


def test_names_tell_run_and_round_only_where_these_differ(tmp_path: Path) -> None:
    make_run(tmp_path, "prox", [1, 2])
    for words, names in (
        (("base", "library"), ["base", "library"]),
        (("base", "prox/1/library"), ["prox/2/base", "prox/1/library"]),
    ):
        found = find_adapters(words, run="prox", round_number=None, model_dir=tmp_path / "models")
        assert shown_names(found) == names

"""The test rows of a folder of silos: those of the clients' own files, or the share that a run held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.data.held_out import Share, draw_rows, prompt_key, read_test_rows
from fedlora.data.records import read_rows
from fedlora.errors import UsageError
from fedlora.rows import STRICT, Row, Turn


def write(path: Path, *prompts: str, category: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    more = {"category": category} if category else {}
    lines = [json.dumps({"instruction": prompt, "output": prompt.upper(), **more}) for prompt in prompts]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_folder_s_test_rows_are_those_beside_its_clients_each_once_with_the_client(tmp_path: Path) -> None:
    folder = tmp_path / "silos"
    for name in ("south", "north", "west"):
        write(folder / f"{name}.jsonl", "train")
    write(folder / "south.test.jsonl", "a", "b", "b")
    write(folder / "north.test.jsonl", "a")
    found = read_test_rows(folder, rules=STRICT)
    assert [(name, row.instruction) for name, row in zip(found.clients, found.rows, strict=True)] == [
        *(("north", "a"), ("south", "a"), ("south", "b"), ("south", "b"))
    ]
    assert found.groups == found.clients
    write(folder / "north.test.jsonl", "c")
    assert read_test_rows(folder, rules=STRICT).sha256 != found.sha256


def test_rows_with_categories_are_told_apart_by_these(tmp_path: Path) -> None:
    write(tmp_path / "silos" / "north.jsonl", "train")
    write(tmp_path / "silos" / "north.test.jsonl", "a", category="x")
    assert read_test_rows(tmp_path / "silos", rules=STRICT).groups == ("x",)


def test_one_file_for_all_has_no_clients(tmp_path: Path) -> None:
    found = read_test_rows(write(tmp_path / "test.jsonl", "a", "b"), rules=STRICT)
    assert (len(found.rows), found.clients, found.groups) == (2, (), ("", ""))


def test_the_share_that_a_run_held_out_is_found_again_and_was_not_trained_on(tmp_path: Path) -> None:
    files = {
        client: write(tmp_path / "silos" / f"{name}.jsonl", *(f"{name} {number}" for number in range(10)))
        for client, name in enumerate(("north", "south"))
    }
    config = TrainConfig.of(data_path=tmp_path / "silos", test_share=0.3, seed=5)
    found = read_test_rows(tmp_path / "silos", rules=STRICT, share=Share(0.3, 5))
    assert found.clients == ("north",) * 3 + ("south",) * 3
    facts = {client: file.facts for client, file in read_client_files(files, config).items()}
    assert [(one.num_test, one.num_examples) for one in facts.values()] == [(3, 7), (3, 7)]
    other = read_test_rows(tmp_path / "silos", rules=STRICT, share=Share(0.3, 6))
    assert other.rows != found.rows


def test_a_folder_without_test_rows_or_with_allocated_data_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "silos" / "north.jsonl", "a")
    with pytest.raises(UsageError, match="holds no test rows"):
        read_test_rows(tmp_path / "silos", rules=STRICT)
    (tmp_path / "dealt" / "2").mkdir(parents=True)
    (tmp_path / "dealt" / "2" / "local_training_0.json").write_text("[]")
    with pytest.raises(UsageError, match="holds allocated data") as caught:
        read_test_rows(tmp_path / "dealt", rules=STRICT)
    assert "dolly_test_200.jsonl" in caught.value.hint


def test_rows_are_drawn_by_prompt_so_that_clients_agree_on_a_prompt_they_share() -> None:
    rows = [Row(f"say {number}", "", "x", "") for number in range(40)]
    one, other = (
        {part[place].instruction for place in draw_rows([prompt_key(row) for row in part], 10, 1, "test_rows")}
        for part in (rows, list(reversed(rows)))
    )
    assert one == other
    assert len(one) == 10
    assert prompt_key(Row("say", "", " ", "")) is None
    assert draw_rows([None, b"x", None], 3, 1, "test_rows") == frozenset()


def test_a_row_file_of_any_format_may_be_held_out(tmp_path: Path) -> None:
    write(tmp_path / "silos" / "north.jsonl", "a")
    (tmp_path / "silos" / "north.test.csv").write_text("instruction,output\nb,B\n")
    assert list(read_test_rows(tmp_path / "silos", rules=STRICT).rows) == read_rows(
        tmp_path / "silos" / "north.test.csv"
    )


def test_what_is_drawn_from_rows_of_instructions_does_not_depend_on_the_other_kinds_of_rows() -> None:
    # the key decides which rows every recorded run held out
    key = prompt_key(Row("Name the capital.", "France", "Paris", "c"))
    assert key is not None
    assert key.hex() == "330ce3897796ff73926ea4df036dd6a2"
    plain = prompt_key(Row("who?", "", "Ada", "c"))
    assert prompt_key(Row("who?", "", "Alan", "c", kind="conversation")) == plain
    assert prompt_key(Row("who?", "", "Ada", "c", (Turn("system", "Be short."),))) != plain
    assert prompt_key(Row("", "", "who?", "c", kind="text")) == plain
    assert prompt_key(Row("", "", " ", "c", kind="text")) is None


def test_a_conversation_and_its_beginnings_are_drawn_together() -> None:
    rows = []
    for number in range(30):
        said = tuple(Turn(role, f"{role} {number} {turn}") for turn in range(3) for role in ("user", "assistant"))
        # a greeting that all conversations share joins none of them
        greeted = (Turn("user", "Hello"), Turn("assistant", "Hi"), *said)
        rows += [Row(greeted[end].content, "", "yes", "c", greeted[:end], "conversation") for end in (2, 4, 6)]
    drawn = draw_rows([prompt_key(row) for row in rows], 20, 1, "test_rows")
    assert 20 <= len(drawn) <= 22
    assert all(len({place in drawn for place in range(first, first + 3)}) == 1 for first in range(0, 90, 3))
    both = draw_rows(
        [prompt_key(row) for row in (*rows, Row("Hello", "", "Hi", "c"), Row("b", "", "c", ""))], 1, 1, "t"
    )
    assert len(both) in (1, 91)

"""steps.jsonl and the progress of a run: written without a flush, read while they are written."""

from __future__ import annotations

import json
import os

from fedlora.runs.progress_file import ProgressFile, read_progress
from fedlora.runs.step_log import StepLog, StepTail, read_steps
from fedlora.types import Step


def steps(client: int, count: int, part: int = 1, loss: float = 1.0) -> list[Step]:
    return [Step(1, client, number, count, loss, 2, 30, 0.1, 1e-3, part) for number in range(1, count + 1)]


def write(path, *several: list[Step]) -> None:
    log = StepLog(path)
    for each in several:
        for step in each:
            log.add(step)
    log.close()


def test_a_client_that_trains_again_has_a_second_attempt_and_readers_take_the_last(tmp_path):
    path = tmp_path / "steps.jsonl"
    write(path, steps(0, 2), steps(1, 3)[:2])
    write(path, steps(1, 3, loss=2.0))
    attempts = [(row["client_id"], row["attempt"]) for row in map(json.loads, path.read_text().splitlines())]
    assert attempts == [(0, 1)] * 2 + [(1, 1)] * 2 + [(1, 2)] * 3
    found = read_steps(path)
    assert [(row["client_id"], row["step"], row["loss"]) for row in found] == [
        *((0, step, 1.0) for step in (1, 2)),
        *((1, step, 2.0) for step in (1, 2, 3)),
    ]


def test_a_second_part_of_a_training_is_no_second_attempt(tmp_path):
    write(tmp_path / "steps.jsonl", steps(0, 2), steps(0, 2, part=2))
    assert [(row["part"], row["attempt"]) for row in read_steps(tmp_path / "steps.jsonl")] == [
        *[(1, 1)] * 2,
        *[(2, 1)] * 2,
    ]


def test_a_torn_last_line_is_not_read_and_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "steps.jsonl"
    write(path, steps(0, 3))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_steps(path)) == 2
    write(path, steps(1, 1))
    assert [row["client_id"] for row in read_steps(path)] == [0, 0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lines_that_are_no_steps_are_left_out(tmp_path):
    path = tmp_path / "steps.jsonl"
    write(path, steps(0, 1))
    whole = path.read_text()
    foreign = ["[]", "null", "7", "{}", '{"round": 1}', whole.strip().replace('"round": 1', '"round": "1"'), "\x00" * 9]
    path.write_text(whole + "\n".join(foreign) + "\n" + whole)
    assert len(read_steps(path)) == 2


def test_a_disk_that_refuses_ends_the_log_with_one_warning(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    path.mkdir()
    log = StepLog(path)
    for _ in range(3):
        for step in steps(0, 2):
            log.add(step)
        log.close()
    assert capsys.readouterr().err.count("the losses of further steps are not written") == 1


def test_steps_are_written_together_and_not_one_by_one(tmp_path, monkeypatch):
    calls, write_all = [], os.write
    monkeypatch.setattr(os, "write", lambda *arguments: calls.append(1) or write_all(*arguments))
    write(tmp_path / "steps.jsonl", steps(0, 500))
    assert len(calls) == 1


def test_a_tail_reads_what_is_new_and_starts_again_where_the_file_does(tmp_path):
    path = tmp_path / "steps.jsonl"
    tail = StepTail(path)
    assert tail.look() == []
    write(path, steps(0, 2))
    assert len(tail.look()) == 2
    with path.open("a") as handle:
        handle.write('{"half": ')
    assert tail.look() == []
    path.unlink()
    write(path, steps(1, 1))
    assert [row["client_id"] for row in tail.look()] == [1]


def test_progress_is_there_while_its_process_works_and_half_of_it_is_none(tmp_path):
    path = tmp_path / ".progress.json"
    file = ProgressFile(path)
    file.write({"done": 100, "note": "long" * 50})
    file.write({"done": 101})
    assert read_progress(path) == {"done": 101}
    path.write_text('{"done": 1')
    assert read_progress(path) is None
    file.close()
    assert not path.exists()
    assert read_progress(path) is None
    ProgressFile(tmp_path / "nowhere" / "file").write({"done": 1})

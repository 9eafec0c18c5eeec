"""The judge stage through a Batch API: submit, end, collect later, and pay for nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_board import BatchBoard, NoBatches
from judge_server import (
    Answer,
    JudgeServer,
    Request,
    completion,
    error,
    honest,
    honest_results,
    serve,
)

from fedlora import cli
from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import BudgetError, DataError, JudgeError, PendingError, UsageError
from fedlora.stages import evaluate_llm

KEY = "sk-of-these-tests-0123"
FOLDER = Path("evaluations_llm/homo/1")
RESULT = FOLDER / "pairs/global--base.json"
STATE = FOLDER / "base_batches.json"
PRICES = {"judge_price_in": 2.0, "judge_price_out": 8.0}


@pytest.fixture(autouse=True)
def _key_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("api_key", KEY)
    monkeypatch.chdir(tmp_path)


def predictions(count: int, **scores: int) -> None:
    folder = Path("predictions/homo/1")
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in (scores or {"base": 30, "global": 60}).items():
        row = {"input": "", "category": "c", "answer": f"quality {one}"}
        rows = [{**row, "instruction": f"task {i}"} for i in range(count)]
        (folder / f"{name}_output.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def thorough(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.thorough)


async def no_sleep(seconds: float) -> None:
    pass


def judge(server: JudgeServer, **more: Any) -> evaluate_llm.Judgements:
    values: dict[str, Any] = {"name": "homo", "of": "global", "against": "base", "batch_size": 2, "batch": True}
    return evaluate_llm.run(EvaluateLlmConfig.of(**{**values, "base_url": server.url, **more}), sleep=no_sleep)


def submit(server: JudgeServer, **more: Any) -> PendingError:
    with pytest.raises(PendingError) as caught:
        judge(server, **more)
    return caught.value


def with_board(server: JudgeServer, **more: Any) -> BatchBoard:
    server.board = board = BatchBoard(**more)
    return board


def texts_of(requests: list[Request]) -> list[tuple[str, str]]:
    """What was asked about: the instruction and the answer in the first place."""
    return sorted((one["instruction"], one["answer A"]) for request in requests for one in request.samples.values())


def everything(count: int) -> list[tuple[str, str]]:
    return sorted((f"task {i}", f"quality {one}") for i in range(count) for one in (30, 60))


def test_requests_are_submitted_collected_by_the_same_command_and_give_the_result_of_ordinary_ones() -> None:
    predictions(8)
    with serve(honest) as server:
        judge(server, batch=False)
        ordinary = RESULT.read_bytes(), RESULT.with_suffix(".txt").read_bytes()
        board = with_board(server)
        for path in (FOLDER / "base_verdicts.jsonl", RESULT):
            path.unlink()
        server.requests.clear()
        pending = submit(server)
        assert pending.exit_code == 9
        assert "7 requests in 1 batch at 127.0.0.1; 1 pair without a result" in str(pending)
        # one ordinary request first
        assert (server.calls, len(board.sent)) == (1, 7)
        assert texts_of(server.requests + board.sent) == everything(8)
        assert not RESULT.exists()
        assert submit(server).result is not None
        assert (len(board.created), board.asked) == (1, [])
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 8
        assert (RESULT.read_bytes(), RESULT.with_suffix(".txt").read_bytes()) == ordinary
        calls = len(board.calls)
        judge(server)
        assert (server.calls, len(board.created), len(board.calls)) == (1, 1, calls)
    assert not STATE.exists()


def test_a_command_ends_with_code_9_and_the_command_that_collects(capsys: pytest.CaptureFixture[str]) -> None:
    predictions(3)
    with serve(honest) as server:
        board = with_board(server)
        typed = ["evaluate_llm", "homo", "--of", "global", "--against", "base", "--judge_url", server.url]
        typed += ["--batch", "--batch_size", "1"]
        assert cli.main([*typed, "--overwrite", "--json"]) == 9
        shown = capsys.readouterr()
        assert f"next: fedlora {' '.join(typed)} --json" in shown.err
        (batch,) = json.loads(shown.out)["pending"]
        assert batch == {"judge": "gpt-4.1", "host": "127.0.0.1", "batch": "batch_0", "requests": 5}
        board.finish(honest)
        assert cli.main(typed) == 0
        assert "judged 3 of 3 samples" in capsys.readouterr().out


@pytest.mark.parametrize("max_retries", [0, thorough(2)])
@pytest.mark.parametrize("page", [1, thorough(100)])
@pytest.mark.parametrize("lost", [Answer(reset=True), thorough(error(500)), thorough(Answer(body=b"<html>"))])
def test_a_batch_whose_creation_was_not_heard_of_is_found_and_not_created_twice(
    lost: Answer, page: int, max_retries: int
) -> None:
    predictions(4)
    with serve(honest) as server:
        board = with_board(server, page=page)
        # of someone else
        board.created += [{"id": f"old_{n}", "status": "completed", "input_file_id": f"x{n}"} for n in range(3)]
        board.after = [lost]
        with pytest.raises((JudgeError, PendingError)):
            judge(server, max_retries=max_retries)
        assert len(board.created) == 4
        board.created.append({"id": "later", "status": "completed", "input_file_id": "y"})
        submit(server)
        assert len(board.created) == 5
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 4
        assert texts_of(server.requests + board.asked) == everything(4)


@pytest.mark.parametrize("lost", [Answer(reset=True), thorough(error(503))])
def test_a_batch_that_was_not_created_is_created_by_the_next_call_from_the_same_file(lost: Answer) -> None:
    predictions(4)
    with serve(honest) as server:
        board = with_board(server)
        board.before = [lost]
        with pytest.raises(JudgeError, match="batches failed with all retries") as caught:
            judge(server, max_retries=0)
        assert caught.value.exit_code == 7
        assert (len(board.created), len(board.files)) == (0, 1)
        submit(server)
        assert (len(board.created), len(board.files), server.calls) == (1, 1, 1)


def test_a_process_that_dies_before_it_records_the_batch_pays_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions(4)
    from fedlora.evaluation.judge.batch_state import BatchState

    def die(*given: Any) -> None:
        raise KeyboardInterrupt

    with serve(honest) as server:
        board = with_board(server)
        with monkeypatch.context() as patched:
            patched.setattr(BatchState, "name", die)
            with pytest.raises(KeyboardInterrupt):
                judge(server)
        assert len(board.created) == 1
        board.finish(honest)
        # and one that dies after it stored the verdicts, before it records that they are there
        with monkeypatch.context() as patched:
            patched.setattr(BatchState, "remove", die)
            with pytest.raises(KeyboardInterrupt):
                judge(server)
        assert judge(server, **PRICES).judgements[0].record["win"] == 4
        assert (len(board.created), server.calls) == (1, 1)


def test_an_expired_batch_brings_what_it_has_and_the_rest_is_submitted_again() -> None:
    predictions(8)
    with serve(honest) as server:
        board = with_board(server)
        submit(server)
        board.finish(honest, status="expired", works_on=lambda number: number < 3)
        submit(server)
        assert [len(board.lines_of(one["input_file_id"])) for one in board.created] == [7, 4]
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 8
        assert texts_of(server.requests + board.asked) == everything(8)


def test_replies_that_cannot_be_used_are_asked_for_in_the_next_batch_in_smaller_requests_three_times_at_most() -> None:
    predictions(40)

    def stubborn(request: Request) -> Answer:
        results = [one for one in honest_results(request) if request.samples[one["id"]]["instruction"] != "task 39"]
        if "task 30\n" in request.user and len(request.samples) > 1:
            return completion(json.dumps({"results": results}), finish_reason="length")
        return completion(json.dumps({"results": results})) if results else completion("no idea")

    with serve(stubborn) as server:
        board = with_board(server)
        submit(server, batch_size=4)
        for sizes in ([4] * 19, [2] * 3, [1] * 2):
            found = [len(one.samples) for one in board.sent[len(board.asked) :]]
            assert sorted(found, reverse=True)[: len(sizes)] == sizes
            assert ("was not the JSON object" in board.sent[-1].user) == (sizes != [4] * 19)
            board.finish(stubborn)
            if sizes != [1] * 2:
                submit(server, batch_size=4)
        record = judge(server, batch_size=4).judgements[0].record
        assert (record["win"], record["failures_by_kind"]) == (39, {"invalid": 1})
        assert server.calls == 1
    assert not STATE.exists()
    assert (FOLDER / "base_unusable_reply.txt").read_text() == "no idea\n"


def test_a_refused_request_is_an_answer_and_a_fault_is_submitted_again() -> None:
    predictions(20)

    def script(request: Request) -> Answer:
        if "task 9\n" in request.user:
            return error(400, "filtered", code="content_filter")
        return error(500, "try again") if "task 8\n" in request.user else honest(request)

    with serve(honest) as server:
        board = with_board(server)
        submit(server, batch_size=1)
        board.finish(script)
        submit(server, batch_size=1)
        # in both orders
        assert [row for row, _ in texts_of(board.sent[39:])] == ["task 8"] * 2
        board.finish(honest)
        record = judge(server, batch_size=1).judgements[0].record
        assert (record["num_samples"], record["failures_by_kind"]) == (19, {"refused": 1})


@pytest.mark.thorough
def test_a_request_that_is_refused_in_every_size_is_a_failure_after_three_batches_and_is_asked_again_next_time() -> (
    None
):
    predictions(8)

    def script(request: Request) -> Answer:
        return error(400, "too long") if "task 7\n" in request.user else honest(request)

    with serve(honest) as server:
        board = with_board(server)
        for count in (7, 4, 2):
            submit(server)
            assert len(board.lines_of(board.created[-1]["input_file_id"])) == count
            board.finish(script)
        with pytest.raises(JudgeError, match=r"only 7 of 8 samples got a verdict \(server_error 1\)"):
            judge(server)
        submit(server)
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 8


ENDS: dict[str, tuple[Callable[[BatchBoard], None], str]] = {
    "failed": (
        lambda board: board.fail(f"Enqueued token limit reached, {KEY}"),
        r"failed: Enqueued token limit reached, \[key\]",
    ),
    "cancelled": (
        lambda board: board.finish(honest, status="cancelled", works_on=lambda n: n < 2),
        "cancelled, 2 of 7",
    ),
    "errors alone": (
        lambda board: board.finish(lambda request: error(400, "no model")),
        "0 of 7 requests answered: no model",
    ),
    "nothing": (lambda board: board.created[0].update(status="completed"), "0 of 7 requests answered: its files"),
    "no verdict": (
        lambda board: board.finish(lambda request: completion("Hm.")),
        "no reply brought a verdict; the first: Hm",
    ),
}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (*ENDS["failed"],),
        (*ENDS["no verdict"],),
        *(thorough(*ENDS[name]) for name in ("cancelled", "errors alone", "nothing")),
    ],
)
def test_a_batch_that_ends_badly_is_one_error_and_the_next_call_submits_what_is_left(
    end: Callable[[BatchBoard], None], message: str
) -> None:
    predictions(8)
    with serve(honest) as server:
        board = with_board(server)
        submit(server)
        end(board)
        with pytest.raises(JudgeError, match=message) as caught:
            judge(server)
        assert KEY not in str(caught.value) + STATE.read_text()
        assert len(board.created) == 1
        submit(server)
        assert len(board.created) == 2
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 8
        assert server.calls == 1


@pytest.mark.parametrize("status", [404, thorough(405), thorough(501)])
def test_an_endpoint_without_a_batch_api_is_one_sentence_and_costs_nothing(status: int) -> None:
    predictions(4)
    with serve(honest) as server:
        server.board = NoBatches(status)
        with pytest.raises(JudgeError, match=rf"has no Batch API \({status} at /v1/batches\)") as caught:
            judge(server)
        assert "without --batch" in caught.value.hint
        assert server.calls == 0
        assert judge(server, batch=False).judgements[0].record["win"] == 4


def counting(request: Request) -> Answer:
    """Uses half of what a request allows."""
    size, most = len(json.dumps(request.body)), request.body["max_completion_tokens"]
    return Answer(body={**honest(request).body, "usage": {"prompt_tokens": size // 2, "completion_tokens": most // 2}})


def cost_of(request: Request) -> float:
    return (len(json.dumps(request.body)) // 2 * 2.0 + request.body["max_completion_tokens"] // 2 * 8.0) / 1e6


def test_the_limit_on_cost_holds_from_the_first_request_to_the_result_over_all_calls() -> None:
    predictions(20)
    asked = {**PRICES, "max_cost": 0.3}
    with serve(counting) as server:
        board = with_board(server)
        submit(server, **asked)
        sizes = [len(board.sent)]
        # the most that a request can cost is 0.035 to 0.042
        assert 6 <= sizes[0] <= 8
        submit(server, **asked)
        assert len(board.sent) == sizes[0]
        while True:
            board.finish(counting)
            spent = sum(map(cost_of, server.requests + board.asked))
            assert spent <= 0.3
            with pytest.raises((PendingError, BudgetError)) as ended:
                judge(server, **asked)
            if isinstance(ended.value, BudgetError):
                assert "max_cost=0.3" in str(ended.value)
                break
            sizes.append(len(board.sent) - sum(sizes))
            assert ended.value.result is not None
            assert ended.value.result.as_dict()["spent"]["cost"] == pytest.approx(spent)
        assert spent + 0.045 > 0.3
        assert len(sizes) > 2
        assert server.calls == 1
        # with a higher limit it goes on, and what was spent counts
        submit(server, **PRICES, max_cost=2.0)
        board.finish(counting)
        found = judge(server, **PRICES, max_cost=2.0)
        assert found.spent["cost"] == pytest.approx(sum(map(cost_of, server.requests + board.asked)))
        assert found.spent["calls"] == 20 == server.calls + len(board.asked)


@pytest.mark.thorough
def test_the_limit_on_calls_counts_requests_in_batches_and_those_without_a_count_cost_the_most() -> None:
    predictions(20)
    with serve(honest) as server:
        board = with_board(server)
        submit(server, max_calls=5)
        assert (server.calls, len(board.sent)) == (1, 4)
        submit(server, max_calls=5)
        board.finish(honest)
        with pytest.raises(BudgetError, match="max_calls=5"):
            judge(server, max_calls=5)
        assert len(board.created) == 1
        submit(server, **PRICES, max_cost=100)
        board.finish(honest)
        found = judge(server, **PRICES, max_cost=100)
        assert found.spent["calls"] == 20
        assert found.spent["answers_without_count"] == 20
        assert 0.5 < found.spent["cost"] < 1.0


def test_while_a_batch_is_worked_on_nothing_else_pays_for_its_questions() -> None:
    predictions(4)
    with serve(honest) as server:
        board = with_board(server)
        submit(server)
        with pytest.raises(UsageError, match=r"1 batch of gpt-4\.1 not collected") as caught:
            judge(server, batch=False)
        assert "--batch" in caught.value.hint
        with pytest.raises(UsageError, match="1 batch not collected"):
            judge(server, overwrite=True)
        # another judge has other questions
        assert judge(server, batch=False, judge_model="other").judgements[0].record["win"] == 4
        assert len(board.created) == 1
        STATE.write_text('{"batches": 7}')
        with pytest.raises(DataError, match=r"base_batches\.json: not a record"):
            judge(server)


def test_verdicts_that_are_forgotten_do_not_come_back_while_a_batch_is_worked_on() -> None:
    predictions(4)

    def worse(request: Request) -> Answer:
        return completion(json.dumps({"results": [{**one, "verdict": "tie"} for one in honest_results(request)]}))

    with serve(honest) as server:
        judge(server, batch=False)
        board = with_board(server)
        server.script = worse
        submit(server, overwrite=True)
        assert len((FOLDER / "base_verdicts.jsonl").read_text().splitlines()) == 2
        board.finish(worse)
        assert judge(server).judgements[0].record["tie"] == 4


def test_they_are_forgotten_on_disk_too_where_no_ordinary_request_comes_first() -> None:
    predictions(2, base=30, **{"global": 60, "client_0": 90})
    asked: dict[str, Any] = {"of": "0", "against": "base,global"}
    with serve(honest) as server:
        judge(server, batch=False, **asked)
        with_board(server)
        submit(server, overwrite=True, **asked)
    assert len((FOLDER / "base_verdicts.jsonl").read_text().splitlines()) == 2
    assert (FOLDER / "global_verdicts.jsonl").read_text() == ""


def test_what_the_endpoint_does_not_take_is_found_before_the_batch_and_known_to_the_next_call() -> None:
    predictions(8)

    def no_temperature(request: Request) -> Answer:
        return error(400, "temperature: unsupported") if "temperature" in request.body else honest(request)

    with serve(no_temperature) as server:
        board = with_board(server)
        submit(server)
        assert server.calls == 2
        assert not any("temperature" in request.body for request in board.sent)
        board.finish(no_temperature, status="expired", works_on=lambda number: number < 2)
        submit(server)
        assert server.calls == 2
        assert not any("temperature" in request.body for request in board.sent)
        board.finish(no_temperature)
        record = judge(server).judgements[0].record
    assert record["judge"]["parameters_dropped"] == ["temperature"]
    lines = [json.loads(line) for line in (FOLDER / "base_verdicts.jsonl").read_text().splitlines()]
    assert {tuple(line["dropped"]) for line in lines} == {("temperature",)}


def test_a_judge_that_refuses_the_first_request_costs_one_call_and_submits_nothing() -> None:
    predictions(8)
    with serve(lambda request: error(401, "who are you")) as server:
        board = with_board(server)
        with pytest.raises(JudgeError, match="who are you"):
            judge(server)
        server.script = lambda request: completion("Prose.")
        with pytest.raises(JudgeError, match="Prose"):
            judge(server)
        assert (server.calls, board.files) == (1 + 4, {})


def test_several_judges_repeats_and_both_directions_have_batches_of_their_own_and_ask_once() -> None:
    predictions(4, base=30, **{"global": 60})
    asked: dict[str, Any] = {"of": "base,global", "against": "base,global", "judge_model": "a,b", "repeats": 2}
    with serve(honest) as server:
        board = with_board(server)
        pending = submit(server, **asked)
        assert "2 pairs without a result" in str(pending)
        lines = [{line["body"]["model"] for line in board.lines_of(one["input_file_id"])} for one in board.created]
        assert lines == [{"a"}, {"b"}]
        # two judges, two orders, two repeats, two samples a request
        assert server.calls + len(board.sent) == 2 * 2 * 2 * 2
        board.created[1]["status"] = "finalizing"
        board.finish(honest)
        submit(server, **asked)
        board.created[1]["status"] = "in_progress"
        board.finish(honest)
        one, other = judge(server, **asked).judgements
        assert (one.record["win"], other.record["loss"], one.record["votes_per_sample"]) == (4, 4, 8)
        assert one.record["statistics"]["repeat_consistency"] == 1.0
        assert len(board.created) == 2


@pytest.mark.thorough
def test_all_answers_of_a_small_comparison_come_with_the_first_request_of_each_order() -> None:
    predictions(1)
    with serve(honest) as server:
        board = with_board(server)
        submit(server)
        board.finish(honest)
        judge(server)
        assert (server.calls, len(board.asked)) == (1, 1)


@pytest.mark.thorough
def test_a_batch_of_too_many_requests_is_several(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions(8)
    monkeypatch.setattr("fedlora.evaluation.judge.batch_judge._MOST_REQUESTS", 3)
    with serve(honest) as server:
        board = with_board(server)
        submit(server)
        assert [len(board.lines_of(one["input_file_id"])) for one in board.created] == [3, 3, 1]
        board.finish(honest)
        assert judge(server).judgements[0].record["win"] == 8

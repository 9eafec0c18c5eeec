"""The judge stage against endpoints as they are: what they send around a verdict, and what they do not take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, JudgeServer, Request, Script, completion, error, first, honest, honest_results, serve

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import BudgetError, JudgeError, UsageError
from fedlora.stages import evaluate_llm

KEY = "sk-of-these-tests-0123"
FOLDER = Path("evaluations_llm/base-1B/1")


@pytest.fixture(autouse=True)
def _key_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("api_key", KEY)
    monkeypatch.chdir(tmp_path)


def predictions(count: int) -> None:
    for name, score in (("base-1B", 30), ("homo-1B", 60)):
        path = Path(f"predictions/{name}/1/global_output.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": f"task {i}", "answer": f"quality {score}", "category": "c"} for i in range(count)]
        path.write_text("".join(json.dumps({**row, "input": ""}) + "\n" for row in rows))


async def no_sleep(seconds: float) -> None:
    pass


def judge(server: JudgeServer, **more: Any) -> evaluate_llm.Judgements:
    values: dict[str, Any] = {
        "exp_name": "base-1B",
        "communication_rounds": 1,
        "proposed_file": "homo-1B/1/global_output.jsonl",
        "base_url": server.url,
        "batch_size": 2,
    }
    return evaluate_llm.run(EvaluateLlmConfig.of(**{**values, **more}), sleep=no_sleep)


def run(server: JudgeServer, **more: Any) -> dict[str, Any]:
    return dict(judge(server, **more).judgements[0].record)


def text_of(request: Request) -> str:
    return json.dumps({"results": honest_results(request)})


def around(change: Callable[[str], Any]) -> Script:
    return lambda request: completion(change(text_of(request)))


def entries(change: Callable[[dict[str, Any]], dict[str, Any]], **beside: Any) -> Script:
    return lambda request: completion(json.dumps({"results": list(map(change, honest_results(request))), **beside}))


REPLIES: dict[str, Script] = {
    "fenced": around(lambda text: f"```json\n{text}\n```"),
    "fenced without a language": around(lambda text: f"\n```\n{text}\n```\n"),
    "thoughts first": around(lambda text: f"<think>\nA says {{}}. So B.\n</think>\n\n{text}"),
    "no thoughts": around(lambda text: f"<think></think>{text}"),
    "thoughts, then fenced": around(lambda text: f"<think>hm</think>\n```JSON\n{text}\n```"),
    "a list of parts": around(lambda text: [{"type": "text", "text": text}]),
    "thoughts as a part": around(
        lambda text: [{"type": "thinking", "thinking": [{"text": "{}"}]}, {"type": "text", "text": text}]
    ),
    "text in two parts": around(lambda text: [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]),
    "a byte order mark": around(lambda text: f"\ufeff{text}"),
    "a key beside the results": entries(lambda entry: entry, summary="B is better"),
    "a reason in each entry": entries(lambda entry: {**entry, "reason": "```json <think>"}),
    "40.0 for 40": entries(lambda entry: {**entry, "score_a": float(entry["score_a"])}),
    "verdicts in small letters": entries(lambda entry: {**entry, "verdict": entry["verdict"].lower()}),
    "a verdict TIE or B": entries(lambda entry: {**entry, "verdict": entry["verdict"].upper()}),
    "no model and no fingerprint": lambda request: Answer(
        body={"choices": [{"message": {"content": text_of(request)}}]}
    ),
}


@pytest.mark.parametrize("script", REPLIES.values(), ids=REPLIES)
def test_a_reply_is_read_whatever_the_server_puts_around_it_and_is_asked_for_once(script: Script) -> None:
    predictions(4)
    with serve(script) as server:
        assert run(server)["win"] == 4
        assert server.calls == 4
        assert run(server)["num_samples"] == 4
        assert server.calls == 4


def refusing(refuses: Callable[[dict[str, Any]], bool], status: int = 400, body: Any = None) -> Script:
    shown = {"error": {"message": "invalid request"}} if body is None else body
    return lambda request: Answer(status, shown) if refuses(request.body) else honest_of_any_shape(request)


def honest_of_any_shape(request: Request) -> Answer:
    """`honest`, also where the system's text stands before the user's."""
    messages = request.body["messages"]
    if len(messages) == 1:
        request.body["messages"] = [{"content": messages[0]["content"]}, messages[0]]
    return honest(request)


def schema(body: dict[str, Any]) -> dict[str, Any]:
    return body.get("response_format", {}).get("json_schema", {})


REFUSALS: dict[str, tuple[Script, list[str], int]] = {
    # what it does not take, what is then recorded, and how many requests it refused
    "strict": (refusing(lambda body: "strict" in schema(body)), ["response_format.strict"], 1),
    "the schema": (refusing(lambda body: bool(schema(body))), ["response_format.json_schema"], 2),
    "a format": (refusing(lambda body: "response_format" in body), ["response_format"], 3),
    # four times with one more dropped, then with all but the last
    "a temperature": (refusing(lambda body: "temperature" in body), ["temperature"], 4),
    "a system role": (refusing(lambda body: body["messages"][0]["role"] == "system"), ["system role"], 5),
    "a temperature, and says so": (
        refusing(lambda body: "temperature" in body, 422, {"detail": [{"loc": ["body", "temperature"], "msg": "no"}]}),
        ["temperature"],
        1,
    ),
    "a system role, and says so": (
        refusing(lambda body: body["messages"][0]["role"] == "system", 400, {"message": "System role not supported"}),
        ["system role"],
        1,
    ),
    "a format, under 500": (
        refusing(lambda body: "response_format" in body, 500, {"error": "failed to parse grammar"}),
        ["response_format"],
        2,
    ),
    "parameters, under 404": (
        refusing(lambda body: bool(schema(body)), 404, {"error": {"message": "no endpoint takes these parameters"}}),
        ["response_format.json_schema"],
        2,
    ),
    "a format and a temperature": (
        refusing(lambda body: "response_format" in body or "temperature" in body),
        ["response_format", "temperature"],
        5,
    ),
}


@pytest.mark.parametrize(("script", "dropped", "refused"), REFUSALS.values(), ids=REFUSALS)
def test_what_an_endpoint_does_not_take_is_found_once_recorded_and_no_more_is_dropped(
    script: Script, dropped: list[str], refused: int
) -> None:
    predictions(8)
    with serve(script) as server:
        result = run(server, concurrency=4)
        assert result["win"] == 8
        assert server.calls == 8 + refused
        # the first reply may come when more was dropped than had to be
        assert set(dropped) <= set(result["judge"]["parameters_dropped"])
        assert run(server)["num_samples"] == 8
        assert server.calls == 8 + refused
    last = json.loads((FOLDER / "global_verdicts.jsonl").read_text().splitlines()[-1])
    assert last["dropped"] == dropped


def test_a_parameter_refused_for_one_pair_is_not_sent_for_the_next() -> None:
    folder = Path("predictions/homo-1B/1")
    folder.mkdir(parents=True)
    for name, score in (("base", 30), ("global", 60), ("client_0", 10)):
        row = {"instruction": "task", "input": "", "answer": f"quality {score}", "category": "c"}
        (folder / f"{name}_output.jsonl").write_text(json.dumps(row) + "\n")
    with serve(refusing(lambda body: "temperature" in body)) as server:
        config = EvaluateLlmConfig.of(name="homo-1B", of="global,0", against="base", base_url=server.url)
        assert len(evaluate_llm.run(config, sleep=no_sleep).judgements) == 2
        assert server.calls == 4 + 4


ERRORS: dict[str, tuple[Answer, str, str]] = {
    "OpenAI's": (error(403, "not for you"), "403: not for you", "key may not"),
    "a text": (Answer(401, b"who are you"), "401: who are you", "check the key"),
    "a page": (Answer(405, b"<html><style>x</style><h1>Not\nAllowed</h1></html>"), "405: Not Allowed", "path"),
    "FastAPI's": (
        Answer(413, {"detail": [{"loc": ["body", "n"], "msg": "too big", "input": "rows"}]}),
        "body.n: too big$",
        "batch",
    ),
    "nothing": (Answer(403, b""), "403: no reason given", "key may not"),
    "a list": (Answer(402, [{"message": "pay"}]), "402: pay", "no credit"),
    "credit under 400": (error(400, "Your credit balance is too low"), "400: Your credit", ""),
    "a wrong path": (Answer(404, {"detail": "Not Found"}), "404: Not Found", "/v1"),
    "a wrong model": (error(404, "model 'gpt-4.1' not found"), "404: model 'gpt-4.1'", "gpt_model"),
    "a wrong model under 400": (error(400, "The model gpt-4.1 does not exist"), "400: The model", ""),
    "JSON in a text": (
        Answer(403, {"error": '{"error": {"message": "upstream says no"}}'}),
        "403: upstream says no",
        "",
    ),
    "a shape of its own": (Answer(403, {"info": {"why": 7}}), r'403: {"info": {"why": 7}}', ""),
    "the key": (error(403, f"key {KEY} is barred"), r"key \[key\] is barred", ""),
    "too long": (error(400, "maximum context length is 4096 tokens"), "400: maximum context", "batch_size"),
}


@pytest.mark.parametrize(("answer", "shown", "hint"), ERRORS.values(), ids=ERRORS)
def test_an_error_of_any_shape_is_one_sentence_with_the_hint_that_fits_after_one_call(
    answer: Answer, shown: str, hint: str
) -> None:
    predictions(40)
    with serve(lambda request: answer) as server:
        with pytest.raises(JudgeError, match=shown) as caught:
            run(server)
        assert server.calls == 1
    assert hint in caught.value.hint
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_is_refused_without_all_optional_parts_ends_the_run_with_the_first_reason(status: int) -> None:
    predictions(40)
    reasons = iter(range(100))
    with serve(lambda request: error(status, f"bad, number {next(reasons)}")) as server:
        with pytest.raises(JudgeError, match="bad, number 0"):
            run(server, concurrency=8)
        assert server.calls == 6


@pytest.mark.parametrize("batch_size", [1, 20])
def test_after_four_replies_that_cannot_be_used_judging_stops_and_the_first_is_kept(batch_size: int) -> None:
    predictions(80)
    number = iter(range(1000))
    with serve(lambda request: completion(f"Number {next(number)}: {KEY}\n\nA is better.\x1b[31m")) as server:
        with pytest.raises(JudgeError, match=r"invalid .*Number 0: \[key\] A is better.*global_unusable_reply"):
            run(server, batch_size=batch_size, concurrency=8)
        assert server.calls == 4
    kept = (FOLDER / "global_unusable_reply.txt").read_text()
    assert kept == "Number 0: [key]\n\nA is better.\\x1b[31m\n"
    assert not (FOLDER / "global_results.json").exists()


def test_four_in_a_row_on_the_way_stop_too_unless_a_part_is_allowed() -> None:
    predictions(40)

    def script(request: Request) -> Answer:
        return honest(request) if server.calls <= 4 else completion("no more")

    with serve(script) as server:
        with pytest.raises(JudgeError, match=r"only 8 of 40 samples got a verdict .*invalid.*no more"):
            run(server, batch_size=4, concurrency=1)
        assert server.calls == 8
        server.requests.clear()
        server.script = lambda request: completion("no more")
        assert run(server, batch_size=4, allow_partial=True)["num_samples"] == 8
        assert server.calls == 2 * 2 * 8


def test_one_sample_that_no_reply_can_be_read_on_does_not_stop_the_others() -> None:
    predictions(40)

    def script(request: Request) -> Answer:
        return completion("no") if "task 3\n" in request.user else honest(request)

    with serve(script) as server:
        result = run(server, batch_size=1, concurrency=1)
        assert (result["num_samples"], result["failures_by_kind"]) == (39, {"invalid": 1})
        # and a second run, which asks about nothing else, does not lose the result
        assert run(server, batch_size=1, concurrency=1)["num_samples"] == 39


def test_a_result_of_less_than_95_percent_is_none_unless_a_part_is_allowed() -> None:
    predictions(40)

    def script(failing: int) -> Script:
        def answer(request: Request) -> Answer:
            refused = any(f"task {i}\n" in request.user for i in range(failing))
            return completion(None, refusal="no") if refused else honest(request)

        return answer

    with serve(script(3)) as server:
        with pytest.raises(JudgeError, match=r"only 37 of 40 .*refused 3") as caught:
            run(server, batch_size=1)
        assert caught.value.exit_code == 7
        assert "allow_partial" in caught.value.hint
        assert not (FOLDER / "global_results.json").exists()
        assert run(server, batch_size=1, allow_partial=True)["eval_failures"] == 3
        server.script = script(2)
        assert run(server, batch_size=1)["eval_failures"] == 2


def test_a_reply_on_a_part_of_its_samples_is_asked_again_for_the_rest_as_long_as_it_brings_some() -> None:
    predictions(6)

    def two_of_them(request: Request) -> Answer:
        return completion(json.dumps({"results": honest_results(request)[:2]}))

    with serve(two_of_them) as server:
        assert run(server, batch_size=6)["win"] == 6
        assert [len(request.samples) for request in server.requests] == [6, 4, 2] * 2


def test_a_judge_that_answers_in_small_letters_keeps_its_wins_and_losses() -> None:
    predictions(3)
    with serve(entries(lambda entry: {**entry, "verdict": entry["verdict"].lower()})) as server:
        assert (run(server)["win"], run(server)["tie"]) == (3, 0)


def test_a_query_is_sent_with_every_request_and_the_key_where_such_addresses_expect_it() -> None:
    predictions(1)
    with serve(honest) as server:
        run(server, judge_query="api-version=2024-10-21")
        assert {request.path for request in server.requests} == {"/v1/chat/completions?api-version=2024-10-21"}
        assert {request.headers["api-key"] for request in server.requests} == {KEY}
        run(server, judge_model="other")
        assert "api-key" not in server.requests[-1].headers
    with pytest.raises(UsageError, match="the key comes from the environment"):
        EvaluateLlmConfig.of(judge_query="api-key=abc")
    with pytest.raises(UsageError, match="judge_query"):
        EvaluateLlmConfig.of(base_url="https://x.example/v1?api-version=1")


@pytest.mark.parametrize("host", ["192.168.1.7:8000", "10.0.0.1", "[fd00::1]:80", "gpu", "gpu.local", "vllm.internal"])
def test_plain_http_to_a_private_address_needs_the_flag_that_says_so(host: str) -> None:
    with pytest.raises(UsageError, match="allow_plain_http"):
        EvaluateLlmConfig.of(base_url=f"http://{host}/v1")
    allowed = EvaluateLlmConfig.of(base_url=f"http://{host}/v1", allow_plain_http=True)
    assert allowed.base_url == f"http://{host}/v1"


@pytest.mark.parametrize("host", ["8.8.8.8", "api.openai.com", "0.0.0.0", "[2606:4700::1]", "192.168.1.7.example"])
def test_plain_http_to_the_world_is_refused_with_the_flag_too(host: str) -> None:
    with pytest.raises(UsageError, match="must be https"):
        EvaluateLlmConfig.of(base_url=f"http://{host}/v1", allow_plain_http=True)


def counting(tokens_in: int, tokens_out: int, script: Script = honest) -> Script:
    def answer(request: Request) -> Answer:
        replied = script(request)
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        return Answer(body={**replied.body, "usage": usage}) if replied.status == 200 else replied

    return answer


PRICES = {"judge_price_in": 2.0, "judge_price_out": 8.0}


def test_tokens_and_cost_are_the_endpoint_s_and_are_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    predictions(4)
    with serve(counting(1000, 100)) as server:
        spent = judge(server, **PRICES).as_dict()["spent"]
        assert spent == {"calls": 4, "tokens_in": 4000, "tokens_out": 400, "answers_without_count": 0, "cost": 0.0112}
        said = capsys.readouterr().err
        assert "4 calls in this run, 4,000 tokens in and 400 out: 0.0112 in the currency" in said
        assert said.index("tokens in and") < said.index("calls in this run")
        assert "max_completion_tokens" not in server.requests[0].body
        assert judge(server, **PRICES).spent["calls"] == 0


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("max_cost", [0.0, 0.05, 0.1, 0.3])
def test_the_limit_on_cost_is_never_passed_and_what_was_paid_for_is_kept(max_cost: float, concurrency: int) -> None:
    predictions(40)
    limits: list[int] = []

    def dear(request: Request) -> Answer:
        # uses all that the request allows
        limits.append(request.body["max_completion_tokens"])
        return counting(len(json.dumps(request.body)) // 2, limits[-1])(request)

    with serve(dear) as server:
        with pytest.raises(BudgetError, match=f"max_cost={max_cost:g}.*samples are left") as caught:
            judge(server, **PRICES, max_cost=max_cost, concurrency=concurrency)
        cost = sum(2.0 * len(json.dumps(request.body)) // 2 + 8.0 * 4224 for request in server.requests) / 1e6
        assert cost <= max_cost
        assert cost + 0.05 > max_cost
        assert set(limits) <= {4096 + 64 * 2}
        assert caught.value.exit_code == 8
        done = server.calls
        judge(server, **PRICES, concurrency=concurrency, max_cost=100.0)
        assert server.calls == 40
        assert done < 40


@pytest.mark.parametrize("script", [honest, lambda request: completion(None, refusal="no")], ids=["answer", "refusal"])
def test_answers_without_a_count_cost_the_most_that_they_may(script: Script) -> None:
    predictions(40)
    with serve(script) as server:
        with pytest.raises(BudgetError):
            judge(server, **PRICES, max_cost=0.1)
        assert server.calls == 2


def test_an_endpoint_that_takes_the_older_name_of_the_limit_gets_it() -> None:
    predictions(4)
    script = refusing(
        lambda body: "max_completion_tokens" in body, 400, {"error": {"message": "unknown: max_completion_tokens"}}
    )
    with serve(script) as server:
        result = run(server, judge_max_tokens=500)
        assert server.calls == 1 + 4
        assert {request.body.get("max_tokens") for request in server.requests[1:]} == {500}
    assert result["judge"]["parameters_dropped"] == ["max_completion_tokens"]


def test_a_limit_on_cost_needs_both_prices() -> None:
    for given in ({"max_cost": 1.0}, {"judge_price_in": 1.0}, {"max_cost": 1.0, "judge_price_out": 1.0}):
        with pytest.raises(UsageError, match="judge_price_in"):
            EvaluateLlmConfig.of(**given)


def test_a_spent_quota_among_answers_is_no_refused_part() -> None:
    predictions(8)
    with serve(first(*[], then=lambda request: honest(request) if server.calls < 3 else error(402, "pay"))) as server:
        with pytest.raises(JudgeError, match="402: pay") as caught:
            run(server, concurrency=1)
        assert server.calls == 3
    assert "no credit" in caught.value.hint

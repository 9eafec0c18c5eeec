"""The judge stage against a loopback server: what it asks, what it writes, what it pays for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import (
    Answer,
    JudgeServer,
    Request,
    Script,
    completion,
    error,
    first,
    honest,
    honest_results,
    prefers_a,
    quality,
    serve,
)

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import BudgetError, DataError, JudgeError, LockedError, UsageError
from fedlora.stages import evaluate_llm

KEY = "sk-CANARY-0123456789abcdef"


@pytest.fixture(autouse=True)
def _key_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("api_key", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


def write_rows(path: Path, answers: list[str], key: str = "answer") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"instruction": f"task {i}", "input": "", key: answer, "category": f"cat{i % 2}"}
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def predictions(baseline: list[str], proposed: list[str]) -> None:
    write_rows(Path("predictions/base-1B/3/global_output.jsonl"), baseline)
    write_rows(Path("predictions/homo-1B/3/global_output.jsonl"), proposed)


def config(server: JudgeServer, **more: Any) -> EvaluateLlmConfig:
    values: dict[str, Any] = {
        "exp_name": "base-1B",
        "communication_rounds": 3,
        "proposed_file": "homo-1B/3/global_output.jsonl",
        "base_url": server.url,
        "batch_size": 4,
        "timeout_seconds": 20.0,
    }
    return EvaluateLlmConfig.of(**{**values, **more})


async def no_sleep(seconds: float) -> None:
    pass


def run(server: JudgeServer, **more: Any) -> dict[str, Any]:
    return dict(evaluate_llm.run(config(server, **more), sleep=no_sleep).judgements[0].record)


RESULT = Path("evaluations_llm/base-1B/3/global_results.json")
PAIRS = RESULT.with_name("pairs")
LOG = Path("evaluations_llm/base-1B/3/global_verdicts.jsonl")


def test_the_result_file_holds_the_documented_keys_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    predictions(
        ["quality 20", "quality 50", "quality 80", "quality 40"],
        ["quality 60", "quality 50", "quality 20", "quality 90"],
    )
    with serve(honest) as server:
        returned = evaluate_llm.run(config(server, batch_size=3), sleep=no_sleep)
    result = json.loads(RESULT.read_text())
    assert result == returned.judgements[0].record
    assert result["overall_pred_avg"] == 47.5
    assert result["overall_prop_avg"] == 55.0
    assert result["overall_ratio"] == pytest.approx(55.0 / 47.5)
    assert (result["win"], result["tie"], result["loss"]) == (2, 1, 1)
    assert (result["win_rate"], result["position_flip_rate"]) == (0.5, 0.0)
    assert result["categories"]["cat0"] == {
        "num_samples": 2,
        "avg_prediction_score": 50.0,
        "avg_proposed_score": 40.0,
        "ratio": 0.8,
        "win": 1,
        "tie": 0,
        "loss": 1,
    }
    counts = ("votes_per_sample", "num_samples", "eval_failures", "total_in_files", "batch_size", "calls")
    assert [result[name] for name in counts] == [2, 4, 0, 4, 3, 4]
    assert result["failures_by_kind"] == {}
    assert result["judge"] == {
        "model_asked": "gpt-4.1",
        "host": "127.0.0.1",
        "models_returned": ["judge-2025-01-01"],
        "system_fingerprints": ["fp_1"],
        "parameters_dropped": [],
    }
    assert result["files"]["proposed"]["path"] == "predictions/homo-1B/3/global_output.jsonl"
    assert len(result["files"]["baseline"]["sha256"]) == 64
    assert result["files"]["target"] is None
    assert "judged 4 of 4 samples" in returned.text()
    assert returned.text().endswith(f"\n{RESULT}")
    said = capsys.readouterr().err
    assert "4 samples in both orders, 0 of 8 verdicts stored; 4 requests" in said
    assert server.url in said


def test_both_orders_of_every_sample_are_asked_at_temperature_0_with_a_strict_schema() -> None:
    predictions(["quality 10"] * 5, ["quality 90"] * 5)
    with serve(honest) as server:
        run(server, batch_size=2)
    assert server.calls == 6
    asked = [
        (blocks["instruction"], quality(blocks["answer A"]))
        for request in server.requests
        for blocks in request.samples.values()
    ]
    assert sorted(asked) == sorted((f"task {i}", q) for i in range(5) for q in (10, 90))
    for request in server.requests:
        assert len({quality(blocks["answer A"]) for blocks in request.samples.values()}) == 1
        assert request.body["temperature"] == 0
        assert request.body["response_format"]["json_schema"]["strict"] is True
        assert request.headers["authorization"] == f"Bearer {KEY}"


def test_a_judge_that_always_prefers_position_a_gives_ties_and_a_flip_rate_of_one() -> None:
    predictions(["quality 10"] * 6, ["quality 90"] * 6)
    with serve(prefers_a) as server:
        result = run(server)
    assert (result["win"], result["tie"], result["loss"]) == (0, 6, 0)
    assert result["position_flip_rate"] == 1.0
    assert result["overall_ratio"] == 1.0


def test_a_second_run_makes_no_call_and_writes_the_same_bytes_even_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictions(["quality 10"] * 9, ["quality 90"] * 9)
    with serve(honest) as server:
        run(server)
        before, calls = RESULT.read_bytes(), server.calls
        monkeypatch.delenv("api_key")
        run(server, max_calls=0)
        assert server.calls == calls
    assert RESULT.read_bytes() == before


def test_only_changed_answers_are_asked_again_and_overwrite_asks_all() -> None:
    predictions(["quality 10"] * 8, ["quality 90"] * 8)
    with serve(honest) as server:
        run(server)
        predictions(["quality 10"] * 8, ["quality 90"] * 7 + ["quality 5"])
        server.requests.clear()
        result = run(server)
        assert [blocks["instruction"] for r in server.requests for blocks in r.samples.values()] == ["task 7"] * 2
        assert (result["win"], result["loss"]) == (7, 1)
        server.requests.clear()
        run(server, overwrite=True)
        assert server.calls == 4


def test_another_proposed_file_against_the_same_baseline_does_not_disturb_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictions(["quality 50"] * 3, ["quality 90"] * 3)
    write_rows(Path("predictions/seq-1B/3/global_output.jsonl"), ["quality 10"] * 3)
    with serve(honest) as server:
        assert run(server)["win"] == 3
        capsys.readouterr()
        assert run(server, proposed_file="seq-1B/3/global_output.jsonl", overwrite=True)["loss"] == 3
        calls = server.calls
        assert run(server)["win"] == 3
        assert server.calls == calls
    assert f"replacing {RESULT}" in capsys.readouterr().err
    assert {path.stem: json.loads(path.read_text())["win"] for path in PAIRS.glob("*.json")} == {
        "homo-1B.3.global--global": 3,
        "seq-1B.3.global--global": 0,
    }


def test_a_result_from_before_there_were_pairs_is_not_lost() -> None:
    predictions(["quality 50"] * 3, ["quality 90"] * 3)
    write_rows(Path("predictions/seq-1B/3/global_output.jsonl"), ["quality 10"] * 3)
    with serve(honest) as server:
        first_result = run(server)
        (PAIRS / "homo-1B.3.global--global.json").unlink()
        second = run(server, proposed_file="seq-1B/3/global_output.jsonl")
    assert json.loads((PAIRS / "homo-1B.3.global--global.json").read_text()) == first_result
    assert json.loads(RESULT.read_text()) == second
    # one that another program wrote is replaced, as it always was
    RESULT.write_text("{}")
    with serve(honest) as server:
        assert run(server) == json.loads(RESULT.read_text()) == first_result


def test_of_and_against_name_the_pair_and_leave_the_contracts_file_alone() -> None:
    write_rows(Path("predictions/homo-1B/2/base_output.jsonl"), ["quality 50"] * 3)
    write_rows(Path("predictions/homo-1B/3/global_output.jsonl"), ["quality 90"] * 3)
    write_rows(Path("predictions/homo-1B/2/client_1_output.jsonl"), ["quality 10"] * 3)
    values: dict[str, Any] = {"exp_name": "homo-1B", "proposed_file": None, "communication_rounds": None}
    with serve(honest) as server:
        for asked, name, win in (
            ({"of": "global"}, "homo-1B/2/pairs/homo-1B.3.global--base", 3),
            ({"against": "1"}, "homo-1B/2/pairs/homo-1B.3.global--client_1", 3),
            ({"of": "base", "against": "homo-1B/last/global"}, "homo-1B/3/pairs/homo-1B.2.base--global", 0),
            ({"of": "1", "against": "base", "round": 2}, "homo-1B/2/pairs/client_1--base", 0),
        ):
            chosen = {key: value for key, value in {**values, **asked}.items() if value is not None}
            (judged,) = evaluate_llm.run(EvaluateLlmConfig.of(**chosen, base_url=server.url), sleep=no_sleep).judgements
            assert judged.file == Path(f"evaluations_llm/{name}.json")
            assert json.loads(judged.file.read_text())["win"] == judged.record["win"] == win
    assert not list(Path("evaluations_llm").rglob("*_results.json"))


def test_several_pairs_are_judged_in_one_call_under_one_limit() -> None:
    folder = Path("predictions/homo-1B/3")
    for name, quality_of in (("base", 50), ("global", 90), ("client_0", 10), ("client_1", 50)):
        write_rows(folder / f"{name}_output.jsonl", [f"quality {quality_of}"] * 4)
    asked: dict[str, Any] = {"name": "homo-1B", "of": "all", "against": ["base", "global"], "batch_size": 4}
    with serve(honest) as server:
        config = EvaluateLlmConfig.of(**asked, base_url=server.url, max_calls=5)
        with pytest.raises(BudgetError, match="max_calls=5"):
            evaluate_llm.run(config, sleep=no_sleep)
        assert server.calls == 5
        judged = evaluate_llm.run(EvaluateLlmConfig.of(**asked, base_url=server.url), sleep=no_sleep)
    assert [one.names for one in judged.judgements] == [
        *(("global", "base"), ("client 0", "base"), ("client 1", "base")),
        *(("base", "global"), ("client 0", "global"), ("client 1", "global")),
    ]
    table = judged.text().splitlines()
    assert table[0].split() == [
        *("of", "against", "samples", "win", "tie", "loss", "win", "rate", "95", "%", "interval"),
        *("baseline", "proposed", "ratio"),
    ]
    # four wins of four leave room for as many losses as Wilson's limit allows
    won, lost = ["1.000", "0.510", "to", "1.000"], ["0.000", "0.000", "to", "0.490"]
    assert table[2].split() == ["global", "base", "4", "4", "0", "0", *won, "50.00", "90.00", "1.800"]
    assert table[3].split() == ["client", "0", "base", "4", "0", "0", "4", *lost, "50.00", "10.00", "0.200"]
    assert table[8].split() == ["model", "strength", "95", "%", "interval"]
    assert [line.rsplit("  ", 2)[0].strip() for line in table[10:14]] == ["global", "base", "client 1", "client 0"]
    assert table[14:] == ["evaluations_llm/homo-1B/3/pairs"]
    assert [one["name"] for one in judged.as_dict()["ranking"]] == ["global", "base", "client 1", "client 0"]
    assert len(judged.as_dict()["judgements"]) == len(list(Path("evaluations_llm/homo-1B/3/pairs").glob("*.json")))


def test_a_proposed_file_is_looked_up_below_prediction_dir_and_then_from_here() -> None:
    predictions(["quality 50"], ["quality 90"])
    write_rows(Path("mine.v2.jsonl"), ["quality 10"])
    with serve(honest) as server:
        assert run(server, proposed_file="mine.v2.jsonl")["loss"] == 1
        (pair,) = PAIRS.glob("*.json")
        assert re.fullmatch(r"mine-[0-9a-f]{8}--global\.json", pair.name)
        assert run(server, proposed_file=Path("mine.v2.jsonl").absolute())["loss"] == 1
        assert list(PAIRS.glob("*.json")) == [pair]
        write_rows(Path("homo-1B/3/global_output.jsonl"), ["quality 10"])
        with pytest.raises(UsageError, match=r"is predictions/homo-1B/3/global_output\.jsonl and /.*homo-1B"):
            run(server)


def test_of_and_the_flags_that_it_takes_the_place_of_are_refused_together() -> None:
    for asked in ({"of": "base", "proposed_file": "x"}, {"against": "base", "is_base_model": True}):
        with pytest.raises(UsageError, match="takes the place of"):
            EvaluateLlmConfig.of(**asked)
    assert EvaluateLlmConfig.of(of="1", client_id=2, is_global_model=False).baseline_words == ("2",)


def test_another_judge_is_asked_anew() -> None:
    predictions(["quality 50"], ["quality 90"])
    with serve(honest) as server:
        run(server)
        run(server, gpt_model="other")
        assert server.calls == 4


def test_equal_rows_share_one_question() -> None:
    row = {"instruction": "same", "input": "", "category": "c"}
    for name, answer in (("base-1B", "quality 10"), ("homo-1B", "quality 20")):
        path = Path(f"predictions/{name}/3/global_output.jsonl")
        path.parent.mkdir(parents=True)
        path.write_text((json.dumps({**row, "answer": answer}) + "\n") * 3)
    with serve(honest) as server:
        result = run(server)
    assert server.calls == 2
    assert result["num_samples"] == 3


def test_files_in_another_order_are_joined_by_content() -> None:
    predictions(["quality 10", "quality 20", "quality 30"], ["quality 11", "quality 21", "quality 31"])
    path = Path("predictions/homo-1B/3/global_output.jsonl")
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with serve(honest) as server:
        result = run(server)
    assert result["win"] == 3
    assert result["overall_pred_avg"] == 20
    assert result["overall_prop_avg"] == 21


@pytest.mark.parametrize("fault", ["missing", "surplus"])
def test_files_that_do_not_match_are_an_error_that_names_the_rows_and_costs_nothing(fault: str) -> None:
    counts = (5, 1) if fault == "missing" else (1, 5)
    predictions(["quality 10"] * counts[0], ["quality 90"] * counts[1])
    with serve(honest) as server, pytest.raises(DataError, match=r"task 1.*task 2.*task 3") as caught:
        run(server)
    assert server.calls == 0
    assert "task 4" not in str(caught.value)
    assert "same test file" in caught.value.hint


def test_reference_answers_are_shown_to_the_judge() -> None:
    predictions(["quality 10", "quality 20"], ["quality 90", "quality 30"])
    targets = write_rows(Path("targets.jsonl"), ["the truth 0", "the truth 1"], key="gold")
    with serve(honest) as server:
        result = run(server, target_file=targets, target_key="gold")
        assert (result["win"], result["overall_pred_avg"]) == (2, 15)
        assert result["files"]["target"]["path"] == "targets.jsonl"
        for request in server.requests:
            for blocks in request.samples.values():
                assert blocks["reference"] == blocks["instruction"].replace("task", "the truth")
        write_rows(targets, ["the truth 0", "another truth"], key="gold")
        server.requests.clear()
        run(server, target_file=targets, target_key="gold")
        assert [list(request.samples) for request in server.requests] == [["s1"], ["s1"]]
        write_rows(targets, ["the truth 0"], key="gold")
        with pytest.raises(DataError, match="task 1"):
            run(server, target_file=targets, target_key="gold")


def test_a_file_is_not_compared_with_itself() -> None:
    predictions(["quality 10"], ["quality 90"])
    with serve(honest) as server, pytest.raises(UsageError, match="compared with itself"):
        run(server, proposed_file="base-1B/3/global_output.jsonl")


def test_a_column_response_holds_reference_answers_as_it_does_in_training() -> None:
    predictions(["quality 10"] * 2, ["quality 90"] * 2)
    with serve(honest) as server:
        targets = write_rows(Path("targets.jsonl"), ["reference"] * 2, key="response")
        assert run(server, target_file=targets)["num_samples"] == 2
        with pytest.raises(DataError, match="'output' is missing"):
            run(server, target_file=targets, target_key="output")


def test_missing_predictions_are_an_error_that_names_the_file() -> None:
    predictions(["quality 10"], ["quality 90"])
    with serve(honest) as server, pytest.raises(UsageError, match=r"base-1B/3/client_2_output\.jsonl"):
        run(server, is_global_model=False, client_id=2)


@pytest.mark.parametrize("max_calls", [0, 1, 5, 9])
def test_the_limit_on_calls_is_never_passed_and_nothing_is_paid_twice(max_calls: int) -> None:
    predictions(["quality 10"] * 20, ["quality 90"] * 20)
    with serve(honest) as server:
        with pytest.raises(BudgetError, match=f"max_calls={max_calls}.* of 20 samples are left") as caught:
            run(server, max_calls=max_calls, batch_size=4, concurrency=3)
        assert caught.value.exit_code == 8
        assert server.calls == max_calls
        assert not RESULT.exists()
        # what was paid for is stored: the rest takes exactly the remaining calls
        run(server, max_calls=10 - max_calls, batch_size=4)
        assert server.calls == 10
    assert RESULT.exists()


def test_the_limit_counts_retries_and_repairs() -> None:
    predictions(["quality 10"] * 2, ["quality 90"] * 2)
    script = first(error(500), completion("prose"), error(429), completion("prose"))
    with serve(script) as server, pytest.raises(BudgetError, match="2 of 2 samples are left"):
        run(server, max_calls=4)
    assert server.calls == 4


def test_the_first_request_goes_alone_and_the_others_within_the_limit_on_concurrency() -> None:
    predictions(["quality 10"] * 12, ["quality 90"] * 12)
    first_done: list[bool] = []

    def slow(request: Request) -> Answer:
        # nobody else may have come while the first is being answered
        time.sleep(0.05)
        first_done.append(server.calls == 1 or bool(first_done))
        return honest(request)

    with serve(slow) as server:
        run(server, batch_size=1, concurrency=3)
        assert server.calls == 24
        assert server.most_in_flight == 3
    assert all(first_done)


def test_a_key_file_goes_before_the_environment_and_loses_its_newline(tmp_path: Path) -> None:
    predictions(["quality 10"], ["quality 90"])
    key_file = tmp_path / "key.txt"
    key_file.write_text("sk-from-file\n")
    with serve(honest) as server:
        run(server, api_key_file=key_file)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer sk-from-file"}


def test_openai_api_key_serves_when_api_key_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions(["quality 10"], ["quality 90"])
    monkeypatch.setenv("api_key", "")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-second")
    with serve(honest) as server:
        run(server)
    assert server.requests[0].headers["authorization"] == "Bearer sk-second"


def test_without_a_key_or_with_a_wrong_one_stored_verdicts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions(["quality 10"], ["quality 90"])
    with serve(honest) as server:
        run(server)
        stored = LOG.read_bytes()
        monkeypatch.delenv("api_key")
        with pytest.raises(UsageError, match="no key"):
            run(server, overwrite=True)
        with pytest.raises(UsageError, match="no key"):
            run(server, gpt_model="other")
        assert server.calls == 2
        monkeypatch.setenv("api_key", "sk-a-wrong-one")
        server.script = lambda request: error(401)
        with pytest.raises(JudgeError):
            run(server, overwrite=True)
    assert LOG.read_bytes() == stored


def test_the_key_reaches_no_file_no_output_and_no_process_list(tmp_path: Path) -> None:
    predictions(["quality 10"] * 4, ["quality 90"] * 4)

    def echoing(request: Request) -> Answer:
        """Puts the key wherever a reply has room for text."""
        sent = request.headers["authorization"]
        results = [{"id": sent, "score_a": 1, "score_b": 1, "verdict": "A"}, *honest_results(request)]
        time.sleep(0.2)
        return completion(json.dumps({"results": results}), model=f"m {sent}", system_fingerprint=sent, id=sent)

    scripts: dict[str, Script] = {
        "echo": echoing,
        "401": lambda request: error(401, f"Incorrect key: {request.headers['authorization']}", type=KEY),
        "302": lambda request: Answer(302, {}, {"location": f"http://localhost:9/?key={KEY}"}),
        "400": lambda request: error(400, ("x" * 290 + KEY) * 2),
        "403": lambda request: Answer(403, (KEY * 50).encode()),
        "500": lambda request: error(500, KEY),
        "reset": lambda request: Answer(reset=True),
    }
    with serve(lambda request: scripts[request.path.split("/")[1]](request)) as server:
        runs = [
            config(server, base_url=f"http://127.0.0.1:{server.port}/{name}", evaluation_dir=name, max_retries=1)
            for name in scripts
        ]
        code = """if True:
            import json, sys, traceback
            from fedlora.config.evaluate import EvaluateLlmConfig
            from fedlora.stages import evaluate_llm
            async def no_sleep(seconds): pass
            for values in json.loads(sys.argv[1]):
                try:
                    evaluate_llm.run(EvaluateLlmConfig.of(**values), sleep=no_sleep)
                except Exception:
                    traceback.print_exc()
            """
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([run.model_dump(mode="json") for run in runs])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OPENAI_LOG": "debug", "PYTHONASYNCIODEBUG": "1"},
        )
        listed = b""
        while process.poll() is None:
            listed += b"".join(_command_lines())
            time.sleep(0.05)
        output = b"".join(process.communicate()).decode()
        assert {request.path.split("/")[1] for request in server.requests} == set(scripts)
    assert f"127.0.0.1:{server.port}/echo".encode() in listed
    assert output.count("Traceback") == len(scripts) - 1
    assert output.count("fedlora.errors.JudgeError") == len(scripts) - 1
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    # two files of predictions; of the run that succeeds verdicts, result, also as a pair's, and texts; locks
    assert len([path for path in written if path.suffix != ".lock"]) == 6
    assert "[key]" in (tmp_path / "echo/base-1B/3/global_results.json").read_text()
    for part in (KEY, KEY[:16]):
        assert part not in output
        assert part.encode() not in listed
        assert not [path for path in written if part.encode() in path.read_bytes()]


def _command_lines() -> list[bytes]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue
    return lines


def test_a_kill_loses_only_what_is_in_flight(tmp_path: Path) -> None:
    predictions(["quality 10"] * 24, ["quality 90"] * 24)
    answered: list[int] = []

    def counting(request: Request) -> Answer:
        time.sleep(0.02)
        answered.append(1)
        return honest(request)

    with serve(counting) as server:
        values = config(server, batch_size=1, concurrency=2).model_dump(mode="json")
        code = (
            "import json, sys\nfrom fedlora.config.evaluate import EvaluateLlmConfig\n"
            "from fedlora.stages import evaluate_llm\n"
            "evaluate_llm.run(EvaluateLlmConfig.of(**json.loads(sys.argv[1])))"
        )
        for stop_at in (10, 25):
            process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(values)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while len(answered) < stop_at and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
        result = run(server, batch_size=1)
        assert result["num_samples"] == 24
        # 48 questions, two kills, two in flight at each
        assert 48 <= server.calls <= 48 + 2 * 2


def test_a_torn_last_line_of_the_log_costs_one_question() -> None:
    predictions(["quality 10"] * 4, ["quality 90"] * 4)
    with serve(honest) as server:
        run(server)
        whole, result = LOG.read_bytes(), RESULT.read_bytes()
        start = whole.rstrip(b"\n").rfind(b"\n") + 1
        for cut in (start + 1, start + 40, len(whole) - 2):
            LOG.write_bytes(whole[:cut])
            server.requests.clear()
            run(server)
            assert server.calls == 1
            assert LOG.read_bytes().count(b"\n") == whole.count(b"\n")
            assert json.loads(RESULT.read_bytes())["win"] == json.loads(result)["win"]


def test_no_sample_judged_is_an_error_and_leaves_no_result() -> None:
    predictions(["quality 10"] * 3, ["quality 90"] * 3)
    with serve(lambda request: completion("I would rather not say.")) as server:
        with pytest.raises(JudgeError, match=r"no sample got a verdict \(invalid 3\)") as caught:
            run(server)
        assert server.calls == 4
    assert caught.value.exit_code == 7
    assert not RESULT.exists()


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    predictions(["quality 10"], ["quality 90"])
    monkeypatch.setenv(name, "/no/such/certificates")
    values = config(JudgeServer(honest), base_url="https://127.0.0.1:9/v1", max_retries=0)
    if name == "SSL_CERT_DIR":
        # a folder that is not there counts as empty: then no server is trusted, which is said when one is called
        with pytest.raises(JudgeError):
            evaluate_llm.run(values, sleep=no_sleep)
        return
    with pytest.raises(UsageError, match=r"SSL_CERT_FILE=/no/such/certificates") as caught:
        evaluate_llm.run(values, sleep=no_sleep)
    assert "unset" in caught.value.hint


def test_a_proxy_that_is_none_is_an_error_that_does_not_quote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions(["quality 10"], ["quality 90"])
    monkeypatch.setenv("HTTPS_PROXY", "gopher://me:hunter2@proxy.example:99")
    with pytest.raises(UsageError, match="the proxy that the environment names") as caught:
        evaluate_llm.run(config(JudgeServer(honest), base_url="https://127.0.0.1:9/v1"), sleep=no_sleep)
    assert "hunter2" not in f"{caught.value}{caught.value.hint}{caught.value.__cause__}"


def test_a_second_judge_of_one_baseline_is_kept_out_and_asks_nothing() -> None:
    predictions(["quality 10"] * 2, ["quality 90"] * 2)
    others: list[LockedError] = []

    def script(request: Request) -> Answer:
        with pytest.raises(LockedError, match="another process judges this baseline") as caught:
            evaluate_llm.run(config(server), sleep=no_sleep)
        others.append(caught.value)
        return honest(request)

    with serve(script) as server:
        result = run(server)
        calls = server.calls
        run(server)
    assert result["num_samples"] == 2
    assert calls == server.calls == len(others) == 2
    assert {error.exit_code for error in others} == {6}


def test_a_judge_that_was_killed_leaves_no_lock_behind() -> None:
    predictions(["quality 10"] * 2, ["quality 90"] * 2)
    lock = Path("evaluations_llm/base-1B/3/.global_verdicts.lock")
    code = (
        "import sys\nfrom filelock import FileLock\nlock = FileLock(sys.argv[1])\nlock.acquire()\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process, serve(honest) as server:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LockedError):
            run(server)
        process.kill()
        process.wait()
        assert run(server)["num_samples"] == 2


def test_a_folder_of_silos_gives_the_references_and_results_are_by_client() -> None:
    for client, row in (("north", "task 0"), ("south", "task 1")):
        path = Path("silos") / f"{client}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"instruction": f"train {client}", "response": "x"}) + "\n")
        path.with_name(f"{client}.test.jsonl").write_text(json.dumps({"instruction": row, "response": client}) + "\n")
    for run_name, quality_of in (("base-1B", 20), ("homo-1B", 60)):
        path = Path(f"predictions/{run_name}/3/global_output.jsonl")
        path.parent.mkdir(parents=True)
        rows = [{"instruction": f"task {n}", "input": "", "answer": f"quality {quality_of}"} for n in range(2)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(honest) as server:
        result = run(server, target_file="silos")
    assert {name: one["win"] for name, one in result["categories"].items()} == {"north": 1, "south": 1}
    assert "north" in server.requests[0].user
    assert result["files"]["target"]["path"] == "silos"


def test_the_judge_sees_the_turns_before_and_verdicts_on_instructions_stay_valid() -> None:
    turns = [{"role": "system", "content": "short"}, {"role": "user", "content": "<<<END s1"}]
    turns += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for run_name, number in (("base-1B", 20), ("homo-1B", 60)):
        file = write_rows(Path(f"predictions/{run_name}/3/global_output.jsonl"), [f"quality {number}"])
        with file.open("a") as lines:
            for row in ({"messages": turns}, {"prompt": "once"}):
                lines.write(json.dumps({**row, "answer": f"quality {number}", "category": "cat0"}) + "\n")
    with serve(honest) as server:
        result = run(server)
        (request, _) = server.requests
    assert (result["win"], result["num_samples"]) == (3, 3)
    told = {"turn 1 system": "short", "turn 2 user": "\\<\\<\\<END s1", "turn 3 assistant": "b", "instruction": "c"}
    assert {title: text for title, text in request.samples["s2"].items() if "answer" not in title} == told
    assert list(request.samples["s1"]) == ["instruction", "answer A", "answer B"]
    assert request.samples["s3"]["text"] == "once"


def test_texts_verdicts_and_reasons_stand_in_a_file_that_one_can_read(tmp_path: Path) -> None:
    predictions(["quality 20\nsample 9, x: win", "quality 50"], ["quality 60\x1b[31m", "quality 50"])

    def explaining(request: Request) -> Answer:
        results = [{**entry, "reason": f"it is better, {KEY}"} for entry in honest_results(request)]
        return completion(json.dumps({"results": results}))

    texts = PAIRS / "homo-1B.3.global--global.txt"
    with serve(explaining) as server:
        run(server)
        assert "reason" not in server.requests[0].body["messages"][0]["content"]
        calls, lines = server.calls, texts.read_text().splitlines()
        assert run(server, reasons=True)["win"] == 1
        assert server.calls == 2 * calls
        schema = server.requests[-1].body["response_format"]["json_schema"]["schema"]["properties"]["results"]["items"]
        assert schema["required"] == ["id", "reason", "score_a", "score_b", "verdict"]
    assert lines[:9] == [
        "sample 1, cat0: win",
        *("  instruction:", "    task 0", "  baseline:", "    quality 20", "    sample 9, x: win"),
        *("  proposed:", "    quality 60\\x1b[31m"),
        "  baseline shown first: proposed (baseline 20, proposed 60)",
    ]
    assert "reason" not in LOG.read_text().splitlines()[0]
    with_reasons = texts.read_text()
    assert "  proposed shown first: proposed (proposed 60, baseline 20): it is better, [key]\n" in with_reasons
    assert KEY not in with_reasons + LOG.read_text()

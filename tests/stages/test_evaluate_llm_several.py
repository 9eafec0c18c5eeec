"""Several judges, several times, and pairs in both directions: what is asked, paid for and written."""

from __future__ import annotations

import json
import re
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
    honest,
    honest_results,
    prefers_a,
    serve,
)

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import BudgetError, JudgeError, UsageError
from fedlora.stages import evaluate_llm

FOLDER = Path("evaluations_llm/homo/1")
PAIR = FOLDER / "pairs/global--base"


@pytest.fixture(autouse=True)
def _key_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("api_key", "sk-of-these-tests-0123")
    monkeypatch.chdir(tmp_path)


def predictions(**scores: list[int]) -> None:
    folder = Path("predictions/homo/1")
    folder.mkdir(parents=True, exist_ok=True)
    for name, qualities in scores.items():
        row = {"input": "", "category": "c"}
        rows = [{**row, "instruction": f"task {i}", "answer": f"quality {one}"} for i, one in enumerate(qualities)]
        (folder / f"{name}_output.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


async def no_sleep(seconds: float) -> None:
    pass


def judge(server: JudgeServer, **more: Any) -> evaluate_llm.Judgements:
    values: dict[str, Any] = {"name": "homo", "of": "global", "against": "base", "batch_size": 2}
    return evaluate_llm.run(EvaluateLlmConfig.of(**{**values, "base_url": server.url, **more}), sleep=no_sleep)


def by_model(**scripts: Script) -> Script:
    return lambda request: scripts[request.body["model"].replace("-", "_").replace("/", "_")](request)


def contrary(request: Request) -> Answer:
    """Prefers the worse answer."""
    turned = {"A": "B", "B": "A", "tie": "tie"}
    results = [{**one, "verdict": turned[one["verdict"]]} for one in honest_results(request)]
    return completion(json.dumps({"results": results}))


def asked_of(server: JudgeServer) -> dict[str, int]:
    models = [request.body["model"] for request in server.requests]
    return {model: models.count(model) for model in sorted(set(models))}


def test_each_judge_has_its_own_result_and_the_pair_that_of_the_majority_with_their_agreement() -> None:
    predictions(base=[50, 50, 50, 50], **{"global": [90, 10, 50, 90]})
    with serve(by_model(good=honest, bad=contrary, org_good=honest)) as server:
        found = judge(server, judge_model="good,bad,org/good")
        assert asked_of(server) == {"bad": 4, "good": 4, "org/good": 4}
    record = json.loads(PAIR.with_suffix(".json").read_text())
    (judgement,) = found.judgements
    assert (judgement.record, judgement.file) == (record, PAIR.with_suffix(".json"))
    assert (record["win"], record["tie"], record["loss"]) == (2, 1, 1)
    assert (record["votes_per_sample"], record["calls"]) == (6, 12)
    assert record["judge"]["model_asked"] == "good, bad, org/good"
    own = {one.judge: json.loads(one.file.read_text()) for one in judgement.judges}
    assert {name: (one["win"], one["tie"], one["loss"]) for name, one in own.items()} == {
        **{"good": (2, 1, 1), "bad": (1, 1, 2)},
        "org/good": (2, 1, 1),
    }
    assert sorted(path.name.split("-")[0] for path in PAIR.iterdir()) == ["bad.json", "good.json", "org_good"]
    agreement = record["agreement"]
    # one of three pairs agrees on the three samples that are no tie, all on the tie
    assert (agreement["kappa_of"], agreement["same_outcome"]) == ("fleiss", pytest.approx((3 * 1 / 3 + 1) / 4))
    assert [one["kappa"] for one in agreement["pairs"]] == [pytest.approx(-1 / 11), 1.0, pytest.approx(-1 / 11)]
    assert [one["win_rate_ties_half"] for one in record["judges"]] == [0.625, 0.375, 0.625]
    shown = found.text()
    assert "Fleiss' kappa" in shown
    assert [line.split()[:5] for line in shown.splitlines() if line.startswith(("good ", "majority"))][:2] == [
        ["good", "4", "2", "1", "1"],
        ["majority", "4", "2", "1", "1"],
    ]
    texts = PAIR.with_suffix(".txt").read_text()
    assert "  bad, baseline shown first: baseline (baseline 50, proposed 90)\n" in texts
    (shown_as_json,) = found.as_dict()["judgements"]
    assert [one["judge"] for one in shown_as_json["judges"]] == ["good", "bad", "org/good"]


def test_a_judge_alone_writes_the_same_bytes_as_among_others_and_a_second_run_of_any_of_them_asks_nothing() -> None:
    predictions(base=[50, 50, 50], **{"global": [90, 10, 50]})
    with serve(by_model(good=honest, bad=contrary)) as server:
        judge(server, judge_model="good")
        alone, line = PAIR.with_suffix(".json").read_bytes(), PAIR.with_suffix(".txt").read_bytes()
        assert b"judges" not in alone
        assert judge(server, judge_model=["good", "bad"]).spent["calls"] == 4
        assert (PAIR / "good.json").read_bytes() == alone
        both = PAIR.with_suffix(".json").read_bytes()
        assert json.loads(both)["agreement"]["kappa_of"] == "cohen"
        # two judges that differ make a tie
        assert [json.loads(both)[name] for name in ("win", "tie", "loss")] == [0, 3, 0]
        calls = server.calls
        judge(server, judge_model="good, bad", max_calls=0)
        assert PAIR.with_suffix(".json").read_bytes() == both
        judge(server, judge_model="good", max_calls=0)
        assert PAIR.with_suffix(".json").read_bytes() == alone
        assert PAIR.with_suffix(".txt").read_bytes() == line
        assert server.calls == calls


def counting(script: Script) -> Script:
    """Uses all that a request allows."""

    def answer(request: Request) -> Answer:
        size, most = len(json.dumps(request.body)), request.body["max_completion_tokens"]
        usage = {"prompt_tokens": size // 2, "completion_tokens": most}
        return Answer(body={**script(request).body, "usage": usage})

    return answer


def cost_of(request: Request, prices: dict[str, tuple[float, float]]) -> float:
    price_in, price_out = prices[request.body["model"]]
    return (len(json.dumps(request.body)) // 2 * price_in + request.body["max_completion_tokens"] * price_out) / 1e6


def test_the_limits_hold_for_all_judges_together_each_at_its_own_price() -> None:
    predictions(base=[50] * 40, **{"global": [90] * 40})
    prices = {"dear": (20.0, 80.0), "cheap": (1.0, 4.0)}
    asked: dict[str, Any] = {"judge_model": "dear,cheap", "judge_price_in": "20,1", "judge_price_out": [80, 4]}
    with serve(by_model(dear=counting(honest), cheap=counting(honest))) as server:
        with pytest.raises(BudgetError, match=r"max_cost=14\.6"):
            judge(server, **asked, max_cost=14.6)
        spent = sum(cost_of(request, prices) for request in server.requests)
        assert spent <= 14.6 < spent + 0.03
        # the first is dear and done, so what is left over is too little for the second
        assert set(asked_of(server)) == {"dear", "cheap"}
        with pytest.raises(BudgetError, match="max_calls=3"):
            judge(server, judge_model="dear,other", judge_max_tokens=99, max_calls=3, overwrite=True)
        last = [request.body["model"] for request in server.requests[-3:]]
        assert last == ["dear"] * 3
        before = server.calls
        found = judge(server, **asked, judge_max_tokens=99)
        made = server.requests[before:]
        assert found.spent["cost"] == pytest.approx(sum(cost_of(request, prices) for request in made))
        assert found.spent["calls"] == len(made)


def test_what_all_judges_and_pairs_take_is_said_before_the_first_request(capsys: pytest.CaptureFixture[str]) -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4})
    asked: dict[str, Any] = {"of": "base,global", "against": "base,global", "judge_model": "a,b"}
    with serve(honest) as server:
        judge(server, **asked, judge_price_in="2000,1000", judge_price_out=8000)
        said = capsys.readouterr().err.splitlines()
        # both directions are asked about once
        assert server.calls == 2 * 2 * 2
        one, other, whole = ([line for line in said if text in line] for text in (" to a at", " to b at", " in all"))
        assert "8 requests in all" in whole[0]
        costs = [float(re.findall(r"about ([\d.]+) in the currency", lines[0])[0]) for lines in (one, other, whole)]
        assert costs[2] == pytest.approx(costs[0] + costs[1], abs=0.02)
        assert said.index(whole[0]) < said.index(one[0])
        judge(server, **asked)
        judge(server, judge_model="c")
        # the other direction has verdicts already
        judge(server, **{**asked, "judge_model": "c"})
        assert server.calls == 12
        assert " in all" not in capsys.readouterr().err


def test_what_one_model_does_not_take_the_others_are_still_asked_with() -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4})

    def no_temperature(request: Request) -> Answer:
        return error(400, "temperature is not supported") if "temperature" in request.body else honest(request)

    with serve(by_model(a=no_temperature, b=honest)) as server:
        record = judge(server, judge_model="a,b").judgements[0].record
        assert asked_of(server) == {"a": 5, "b": 4}
    assert record["judge"]["parameters_dropped"] == ["temperature"]
    assert json.loads((PAIR / "b.json").read_text())["judge"]["parameters_dropped"] == []


def test_a_sample_that_one_judge_has_no_verdict_on_is_in_no_majority_and_too_few_are_none() -> None:
    predictions(base=[50] * 20, **{"global": [90] * 20})

    def refusing(rows: int) -> Script:
        def answer(request: Request) -> Answer:
            refused = any(f"task {i}\n" in request.user for i in range(rows))
            return completion(None, refusal="no") if refused else honest(request)

        return answer

    with serve(by_model(a=honest, b=refusing(1))) as server:
        record = judge(server, judge_model="a,b", batch_size=1).judgements[0].record
        assert (record["num_samples"], record["failures_by_kind"]) == (19, {"refused": 1})
        assert record["agreement"]["num_samples"] == 19
        assert json.loads((PAIR / "a.json").read_text())["num_samples"] == 20
        server.script = by_model(a=honest, b=refusing(3))
        with pytest.raises(JudgeError, match=r"b: only 17 of 20 samples got a verdict \(refused 3\)"):
            judge(server, judge_model="a,b", batch_size=1, overwrite=True)


def test_a_local_model_judges_beside_one_at_an_endpoint_and_is_asked_once(tiny_model: Path) -> None:
    predictions(base=[50] * 3, **{"global": [90] * 3})
    local = f"local:{tiny_model}"
    with serve(by_model(good=honest)) as server:
        asked = {"judge_model": f"good,{local}", "repeats": 3, "device": "cpu", "reasons": True}
        found = judge(server, **asked, judge_price_in=1, judge_price_out=2)
        assert asked_of(server) == {"good": 2 * 2 * 3}
        record = found.judgements[0].record
        assert record["votes_per_sample"] == 6 + 2
        assert [one["model_asked"] for one in record["judges"]] == ["good", local]
        # the same verdicts as it gives alone, without reasons and once
        judge(server, judge_model=local, base_url="https://api.openai.com/v1", batch_size=20, device="cpu")
        assert server.calls == 12
    assert sum('"local' in line for line in (FOLDER / "base_verdicts.jsonl").read_text().splitlines()) == 0
    assert (FOLDER / "base_verdicts.jsonl").read_text().count("\n") == 18 + 6


def test_repeats_ask_for_more_and_keep_what_was_asked_once() -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4})
    log = FOLDER / "base_verdicts.jsonl"
    with serve(honest) as server:
        judge(server)
        once, first = PAIR.with_suffix(".json").read_bytes(), log.read_bytes()
        server.requests.clear()
        record = judge(server, repeats=3).judgements[0].record
        assert server.calls == 2 * 4
        # no request has a sample twice, and no two requests are the same text
        assert all(len({one["instruction"] for one in r.samples.values()}) == len(r.samples) for r in server.requests)
        assert len({request.user for request in server.requests}) == 8
        assert log.read_bytes().startswith(first)
        assert (record["votes_per_sample"], record["num_samples"], record["win"]) == (6, 4, 4)
        assert record["statistics"]["repeat_consistency"] == 1.0
        assert judge(server, repeats=3).spent["calls"] == judge(server, repeats=2).spent["calls"] == 0
        judge(server)
        assert PAIR.with_suffix(".json").read_bytes() == once
    assert (
        sorted(json.loads(line).get("repeat", 1) for line in log.read_text().splitlines())
        == [1] * 8 + [2] * 8 + [3] * 8
    )


def test_a_judge_that_changes_its_mind_is_outvoted_by_its_other_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4})
    answered: dict[tuple[str, str], int] = {}

    def wavering(request: Request) -> Answer:
        """Prefers the worse answer the second time."""
        (sample,) = request.samples.values()
        place = (sample["instruction"], sample["answer A"])
        answered[place] = answered.get(place, 0) + 1
        return contrary(request) if answered[place] == 2 else honest(request)

    with serve(wavering) as server:
        found = judge(server, repeats=3, batch_size=1, concurrency=1)
    record = found.judgements[0].record
    assert record["win"] == 4
    assert record["statistics"]["repeat_consistency"] == pytest.approx(1 / 3)
    assert "repeats say the same in 0.333 of the cases" in found.text()


def test_a_pair_in_both_directions_is_asked_once_and_has_both_results() -> None:
    predictions(base=[50, 50, 50, 50], **{"global": [90, 10, 50, 90], "client_0": [10, 95, 60, 90]})
    asked: dict[str, Any] = {"of": "all", "against": "all", "batch_size": 4}
    with serve(honest) as server:
        found = judge(server, **asked)
        # three pairs in two orders
        assert server.calls == 3 * 2
        records = {one.names: one.record for one in found.judgements}
        assert len(records) == 6
        for (of, against), record in records.items():
            other = records[against, of]
            assert [record[name] for name in ("win", "tie", "loss")] == [other[name] for name in ("loss", "tie", "win")]
            assert record["overall_prop_avg"] == other["overall_pred_avg"]
            assert record["statistics"]["first_slot_preference"] == other["statistics"]["first_slot_preference"]
        before = {path: path.read_bytes() for path in Path("evaluations_llm").rglob("*.json*")}
        assert judge(server, **asked).spent["calls"] == 0
        assert {path: path.read_bytes() for path in Path("evaluations_llm").rglob("*.json*")} == before
        # the other direction of a pair that an earlier command judged costs nothing either
        for path in FOLDER.glob("client_0_verdicts.jsonl"):
            path.unlink()
        assert judge(server, **asked, max_calls=0).spent["calls"] == 0
        server.requests.clear()
        judge(server, **asked, overwrite=True)
        assert server.calls == 6


def test_overwrite_asks_again_also_where_the_other_direction_has_verdicts_of_an_earlier_command() -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4, "client_0": [10] * 4})
    asked: dict[str, Any] = {"of": "base,0", "against": "global,base", "batch_size": 4}
    with serve(honest) as server:
        judge(server, batch_size=4)
        assert server.calls == 2
        # base against global takes over what global against base has, the two others are asked about
        judge(server, **asked)
        assert server.calls == 2 + 4
        judge(server, **asked, overwrite=True)
        assert server.calls == 6 + 6


def test_a_position_is_a_position_in_both_directions() -> None:
    predictions(base=[50] * 4, **{"global": [90] * 4})
    with serve(prefers_a) as server:
        found = judge(server, of="base,global", against="base,global")
        assert server.calls == 4
    for one in found.judgements:
        assert (one.record["position_flip_rate"], one.record["statistics"]["first_slot_preference"]) == (1.0, 1.0)
        assert one.record["overall_prop_avg"] == 50


def test_a_refusal_in_one_direction_is_one_in_the_other_and_is_not_asked_again() -> None:
    predictions(base=[50] * 20, **{"global": [90] * 20})

    def refusing(request: Request) -> Answer:
        return completion(None, refusal="no") if "task 7\n" in request.user else honest(request)

    with serve(refusing) as server:
        found = judge(server, of="base,global", against="base,global", batch_size=1)
        assert server.calls == 40
    assert [one.record["failures_by_kind"] for one in found.judgements] == [{"refused": 1}] * 2


def test_a_ranking_counts_a_pair_in_both_directions_once_and_is_that_of_the_majority() -> None:
    qualities = {"base": [50] * 8, "global": [90] * 6 + [10] * 2, "client_0": [60] * 5 + [40] * 3}
    predictions(**qualities)
    with serve(by_model(a=honest, b=honest, c=contrary)) as server:
        one_way = judge(server, of="global,0", against="base", judge_model="a").ranking
        # base and global are compared both ways, client 0 with base in one
        mixed = judge(server, of="base,global,0", against="base,global", judge_model="a")
        names = [one.names for one in mixed.judgements]
        assert names == [("global", "base"), ("client 0", "base"), ("base", "global"), ("client 0", "global")]
        assert mixed.ranking == judge(server, of="global,0", against="base,global", judge_model="a").ranking
        three = judge(server, of="global,0", against="base", judge_model="a,b,c").ranking
    assert three == one_way


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge_model": "a,a"}, "given twice"),
        ({"judge_model": "a,"}, "no model between"),
        ({"judge_model": "a,b", "judge_price_in": "1,2,3", "judge_price_out": 1}, "3 prices"),
        ({"judge_model": "a,local:x", "judge_price_in": "1,2", "judge_price_out": 1}, "2 prices"),
        ({"judge_model": "local:x,local:y", "repeats": 2}, "repeats is not supported with a local judge"),
        ({"judge_model": "a,b", "device": "cpu"}, "device is not supported with an endpoint"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_judges_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateLlmConfig.of(**given)

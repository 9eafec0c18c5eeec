"""The judge stage with a model of this machine: probabilities instead of a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import JudgeError, UsageError
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.stages import evaluate_llm

LOG = Path("evaluations_llm/homo/1/base_verdicts.jsonl")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("api_key", raising=False)


def predictions(count: int, **more: str) -> None:
    folder = Path("predictions/homo/1")
    folder.mkdir(parents=True, exist_ok=True)
    for who in ("base", "global"):
        row = {"input": "", "category": "c"}
        rows = [{**row, "instruction": f"task {i}", "answer": f"{who} says {i}"} for i in range(count)]
        rows[0] |= more
        (folder / f"{who}_output.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge(model: Path, **more: Any) -> evaluate_llm.Judgements:
    config = EvaluateLlmConfig.of(
        **{"name": "homo", "of": "global", "against": "base", "judge_model": f"local:{model}", "device": "cpu", **more}
    )
    return evaluate_llm.run(config)


def verdicts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LOG.read_text().splitlines()]


def test_a_local_model_judges_both_orders_without_a_key_and_a_second_run_does_not_load_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions(3)
    result = judge(tiny_model).judgements[0]
    assert result.record["num_samples"] == 3
    assert result.record["judge"]["models_returned"] == [str(tiny_model)]
    assert result.record["judge"]["host"].startswith("local/1/")
    first, before = verdicts(), result.file.read_bytes()
    assert [one["order"] for one in first] == ["baseline_first", "proposed_first"] * 3
    monkeypatch.setattr("fedlora.llm.base_model.load_base_model", None)
    assert judge(tiny_model).spent["calls"] == 0
    assert result.file.read_bytes() == before


def test_the_same_model_gives_the_same_verdicts(tiny_model: Path) -> None:
    predictions(3)
    judge(tiny_model)
    first = LOG.read_bytes()
    LOG.unlink()
    judge(tiny_model)
    assert LOG.read_bytes() == first


def test_the_verdict_is_the_likeliest_letter_after_the_prompt_as_the_model_itself_says(tiny_model: Path) -> None:
    predictions(2)
    seen: list[tuple[list[int], torch.Tensor]] = []

    def load(*names: str, **how: Any) -> BaseModel:
        base = load_base_model(*names, **how)
        embed = base.model.get_input_embeddings()
        embed.register_forward_hook(lambda module, given, out: seen.append((given[0][0].tolist(), out)))
        return base

    config = EvaluateLlmConfig.of(
        name="homo", of="global", against="base", judge_model=f"local:{tiny_model}", device="cpu"
    )
    evaluate_llm.run(config, load=load)
    base = load_base_model(str(tiny_model), device="cpu")
    prompts = [ids for ids, _ in seen][-4:]
    texts = [base.tokenizer.decode(ids) for ids in prompts]
    assert all("Which answer is better?" in text for text in texts)
    assert texts[0].index("base says 0") < texts[0].index("global says 0")
    assert texts[1].index("base says 0") > texts[1].index("global says 0")
    letters = [base.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABC"]
    for ids, verdict in zip(prompts, verdicts(), strict=True):
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        chances = torch.softmax(logits[letters], dim=0)
        assert verdict["verdict"] == ("A", "B", "tie")[int(chances.argmax())]
        assert verdict["score_a"] == pytest.approx(100 * float(chances[0] + chances[2] / 2), abs=1)


def test_a_question_that_is_longer_than_the_context_is_counted_and_never_shortened(tiny_model: Path) -> None:
    predictions(2, instruction="x" * 20_000)
    with pytest.raises(JudgeError, match=r"only 1 of 2 samples got a verdict \(truncated 1\)"):
        judge(tiny_model)
    assert judge(tiny_model, allow_partial=True).judgements[0].record["failures_by_kind"] == {"truncated": 1}


@pytest.mark.parametrize("flag", [{"max_calls": 3}, {"judge_url": "https://x.example/v1"}, {"judge_max_tokens": 9}])
def test_what_only_an_endpoint_has_is_refused(flag: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not supported with a local judge"):
        EvaluateLlmConfig.of(judge_model="local:smollm2-135m", **flag)


def test_what_only_a_local_judge_has_is_refused_for_an_endpoint_and_a_model_must_be_named() -> None:
    with pytest.raises(UsageError, match="device is not supported with an endpoint"):
        EvaluateLlmConfig.of(device="cpu")
    with pytest.raises(UsageError, match="name a model"):
        EvaluateLlmConfig.of(judge_model="local:")

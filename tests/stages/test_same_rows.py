"""The same examples, written as each kind of row, train to the same adapter where they mean the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.train import TrainConfig
from fedlora.stages import train

EXAMPLES = [(f"What follows {number}?", str(number + 1), f"c{number % 2}") for number in range(60)]

CHATS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "instruction": lambda ask, say, kind: {"instruction": ask, "input": "", "output": say, "category": kind},
    "dolly": lambda ask, say, kind: {"instruction": ask, "context": None, "response": say, "category": kind},
    "messages": lambda ask, say, kind: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}],
        "category": kind,
    },
    "conversations": lambda ask, say, kind: {
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}],
        "category": kind,
    },
    "prompts of messages": lambda ask, say, kind: {
        "prompt": [{"role": "user", "content": ask}],
        "completion": [{"role": "assistant", "content": say}],
        "category": kind,
    },
    "columns": lambda ask, say, kind: {"q": {"text": ask}, "a": [say], "topic": kind},
}
COLUMNS = "instruction=q.text,response=a.0,category=topic"
PLAIN: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "completion": lambda ask, say, kind: {"prompt": f"{ask}\n", "completion": say, "category": kind},
    "renamed": lambda ask, say, kind: {"before": f"{ask}\n", "after": say, "category": kind},
}


def train_on(folder: Path, rows: list[dict[str, Any]], model: Path, **options: Any) -> bytes:
    """The global adapter of one round over two clients."""
    for client in range(2):
        file = folder / "silos" / f"{client}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[client::2]))
    config = TrainConfig.of(
        **{
            "exp_name": "run",
            "base_model": str(model),
            "base_dtype": "float32",
            "device": "cpu",
            "data_path": folder / "silos",
            "model_dir": folder / "models",
            "client_selection_frac": 1,
            "num_communication_rounds": 1,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "test_share": 0.2,
            **options,
        }
    )
    train.run(config)
    return (folder / "models/run/1/global_adapter_model.bin").read_bytes()


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_one_exchange_means_the_same_in_every_kind_of_row(tiny_model, tmp_path, template):
    found = {
        name: train_on(
            tmp_path / name,
            [write(*example) for example in EXAMPLES],
            tiny_model,
            prompt_template=template,
            **({"columns": COLUMNS} if name == "columns" else {}),
        )
        for name, write in CHATS.items()
    }
    assert {name for name in found if found[name] != found["instruction"]} == set()


def test_texts_without_a_template_mean_the_same_under_every_template_and_name(tiny_model, tmp_path):
    found = []
    for name, write in PLAIN.items():
        for template in ("chat", "alpaca"):
            columns = {"columns": "prompt=before,completion=after"} if name == "renamed" else {}
            rows = [write(*example) for example in EXAMPLES]
            found.append(
                train_on(tmp_path / f"{name} {template}", rows, tiny_model, prompt_template=template, **columns)
            )
    assert len(set(found)) == 1
    # the loss is on all of a text
    texts = [{"text": f"{ask}\n{say}", "category": kind} for ask, say, kind in EXAMPLES]
    assert train_on(tmp_path / "text", texts, tiny_model) not in found
    prompts = [PLAIN["completion"](*example) for example in EXAMPLES]
    text, completion = (
        train_on(tmp_path / f"all {name}", rows, tiny_model, train_on="all", test_share=0)
        for name, rows in (("text", texts), ("completion", prompts))
    )
    assert text == completion

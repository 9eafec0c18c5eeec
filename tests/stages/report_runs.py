"""Runs with answers, as the stages leave them, without a model: for tests of what a report makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.config.score import ScoreConfig
from fedlora.console import collect_lines
from fedlora.data.client_names import name_of_file
from fedlora.data.row_parts import sha256_of_rows
from fedlora.methods.table import METHODS
from fedlora.stages import score

ROUNDS = 3


@dataclass(frozen=True)
class Runs:
    """Runs below `root` whose clients hold one category each; the tests are `rows_each` rows of each category."""

    root: Path
    categories: Sequence[str] = ("capitals", "dates", "sums")
    client_names: Sequence[str] = ()
    rows_each: int = 4
    rounds: int = ROUNDS
    letters: int = 0
    """Length that every answer is filled up to."""

    @property
    def test_file(self) -> Path:
        return self.root / "test.jsonl"

    @property
    def files(self) -> list[str]:
        names = self.client_names or [f"local_training_{number}" for number, _ in enumerate(self.categories)]
        return [f"{name}.json" for name in names]

    def config(self, *names: str, **fields: Any) -> ReportConfig:
        folders = {name: self.root / name for name in ("model_dir", "prediction_dir", "rouge_dir", "llm_dir")}
        given = {
            "exp_names": names,
            "communication_rounds": self.rounds,
            "report_dir": self.root / "reports",
            **folders,
            **fields,
        }
        return ReportConfig.of(**given)

    def rows(self) -> list[dict[str, str]]:
        return [
            {"instruction": f"{category}: question {number}", "input": "", "output": f"right {number}",
             "category": category}
            for category in self.categories
            for number in range(self.rows_each)
        ]  # fmt: skip

    def write_tests(self, rows: Sequence[Mapping[str, str]] = ()) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        lines = rows or self.rows()
        self.test_file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")

    def train(self, mode: str, *, name: str = "", **more: Any) -> str:
        """run.json and metrics.jsonl of a run; each further one of a method needs a name."""
        name = name or mode
        folder = self.root / "model_dir" / name
        folder.mkdir(parents=True, exist_ok=True)
        clients = [
            {"client_id": number, "file": file, "sha256": hashlib.sha256(file.encode()).hexdigest(),
             "num_examples": 10 + number, "num_empty": 0, "num_validation": 2, "num_skipped": 0,
             "num_prompt_tokens": 400 + number, "num_response_tokens": 90, "categories": {category: 10 + number}}
            for number, (category, file) in enumerate(zip(self.categories, self.files, strict=True))
        ]  # fmt: skip
        config = {"exp_name": name, "federation_mode": mode, "base_model": "tiny", "seed": 42, "lora_r": 8,
                  "local_val_set_size": 0, "local_learning_rate": 0.002, "num_communication_rounds": self.rounds,
                  "lora_target_modules": ["q_proj", "v_proj"]}  # fmt: skip
        run = {"format": 1, "exp_name": name, "mode": mode, "base_model": "tiny", "config": config, "clients": clients,
               "versions": {"fedlora": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "base_dtype": "float32",
               "adapter": {"num_parameters": 1000, "num_bytes": 4000}, "state": "finished", "environment": {},
               "layout": {}}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        lines = [json.dumps(row) + "\n" for row in self._metrics(mode, **more)]
        (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        return name

    def answer(self, name: str, output: str, wrong: Sequence[int] = (), *, round_number: int = 0, **texts: str) -> None:
        """Predictions of an adapter: right but for the rows `wrong`; `texts` is row -> answer, as `row_3="text"`."""
        folder = self.root / "prediction_dir" / name / str(round_number or self.rounds)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in self.test_file.read_text(encoding="utf-8").splitlines()]
        lines = []
        for place, row in enumerate(rows):
            right = row.pop("output")
            text = texts.get(f"row_{place}", f"not {right}" if place in wrong else right)
            row["answer"] = text.ljust(self.letters, "x")
            lines.append(json.dumps(row) + "\n")
        file = folder / f"{output}_output.jsonl"
        file.write_text("".join(lines), encoding="utf-8")
        meta = {"adapter_sha256": None if output == "base" else "a" * 64, "num_rows": len(rows), "decoding": {},
                "prompt_template": "chat", "test_path": str(self.test_file),
                "test_file_sha256": sha256_of_rows(self.test_file)}  # fmt: skip
        (folder / f"{output}_output.meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def score(self, *subjects: str) -> None:
        """What `fedlora score` leaves of `run/round/output` subjects."""
        with collect_lines():
            score.run(
                ScoreConfig.of(
                    of_subjects=list(subjects),
                    model_dir=self.root / "model_dir",
                    prediction_dir=self.root / "prediction_dir",
                    evaluation_dir=self.root / "rouge_dir",
                    target_file=self.test_file,
                )
            )

    def mark_clients(self, *outputs: str) -> None:
        """Say in the scores of `run/output` whose test rows they are: each category is its client's."""
        for name in outputs:
            run, _, output = name.partition("/")
            file = self.root / "rouge_dir" / run / str(self.rounds) / f"{output}_scores.jsonl"
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for row in rows:
                row["client"] = name_of_file(self.files[list(self.categories).index(row["category"])])
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _metrics(
        self, mode: str, *, excluded: str = "", epsilon: float = 0.0, error: float = 0.0
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"kind": "round", "round": 0, "val_loss": 3.0}]
        place = list(METHODS).index(mode)
        clients = [-1] if METHODS[mode].pools_rows else range(len(self.categories))
        for number in range(1, self.rounds + 1):
            loss = 3.0 / (1 + 0.4 * number) + 0.02 * place
            for client in clients:
                rows.append({"kind": "client", "round": number, "client_id": client, "num_steps": 4, "num_tokens": 700,
                             "bytes_down": 4000, "bytes_up": 4000, "seconds": 1.5, "val_loss": loss})  # fmt: skip
            left_out = [{"client_id": 1, "kind": "diverged", "reason": excluded}] if excluded else []
            row = {"kind": "round", "round": number, "quarantined": left_out, "loss": 0.8 * loss, "val_loss": loss}
            if error:
                row |= {"aggregation_error": error / number, "drift_cosine_mean": 0.8, "drift_norm_mean": 0.1 * number}
            if epsilon:
                row["privacy"] = {
                    "unit": "client",
                    "epsilon": epsilon * number**0.5,
                    "delta": 1e-5,
                    "accountant": "rdp",
                }
            rows.append(row)
        return rows

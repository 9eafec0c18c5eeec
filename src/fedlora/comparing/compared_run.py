"""One run of a comparison: trained, scored, and recorded so that nothing is done twice.

A record says what was measured, or why there is nothing to measure. It is written when a run is trained and scored on
the validation rows, and again when its method has chosen it and it was scored on the test rows.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.comparing.experiment import DataSet, base_name_of
from fedlora.comparing.known_bases import KnownBases
from fedlora.comparing.row_gains import OWN_ROWS
from fedlora.comparing.scoring import Scorer, measure_spending
from fedlora.config.compare import CompareConfig
from fedlora.config.evaluate import EvaluateRougeConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.console import collect_lines
from fedlora.errors import FedloraError, LockedError, StorageError, TrainingError
from fedlora.evaluation.own_loss import client_shares
from fedlora.files import read_json, write_json
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import ComparisonPaths, RunPaths
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import find_personal
from fedlora.stages import evaluate_rouge, generate, train
from fedlora.stopping import stop_if_asked

Record = dict[str, Any]
TRAINED, FAILED = "trained", "failed"


@dataclass(frozen=True)
class Laboratory:
    """What all runs of a comparison share."""

    config: CompareConfig
    paths: ComparisonPaths
    base: ResidentBase
    bases: KnownBases

    def find(self, name: str) -> Record | None:
        """The record of a run; None when it must be trained, for the first time or as a retry."""
        file = self.paths.score_file(name)
        record = read_json(file) if file.is_file() else None
        return None if record is not None and record["state"] == FAILED and self.config.retry else record

    def train(self, run: TrainConfig, data: DataSet) -> Record:
        """Train a run, or what is left of it, and score it on the validation rows.

        What goes wrong with it is its record; only what the file system refuses is raised, and a lock held by others.
        """
        if (known := self.find(run.exp_name)) is not None:
            return known
        record: Record = {"run": run.exp_name, "mode": run.federation_mode, "seed": run.seed}
        record |= {"learning_rate": run.local_learning_rate, "config": run.record()}
        began = time.monotonic()
        with _recording(record):
            paths = train.run(run, load=self.base.load).paths
            record["validation"] = _finite(self._scorer(run).score_run(paths, data.validation), "validation")
            recorded = read_run(paths)
            record["base_model"] = self.bases.describe(run.base_model, recorded.base_identity)
            shares = data.shares or client_shares(recorded.clients)
            if data.validation_shares is not None:
                record["validation_shares"] = data.validation_shares
            record |= {"state": TRAINED, "spent": measure_spending(paths), "shares": shares, "test": None}
            record["wall_seconds"] = round(time.monotonic() - began, 3)
        write_json(self.paths.score_file(run.exp_name), record)
        return record

    def test(self, run: TrainConfig, data: DataSet) -> Record:
        """Score a trained run on the test rows, along its way and by its answers where that is asked for."""
        known = self.train(run, data)
        curved, answered = run.federation_mode in self.config.curves, bool(self.config.answers_per_cat)
        paths = RunPaths(self.paths.model_dir, run.exp_name)
        # of runs that an earlier version measured and that are gone, a remark says what is missing
        rowed = bool(data.own_groups) and (known.get("test") is None or paths.run_file.is_file())
        if known["state"] == FAILED or (
            known["test"] is not None
            and ("curve" in known or not curved)
            and ("answers" in known or not answered)
            and (OWN_ROWS in known or not rowed)
        ):
            return known
        record: Record = dict(known)
        with _recording(record):
            if not paths.run_file.is_file():
                # its folder was removed before this was asked of it: trained again, it has the same bytes
                train.run(run, load=self.base.load)
            scorer = self._scorer(run)
            record["test"] = _finite(scorer.score_run(paths, data.test), "test")
            if data.own_groups:
                record[OWN_ROWS] = scorer.score_own_rows(paths, data.test, data.own_groups)
            if curved and read_run(paths).has_global_model:
                record["curve"] = scorer.score_hops(paths, data.test)
            if answered:
                record["answers"] = self._answer(run, data, paths)
        write_json(self.paths.score_file(run.exp_name), record)
        return record

    def forget(self, name: str) -> None:
        """Remove the folder of a run about which everything is measured."""
        if not self.config.keep_runs:
            shutil.rmtree(RunPaths(self.paths.model_dir, name).root, ignore_errors=True)

    def test_base(self, run: TrainConfig, data: DataSet) -> Record:
        """The untrained base on the test rows of a data set."""
        name = base_name_of(run, data, self.bases)
        known = self.find(name) or {"run": name, "mode": "base", "seed": run.seed, "state": TRAINED, "test": None}
        answered = bool(self.config.answers_per_cat)
        rowed = bool(data.own_groups)
        if known["test"] is not None and ("answers" in known or not answered) and (OWN_ROWS in known or not rowed):
            return known
        with collect_lines():
            scorer = self._scorer(run)
            known["base_model"] = self.bases.describe(run.base_model, scorer.base_identity)
            known["test"] = {"global": scorer.losses(None, data.test), "clients": {}}
            if rowed:
                known[OWN_ROWS] = scorer.base_own_rows(data.test, data.own_groups)
            if answered:
                asked = self._ask(run, data, name, is_base_model=True)
                known["answers"] = {"global": asked, "clients": {}}
        write_json(self.paths.score_file(name), known)
        return known

    def _scorer(self, run: TrainConfig) -> Scorer:
        base = self.base.load(
            run.base_model,
            quantization=run.quantization,
            device=run.devices[0] if run.devices else run.device,
            dtype=run.base_dtype,
            trust_remote_code=run.trust_remote_code,
        )
        return Scorer(base, run)

    def _answer(self, run: TrainConfig, data: DataSet, paths: RunPaths) -> Record:
        """Exact match and ROUGE-L per category, of the global adapter or of every client that has one of its own."""
        asked: Record = {"global": None, "clients": {}}
        if read_run(paths).has_global_model:
            asked["global"] = self._ask(run, data, run.exp_name)
        for client in find_personal(paths, run.num_communication_rounds):
            asked["clients"][str(client)] = self._ask(run, data, run.exp_name, is_global_model=False, client_id=client)
        return asked

    def _ask(self, run: TrainConfig, data: DataSet, name: str, **subject: Any) -> Mapping[str, Mapping[str, float]]:
        """Through the stages themselves."""
        where: dict[str, Any] = {
            "exp_name": name,
            "communication_rounds": run.num_communication_rounds,
            "model_dir": self.paths.model_dir,
            "prediction_dir": self.paths.answers_dir("predictions"),
            "row_kind": run.row_kind,
            **subject,
        }
        answering = {
            "base_model": run.base_model,
            "test_file_path": data.answered,
            "max_new_tokens": self.config.max_new_tokens,
            "base_dtype": run.base_dtype,
            "device": run.devices[0] if run.devices else run.device,
            "trust_remote_code": run.trust_remote_code,
            "prompt_template": run.prompt_template,
            "cutoff_len": run.cutoff_len,
            "quantization": run.quantization,
        }
        generate.run(GenerateConfig.of(**where, **answering), load=self.base.load)
        found = (
            evaluate_rouge.run(
                EvaluateRougeConfig.of(
                    **where, target_file=data.answered, evaluation_dir=self.paths.answers_dir("rouge")
                )
            )
            .scores[0]
            .record
        )
        shares = found["fedlora"]["exact_match"]["categories"]
        return {category: {"exact": share, "rouge_l": found[category]["rougeL"]} for category, share in shares.items()}


@contextlib.contextmanager
def _recording(record: Record) -> Iterator[None]:
    """What is done inside is quiet, and what goes wrong with it becomes its record, unforeseen faults included."""
    lines: list[str] = []
    try:
        with collect_lines(lines):
            yield
    except (StorageError, LockedError, OSError):
        raise
    except Exception as error:
        stop_if_asked()
        reason = str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, FedloraError):
            lines += traceback.format_exc().splitlines()
        record |= {"state": FAILED, "reason": reason, "said": lines[-20:]}


def _finite(score: Record, rows: str) -> Record:
    """TrainingError when a loss is not a number: such a run is reported and left out of means."""
    models = [*score["clients"].values(), *([score["global"]] if score["global"] else [])]
    if not all(math.isfinite(loss) for losses in models for loss in losses.values()):
        raise TrainingError(f"the loss on the {rows} rows is not a number", hint="lower the learning rate")
    return score

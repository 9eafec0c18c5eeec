"""run.json of a run that starts: what it trains, on which base, in which environment."""

from __future__ import annotations

from fedlora.config.train import TrainConfig
from fedlora.engines.workbench import Workbench
from fedlora.federated.adapters import num_bytes
from fedlora.methods.choosing import LoadedMethod
from fedlora.methods.outside import record_method
from fedlora.runs.environment import describe_environment, library_versions
from fedlora.runs.recorded_base import record_identity
from fedlora.runs.run_records import RunRecord
from fedlora.training.taken_start import Start


def make_record(
    config: TrainConfig, method: LoadedMethod, bench: Workbench, start: Start, recorded: RunRecord | None
) -> RunRecord:
    """The record of a run that trains from `start`; `recorded` is that of its first start, where it resumes."""
    base, secret = bench.base, bench.trainer.secret
    # what a run was started on is not found out later
    identity = recorded.base_identity if recorded else record_identity(base, every_byte=config.verify_base)
    return RunRecord(
        exp_name=config.exp_name,
        mode=config.federation_mode,
        state="training",
        base_model=config.base_model,
        base_dtype=base.dtype_name,
        config=config.record(),
        versions=library_versions(config.quantization),
        environment=describe_environment(base),
        layout=bench.book.layout.record(),
        clients=tuple(bench.examples.facts.values()),
        has_global_model=method.has_global_model,
        privacy={"secret_id": secret.id} if secret else None,
        method=record_method(config.method),
        base_identity=identity,
        more={
            "format": 1,
            "has_personal_models": method.keeps_personal_model,
            "hyperparameters": method.hyperparameters,
            "device": str(base.device),
            "lora_scaling": config.lora_scaling,
            "adapter": {
                "num_parameters": sum(value.numel() for value in start.adapter.values()),
                "num_bytes": num_bytes(start.adapter),
            },
            **start.record,
        },
    )

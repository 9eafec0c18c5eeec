"""Decide by the node's configuration whether it accepts what a run asks for.

A request is a configuration made elsewhere. Of it only the fields that decide the mathematics are taken; where rows
lie, on which device they are trained and whose code may run are decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config.target_names import REGULAR
from fedlora.config.train import PLACEMENT_FIELDS, TrainConfig
from fedlora.console import say
from fedlora.errors import FedloraError, UsageError
from fedlora.flower.node_config import NodeConfig
from fedlora.methods.combinations import check_ranks
from fedlora.methods.table import METHODS, find_method
from fedlora.types import TrainTask


class Refusal(FedloraError):  # noqa: N818  (it is an answer, not a fault)
    """A refused request; its text goes to the server and names only the request and the bound."""

    exit_code = 2


def accept_config(policy: NodeConfig, asked: Mapping[str, Any], source: Any = None) -> TrainConfig:
    """The configuration under which this node trains; Refusal when the run asks for more than the node allows.

    `source` is what the server says of the source of a method from outside.
    """
    _check_method(policy, asked.get("federation_mode"), source)
    # which columns a model is trained on is the owner's to say, as where the rows lie
    decided_here = {"device": policy.device, "data_path": policy.data_path}
    decided_here |= {"row_kind": policy.row_kind, "columns": policy.columns}
    fields = {name: value for name, value in asked.items() if name not in PLACEMENT_FIELDS}
    if fields.pop("trust_remote_code", False) is not False:
        raise Refusal("this node runs no code that a model repository ships")
    try:
        config = TrainConfig.model_validate({**fields, **decided_here})
        check_ranks(config)
    except (ValueError, UsageError):
        # the text of a validation error repeats its input
        raise Refusal("the run's configuration is not one that this node's version of fedlora knows") from None
    reason = find_excess(policy, config)
    if reason is not None:
        raise Refusal(reason)
    return config


def _check_method(policy: NodeConfig, name: Any, source: Any) -> None:
    """Refusal for a method from outside that the owner has not listed, has not installed, or has in another version."""
    if not isinstance(name, str) or name in METHODS:
        return
    # before its package is imported
    if ":" in name or name not in policy.federation_modes:
        raise Refusal(f"federation_mode={name[:80]!r} is not in the federation_modes of this node")
    try:
        row = find_method(name)
    except UsageError as error:
        say(f"{error} ({error.hint})")
        raise Refusal(f"federation_mode={name[:80]!r} cannot be loaded on this node") from None
    if row.source is None or not isinstance(source, Mapping) or row.source.find_changes(source):
        version = f"{row.source.distribution} {row.source.version}".strip() if row.source else ""
        raise Refusal(
            f"federation_mode={name[:80]!r} has another source on this node ({version}) than on the server: "
            "install the same version on both"
        )


def find_excess(policy: NodeConfig, config: TrainConfig) -> str | None:
    """The first reason why a well-formed request is beyond the node's bounds, or None."""
    if policy.find_model(config.base_model) is None:
        return f"base_model={config.base_model[:80]!r} is not allowed on this node"
    if config.method.pools_rows:
        return f"federation_mode={config.federation_mode} brings rows together, and no row leaves this node"
    if config.is_private:
        return "differential privacy is not offered by this node's version of fedlora"
    if policy.federation_modes and config.federation_mode not in policy.federation_modes:
        return f"federation_mode={config.federation_mode} is not allowed on this node"
    if 0 < config.local_val_set_size < policy.min_examples:
        # a loss is told of the rows held back, too
        return f"local_val_set_size={config.local_val_set_size} is below this node's min_examples={policy.min_examples}"
    if any(target.startswith(REGULAR) for target in config.lora_target_modules):
        # matching one can take any time
        return f"lora_target_modules: this node takes names and wildcards of a server, no expressions after {REGULAR}"
    if config.local_learning_rate * config.weight_decay >= 1:
        return "local_learning_rate times weight_decay is 1 or more: only the last step's rows would count"
    bounds = {
        "lora_r": policy.max_lora_r,
        "local_num_epochs": policy.max_local_epochs,
        "num_communication_rounds": policy.max_rounds,
        "cutoff_len": policy.max_cutoff_len,
        "tokens_per_pass": policy.max_tokens_per_pass,
        "private_metrics_tokens": policy.max_cutoff_len,
    }
    for name, most in bounds.items():
        if (getattr(config, name) or 0) > most:
            return f"{name}={getattr(config, name)} is above this node's bound of {most}"
    return None


def check_task(policy: NodeConfig, config: TrainConfig, task: TrainTask) -> None:
    """Refusal unless a task is for this client, its rows alone, and a round that the run has."""
    _check_place(policy, config, task)
    if task.accepted is not None and not 1 <= task.accepted < task.round:
        raise Refusal("the task starts from a round that is not before its own")


def check_measuring(policy: NodeConfig, config: TrainConfig, task: TrainTask) -> None:
    """Refusal unless numbers are asked of this client, after a round that the run has."""
    _check_place(policy, config, task)
    if task.accepted is not None and not 1 <= task.accepted <= task.round:
        raise Refusal("the client's update is of a later round than the one that is measured")


def _check_place(policy: NodeConfig, config: TrainConfig, task: TrainTask) -> None:
    numbers = (task.client_id, task.round, task.wave, *task.rows_of, 1 if task.accepted is None else task.accepted)
    # 1.0 and True are equal to 1, and would name other files
    if not all(type(number) is int for number in numbers):
        raise Refusal("the task's numbers are not whole ones")
    if task.client_id != policy.client_id or tuple(task.rows_of) != (policy.client_id,):
        raise Refusal(f"this node is client {policy.client_id} and trains only on this client's rows")
    if not 1 <= task.round <= config.num_communication_rounds:
        raise Refusal(f"round {task.round} is not one of the run's {config.num_communication_rounds}")

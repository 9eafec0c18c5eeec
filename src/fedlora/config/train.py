"""Configuration of the `train` stage: what its fields may be together, and what a run is known by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from fedlora.config.method_options import check_can_be_sent, options_as_fields
from fedlora.config.private_metrics import PrivateMetricFields
from fedlora.config.prompting import DATE, PromptSettings
from fedlora.config.train_fields import TrainFields
from fedlora.config.who import read_round
from fedlora.methods.combinations import check_configuration
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS

TrainOn = Literal["assistant", "last", "all"]
"""Which tokens of a conversation have a loss: those of every reply, of the last one, or all but the first."""

PLACEMENT_FIELDS = frozenset(
    {
        "allow_drift",
        "client_retries",
        "data_path",
        "device",
        "devices",
        "max_epsilon",
        "min_clients",
        "model_dir",
        "overwrite",
        "step_log",
        "token_cache",
        "track",
        "track_dir",
        "track_private",
        "track_project",
        "verify_base",
        "val_data_path",
    }
)
"""Fields that say where a run happens or when it stops, not what it computes."""


class TrainConfig(TrainFields):
    """Train one federated method over all rounds. Adapters and metrics are written to model_dir/exp_name."""

    @field_validator(
        *("client_selection_frac", "local_learning_rate", "lora_alpha", "max_update_norm", "max_update_norm_ratio"),
        *("dp_noise_multiplier", "dp_clip", "dp_example_noise_multiplier", "dp_example_clip", "max_epsilon"),
    )
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("init_from")
    @classmethod
    def _names_an_adapter(cls, value: str) -> str:
        parts = value.split("/")
        if value and not (len(parts) in (2, 3) and all(parts) and read_round(parts[1]) is not None):
            raise ValueError("give NAME/ROUND or NAME/ROUND/who, such as first/last or first/3/library")
        return value

    @field_validator("devices")
    @classmethod
    def _numbers_are_cuda(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(f"cuda:{name}" if name.isdigit() else name for name in value)
        if len({name for name in named if name != "cpu"}) < sum(name != "cpu" for name in named):
            raise ValueError("a device is named twice")
        return named

    @model_validator(mode="after")
    def _ranks_fit(self) -> TrainConfig:
        if bad := sorted({rank for rank in self.client_ranks or () if not 1 <= rank <= self.lora_r}):
            raise ValueError(f"client_ranks={bad[0]}: a client's rank is at least 1 and at most lora_r={self.lora_r}")
        return self

    @model_validator(mode="after")
    def _everybody_starts_alike(self) -> TrainConfig:
        if self.init_from and self.client_ranks is not None:
            raise ValueError("init_from starts every client from the whole adapter: leave client_ranks out")
        return self

    @model_validator(mode="after")
    def _one_way_to_name_devices(self) -> TrainConfig:
        if self.devices and self.chosen("device"):
            raise ValueError("give device or devices, not both")
        return self

    @model_validator(mode="after")
    def _workers_can_load_the_method(self) -> TrainConfig:
        if len(self.devices) > 1 and self.method_row is not None:
            check_can_be_sent(self.method_row)
        return self

    @model_validator(mode="after")
    def _one_way_to_say_what_is_trained(self) -> TrainConfig:
        if self.train_on_inputs and self.chosen("train_on") and self.train_on != "all":
            raise ValueError("train_on_inputs means train_on=all: leave one of them out")
        return self

    @model_validator(mode="after")
    def _sgd_has_no_moments(self) -> TrainConfig:
        if self.local_optimizer == "sgd" and self.optimizer_state == "keep":
            raise ValueError("local_optimizer=sgd keeps nothing: leave optimizer_state out")
        return self

    @model_validator(mode="after")
    def _only_norms_quarantine(self) -> TrainConfig:
        if self.norm_action == "quarantine" and (self.max_update_norm_ratio or not self.max_update_norm):
            raise ValueError("norm_action=quarantine needs max_update_norm, and max_update_norm_ratio can only clip")
        return self

    @model_validator(mode="after")
    def _method_takes_it(self) -> TrainConfig:
        check_configuration(self)
        return self

    @property
    def prompting(self) -> PromptSettings:
        """What prompts are made with besides the tokenizer."""
        return PromptSettings(
            self.prompt_template, self.template_text, self.template_kwargs, self.template_date, self.token_rule
        )

    @property
    def trained_tokens(self) -> TrainOn:
        """Which tokens of a training row have a loss."""
        return "all" if self.train_on_inputs else self.train_on

    @property
    def measured_tokens(self) -> TrainOn:
        """Which tokens of a row that is only measured have a loss: those of replies."""
        return "last" if self.train_on == "last" else "assistant"

    @property
    def method(self) -> Method:
        """The row of the method that is trained."""
        return self.method_row or METHODS[self.federation_mode]

    @property
    def limits_clients(self) -> bool:
        """Whether what one client may contribute is limited."""
        return bool(self.max_update_norm or self.max_update_norm_ratio or self.max_client_weight < 1)

    @property
    def is_private(self) -> bool:
        """Whether the run bounds what it reveals about one client, or about one example."""
        return self.dp_noise_multiplier is not None or self.dp_example_noise_multiplier is not None

    @property
    def logs_steps(self) -> bool:
        """Whether the loss of every step is written."""
        return self.step_log == "on" or (self.step_log == "auto" and not self.is_private)

    @property
    def lora_scaling(self) -> float:
        """`s` in `dW = s * B @ A`."""
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)

    def record(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values: what run.json keeps."""
        unused = {name for name, then in LATER_FIELDS.items() if getattr(self, name) == then}
        exclude = {*PLACEMENT_FIELDS, *unused, "method_options"}
        return self.model_dump(mode="json", exclude=exclude) | self.method_options

    def full_record(self) -> dict[str, Any]:
        """`record` with the options that were once fields of every run, as null where they are not given: what is
        hashed, so that runs keep the identity that they had then."""
        return dict.fromkeys(ONCE_FIELDS) | self.record()

    def identity(self) -> dict[str, Any]:
        """What a round computes from: everything but the name, and without the number of rounds where neither a
        client's learning rate nor the method depends on it, for such a run may be prolonged."""
        may_grow = self.lr_schedule in ("constant", "linear_per_round") and self.method.bound_to_length is False
        free = {"exp_name", "num_communication_rounds"} if may_grow else {"exp_name"}
        # what is measured changes nothing that is trained
        free |= PrivateMetricFields.model_fields.keys()
        return {name: value for name, value in self.full_record().items() if name not in free}


COMBINING_FIELDS = frozenset(
    {
        *(name for name in TrainConfig.model_fields if name.startswith("dp_")),
        *(
            "max_epsilon",
            "max_update_norm",
            "max_update_norm_ratio",
            "norm_action",
            "max_client_weight",
            "client_ranks",
        ),
        *options_as_fields(tuple(METHODS.values())),
    }
)
"""Fields that say how updates are combined: the baselines of a comparison combine none, and are what privacy costs
something against."""

LATER_FIELDS: Mapping[str, Any] = {
    "test_share": 0.0,
    "row_kind": "auto",
    "columns": {},
    "template_text": "",
    "template_kwargs": {},
    "template_date": DATE,
    "token_rule": 1,
    "train_on": "assistant",
    "init_from": "",
    "private_metrics": (),
    "private_metrics_every": None,
    "private_metrics_rows": 100,
    "private_metrics_tokens": 64,
    "private_metrics_min": 10,
}
"""Fields that are younger than runs which may still be used, with the value that these had: recorded where they have
another, so that these runs keep their identity."""

ONCE_FIELDS = (
    *("server_learning_rate", "server_momentum", "server_beta1", "server_beta2", "server_tau"),
    *("proximal_mu", "rotation_strength", "ditto_lambda", "personal_weight", "personal_rounds"),
    *("residual_rank", "export_rank", "trimmed_share", "num_hostile", "krum_selected"),
    *("weiszfeld_steps", "weiszfeld_smoothing", "rank_normalisation", "prune_to", "tail_penalty", "svd_split"),
)
"""Options that run.json held as null in every run before options had a field of their own. It does not grow."""

"""Configuration of the `train` stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from fedlora.config.method_options import MethodOptions, options_as_fields
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Names, OptionalFloat, OptionalInt, OptionalRanks, flag
from fedlora.methods.combinations import check_configuration
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS, find_method

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Template = Literal["alpaca", "chat"]
Quantization = Literal["none", "int8", "nf4"]

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
        "token_cache",
        "val_data_path",
    }
)
"""Fields that say where a run happens or when it stops, not what it computes."""


class TrainConfig(ReadingConfig, MethodOptions):
    """Train one federated mode over all rounds and leave its adapters under `model_dir/exp_name`."""

    exp_name: str = flag("fedavg-1B", "name of the experiment: the folder of the run under model_dir")
    base_model: str = flag("meta-llama/Llama-3.2-1B", "smollm2-135m (embedded), a local folder, or a hub id")
    data_path: Path = flag(Path("./data"), "folder with <num_clients>/local_training_<i>.json, or one file per client")
    model_dir: Path = flag(Path("./models"), "root of all runs")
    federation_mode: str = flag(
        "homo",
        "homo (FedAvg), seq (one after another), none (each alone), pooled, or another method: see docs/methods.md",
    )
    client_selection_strategy: Literal["random", "all", "round_robin"] = flag("random", "who trains in a round")
    client_selection_frac: float = flag(0.1, "share of clients in a round's cohort: max(1, ceil(frac*n))", gt=0, le=1)
    num_communication_rounds: int = flag(20, "rounds of the run", ge=1)
    num_clients: int = flag(8, "clients; a folder of own files sets it by their count", ge=1)
    seq_order: Literal["by_id", "shuffled"] = flag("by_id", "order of the clients inside a round of seq")

    local_batch_size: int = flag(128, "rows of one optimizer step", ge=1)
    local_micro_batch_size: OptionalInt = flag(None, "most rows in one pass; unset, the token budget decides", ge=1)
    tokens_per_pass: OptionalInt = flag(None, "most tokens in one pass; unset: what fits into memory", ge=1)
    gradient_checkpointing: Literal["auto", "on", "off"] = flag("auto", "compute layers twice to save memory")
    local_num_epochs: int = flag(3, "passes of a client over its rows in a round", ge=1)
    local_learning_rate: float = flag(3e-4, "peak learning rate of the clients", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine", "linear_per_round"] = flag(
        "constant", "over the whole run; linear_per_round starts anew each round"
    )
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up", ge=0)
    local_optimizer: Literal["adamw", "sgd"] = flag("adamw", "of the clients; sgd is plain, as theory has it")
    optimizer_state: Literal["reset", "keep"] = flag("reset", "AdamW moments of a client between its rounds")
    adam_beta1: float = flag(0.9, "AdamW beta1", ge=0, lt=1)
    adam_beta2: float = flag(0.999, "AdamW beta2", ge=0, lt=1)
    adam_eps: float = flag(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = flag(1.0, "clip the gradient of a step to this norm; 0 turns clipping off", ge=0)

    lora_r: int = flag(4, "rank of the adapter; with client_ranks, of the global one", ge=1, le=4096)
    lora_alpha: float = flag(16.0, "scaling numerator: the update is alpha / r * B @ A", gt=0, allow_inf_nan=False)
    lora_dropout: float = flag(0.05, "dropout before A while training", ge=0, lt=1)
    lora_target_modules: Names = flag(("q_proj", "v_proj"), "names of the adapted layers, or all-linear")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r) instead of alpha / r")

    prompt_template: Template = flag("alpaca", "alpaca, or the tokenizer's own chat template")
    cutoff_len: int = flag(512, "most tokens of a row", ge=8)
    train_on_inputs: bool = flag(False, "take the loss on prompt tokens as well")
    group_by_length: bool = flag(False, "form optimizer steps from rows of similar length")

    min_clients: int = flag(1, "fewest usable updates of a round; with fewer the run stops, to be resumed", ge=1)
    client_retries: int = flag(2, "how often a client is asked again that was lost or ran out of memory", ge=0)
    max_update_norm: OptionalFloat = flag(None, "longest update (Euclidean norm); unset: no limit", gt=0)
    max_update_norm_ratio: OptionalFloat = flag(None, "the same as a multiple of the cohort's median norm", gt=0)
    norm_action: Literal["clip", "quarantine"] = flag("clip", "what becomes of an update above max_update_norm")
    max_client_weight: float = flag(1.0, "largest share of the weights that one client may have", gt=0, le=1)

    dp_noise_multiplier: OptionalFloat = flag(None, "client-level privacy: noise on the sum, in units of dp_clip", ge=0)
    dp_clip: OptionalFloat = flag(None, "client-level privacy: longest update that is summed (Euclidean norm)", gt=0)
    dp_delta: float = flag(1e-5, "delta of client-level privacy; well below 1 / clients", gt=0, lt=1)
    dp_example_noise_multiplier: OptionalFloat = flag(None, "example-level privacy: noise of each step", ge=0)
    dp_example_clip: OptionalFloat = flag(None, "example-level privacy: longest gradient of one row", gt=0)
    dp_example_delta: float = flag(1e-5, "delta of example-level privacy; well below 1 / rows of a client", gt=0, lt=1)
    dp_accountant: Literal["rdp", "pld"] = flag("rdp", "pld is tighter and needs the extra named dp")
    max_epsilon: OptionalFloat = flag(None, "end the run before the round that would spend more", gt=0)

    client_ranks: OptionalRanks = flag(
        None, "a rank per client, by number, up to lora_r: 8,4,4,2 or 8,4x2,2; for methods that take different ranks"
    )

    local_val_set_size: int = flag(0, "rows of each client held back for validation", ge=0)
    val_data_path: str = flag("", "file of rows on which every round's adapters are validated")
    seed: int = flag(42, "seed of every random draw", ge=0)
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>")
    devices: Names = flag((), "several devices, as 0,1: the clients of a cohort train in parallel, one process each")
    base_dtype: Precision = flag("auto", "type of the frozen base; auto takes bfloat16 where the device is fast at it")
    quantization: Quantization = flag("none", "hold the frozen base in 8 or 4 bits a weight (bitsandbytes)")
    token_cache: bool = flag(True, "keep tokenised rows on disk, readable by the owner only, for the next run")
    trust_remote_code: bool = flag(False, "run code that a model repository ships (only this flag can allow it)")
    overwrite: bool = flag(False, "delete an existing run of this name and start anew")
    allow_drift: bool = flag(False, "resume a run that was started with other versions or on another machine")

    @field_validator(
        *("client_selection_frac", "local_learning_rate", "lora_alpha", "max_update_norm", "max_update_norm_ratio"),
        *("dp_noise_multiplier", "dp_clip", "dp_example_noise_multiplier", "dp_example_clip", "max_epsilon"),
    )
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("devices")
    @classmethod
    def _numbers_are_cuda(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(f"cuda:{name}" if name.isdigit() else name for name in value)
        if len({name for name in named if name != "cpu"}) < sum(name != "cpu" for name in named):
            raise ValueError("a device is named twice")
        return named

    @field_validator("lora_target_modules")
    @classmethod
    def _some_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one layer, or all-linear")
        return tuple(sorted(set(value)))

    @field_validator("federation_mode")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return find_method(value).name

    @model_validator(mode="after")
    def _ranks_fit(self) -> TrainConfig:
        if bad := sorted({rank for rank in self.client_ranks or () if not 1 <= rank <= self.lora_r}):
            raise ValueError(f"client_ranks={bad[0]}: a client's rank is at least 1 and at most lora_r={self.lora_r}")
        return self

    @model_validator(mode="after")
    def _one_way_to_name_devices(self) -> TrainConfig:
        if self.devices and self.chosen("device"):
            raise ValueError("give device or devices, not both")
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
    def method(self) -> Method:
        """The row of the method that is trained."""
        return METHODS[self.federation_mode]

    @property
    def limits_clients(self) -> bool:
        """Whether what one client may contribute is limited."""
        return bool(self.max_update_norm or self.max_update_norm_ratio or self.max_client_weight < 1)

    @property
    def is_private(self) -> bool:
        """Whether the run bounds what it tells of one client, or of one example."""
        return self.dp_noise_multiplier is not None or self.dp_example_noise_multiplier is not None

    @property
    def lora_scaling(self) -> float:
        """`s` in `dW = s * B @ A`."""
        return self.lora_alpha / (math.sqrt(self.lora_r) if self.use_rslora else self.lora_r)

    def record(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values: what run.json keeps."""
        return self.model_dump(mode="json", exclude={*PLACEMENT_FIELDS, "method_options"}) | self.method_options

    def full_record(self) -> dict[str, Any]:
        """`record` with the options that were once fields of every run, as null where they are not given: what is
        hashed, so that runs keep the identity that they had then."""
        return dict.fromkeys(ONCE_FIELDS) | self.record()

    def identity(self) -> dict[str, Any]:
        """What a round computes from: everything but the name, and without the number of rounds where neither a
        client's learning rate nor the method depends on it, for such a run may be prolonged."""
        may_grow = self.lr_schedule in ("constant", "linear_per_round") and self.method.bound_to_length is False
        free = {"exp_name", "num_communication_rounds"} if may_grow else {"exp_name"}
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

ONCE_FIELDS = (
    *("server_learning_rate", "server_momentum", "server_beta1", "server_beta2", "server_tau"),
    *("proximal_mu", "rotation_strength", "ditto_lambda", "personal_weight", "personal_rounds"),
    *("residual_rank", "export_rank", "trimmed_share", "num_hostile", "krum_selected"),
    *("weiszfeld_steps", "weiszfeld_smoothing", "rank_normalisation", "prune_to", "tail_penalty", "svd_split"),
)
"""Options that run.json held as null in every run before options had a field of their own. It does not grow."""

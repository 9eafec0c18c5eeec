"""The fields of the `train` stage, in the groups that help lists them under; `train.py` says what fits together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fedlora.config.method_options import MethodOptions
from fedlora.config.private_metrics import PrivateMetricFields
from fedlora.config.prompting import DATE, TOKEN_RULE, NamesTemplate, TemplateDate, TemplateKwargs
from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Names, OptionalFloat, OptionalInt, OptionalRanks, PathText, flag
from fedlora.config.target_names import Targets
from fedlora.config.track import TrackFields

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]


class TrainFields(ReadingConfig, MethodOptions, NamesTemplate, PrivateMetricFields, TrackFields):
    """What a run is made of: its data, model, method, training, privacy, limits and machine."""

    exp_name: str = flag("fedavg-1B", "name of the run: its folder under model_dir", group="run", everyday=True)
    base_model: str = flag(
        "meta-llama/Llama-3.2-1B",
        "base model: smollm2-135m (embedded), a local folder, or a hub id",
        group="run",
        everyday=True,
    )
    model_dir: Path = flag(Path("./models"), "root folder of all runs", group="run", everyday=True)
    num_communication_rounds: int = flag(20, "communication rounds of the run", group="run", everyday=True, ge=1)
    seed: int = flag(42, "seed of every random draw", group="run", everyday=True, ge=0)
    overwrite: bool = flag(False, "delete the run of this name and start again", group="run", everyday=True)
    allow_drift: bool = flag(
        False, "resume although library versions or the machine have changed since the run started", group="run"
    )
    step_log: Literal["auto", "on", "off"] = flag(
        "auto", "write the loss of every optimizer step to steps.jsonl; auto: in runs without privacy", group="run"
    )

    data_path: Path = flag(
        Path("./data"),
        "folder of the clients' files: one file per client, or what `allocate` wrote",
        group="data",
        everyday=True,
    )
    num_clients: int = flag(
        8, "clients of allocated data; a folder of own files sets it by their number", group="data", ge=1
    )
    val_data_path: PathText = flag(
        "",
        "file of rows on which every round's adapters are evaluated",
        group="data",
        everyday=True,
        if_none="no evaluation",
    )
    local_val_set_size: int = flag(0, "examples that each client holds back for validation", group="data", ge=0)
    test_share: float = flag(
        0.0,
        "share of each client's rows that is held out as its test rows and never trained on, in [0, 1)",
        group="data",
        everyday=True,
        ge=0,
        lt=1,
    )
    prompt_template: str = flag(
        "alpaca",
        "prompt format: alpaca, chat for the tokenizer's chat template, or a Jinja file such as my.jinja",
        group="data",
        everyday=True,
    )
    template_kwargs: TemplateKwargs = flag(
        {}, "what the chat template is given, such as enable_thinking=false", group="data", if_none="nothing"
    )
    template_date: TemplateDate = flag(
        DATE, "date that a chat template inserts where it asks for today's", group="data", min_length=1
    )
    token_rule: int = flag(TOKEN_RULE, "how text becomes token ids", ge=1, le=TOKEN_RULE)
    cutoff_len: int = flag(512, "longest example, in tokens; longer prompts are cut", group="data", everyday=True, ge=8)
    train_on: Literal["assistant", "last", "all"] = flag(
        "assistant", "tokens with a loss: of every reply of a conversation, of the last one, or all", group="data"
    )
    train_on_inputs: bool = flag(False, "compute the loss on prompt tokens too: the same as train_on all", group="data")
    token_cache: bool = flag(
        True, "keep tokenised rows on disk for the next run, readable by the owner only", group="data"
    )

    federation_mode: str = flag(
        "homo",
        "federated method: homo (FedAvg), seq, none, pooled, fedprox ...; `fedlora methods` lists them",
        group="method",
        everyday=True,
    )
    client_selection_strategy: Literal["random", "all", "round_robin"] = flag(
        "random", "how the cohort of a round is chosen", group="method"
    )
    client_selection_frac: float = flag(
        0.1,
        "fraction of clients in a round's cohort, in (0, 1], at least one client",
        group="method",
        everyday=True,
        gt=0,
        le=1,
    )
    seq_order: Literal["by_id", "shuffled"] = flag("by_id", "order of the clients in a round of seq", group="method")
    client_ranks: OptionalRanks = flag(
        None,
        "LoRA rank of each client by number, at most lora_r, such as 8,4,4,2 or 8,4x2,2; for methods that take "
        "different ranks",
        group="method",
        if_none="lora_r for every client",
    )

    local_batch_size: int = flag(
        128, "examples per optimizer step of a client", group="local training", everyday=True, ge=1
    )
    local_num_epochs: int = flag(
        3, "epochs of a client over its examples in a round", group="local training", everyday=True, ge=1
    )
    local_learning_rate: float = flag(
        3e-4, "peak learning rate of the clients", group="local training", everyday=True, gt=0
    )
    lr_schedule: Literal["constant", "linear", "cosine", "linear_per_round"] = flag(
        "constant",
        "learning rate over the run; linear_per_round decays in each round again",
        group="local training",
        everyday=True,
    )
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up", group="local training", ge=0)
    local_optimizer: Literal["adamw", "sgd"] = flag(
        "adamw", "optimizer of the clients; sgd has no momentum", group="local training"
    )
    optimizer_state: Literal["reset", "keep"] = flag(
        "reset", "reset or keep a client's AdamW moments between its rounds", group="local training"
    )
    adam_beta1: float = flag(0.9, "AdamW beta1, in [0, 1)", group="local training", ge=0, lt=1)
    adam_beta2: float = flag(0.999, "AdamW beta2, in [0, 1)", group="local training", ge=0, lt=1)
    adam_eps: float = flag(1e-8, "AdamW epsilon", group="local training", gt=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", group="local training", ge=0)
    max_grad_norm: float = flag(
        1.0, "clip the gradient of a step to this norm; 0: no clipping", group="local training", ge=0
    )
    group_by_length: bool = flag(False, "form optimizer steps from examples of similar length", group="local training")

    lora_r: int = flag(4, "rank of the adapters", group="LoRA", everyday=True, ge=1, le=4096)
    lora_alpha: float = flag(
        16.0, "scaling: the update is alpha / r * B @ A", group="LoRA", everyday=True, gt=0, allow_inf_nan=False
    )
    lora_dropout: float = flag(
        0.05, "dropout before A during training, in [0, 1)", group="LoRA", everyday=True, ge=0, lt=1
    )
    lora_target_modules: Targets = flag(
        ("q_proj", "v_proj"),
        "adapted layers: names (q_proj), paths (*.mlp.*), re: with a regular expression for the whole path, or "
        "all-linear",
        group="LoRA",
        everyday=True,
    )
    init_from: str = flag(
        "",
        "adapter of another run under model_dir to train on from: NAME/ROUND, or NAME/ROUND/who for a client's",
        group="LoRA",
        if_none="a new adapter, drawn from the seed",
    )
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r) instead of alpha / r", group="LoRA")

    dp_noise_multiplier: OptionalFloat = flag(
        None,
        "client-level privacy: noise on the sum of updates, in units of dp_clip",
        group="privacy",
        everyday=True,
        ge=0,
        if_none="no client-level privacy",
    )
    dp_clip: OptionalFloat = flag(
        None,
        "client-level privacy: clip each update to this Euclidean norm",
        group="privacy",
        everyday=True,
        gt=0,
        if_none="no client-level privacy",
    )
    dp_delta: float = flag(
        1e-5, "delta of client-level privacy; choose it well below 1 / clients", group="privacy", gt=0, lt=1
    )
    dp_example_noise_multiplier: OptionalFloat = flag(
        None,
        "example-level privacy (DP-SGD): noise of each step, in units of dp_example_clip",
        group="privacy",
        ge=0,
        if_none="no example-level privacy",
    )
    dp_example_clip: OptionalFloat = flag(
        None,
        "example-level privacy: clip each example's gradient to this norm",
        group="privacy",
        gt=0,
        if_none="no example-level privacy",
    )
    dp_example_delta: float = flag(
        1e-5,
        "delta of example-level privacy; choose it well below 1 / examples of a client",
        group="privacy",
        gt=0,
        lt=1,
    )
    dp_accountant: Literal["rdp", "pld"] = flag(
        "rdp", "privacy accountant; pld is tighter and needs the extra dp", group="privacy"
    )
    max_epsilon: OptionalFloat = flag(
        None,
        "stop before the round that would spend more than this epsilon",
        group="privacy",
        gt=0,
        if_none="no limit",
    )

    min_clients: int = flag(
        1, "fewest usable updates per round; with fewer the run stops and can be resumed", group="robustness", ge=1
    )
    client_retries: int = flag(
        2, "further attempts for a client that was lost or ran out of memory", group="robustness", ge=0
    )
    max_update_norm: OptionalFloat = flag(
        None,
        "longest update of a client, as a Euclidean norm",
        group="robustness",
        everyday=True,
        gt=0,
        if_none="no limit",
    )
    max_update_norm_ratio: OptionalFloat = flag(
        None,
        "longest update of a client, as a multiple of the cohort's median norm",
        group="robustness",
        gt=0,
        if_none="no limit",
    )
    norm_action: Literal["clip", "quarantine"] = flag(
        "clip", "clip an update above max_update_norm, or exclude it (quarantine)", group="robustness"
    )
    max_client_weight: float = flag(
        1.0, "largest share of the weights that one client may have, in (0, 1]", group="robustness", gt=0, le=1
    )

    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", group="machine", everyday=True)
    devices: Names = flag(
        (),
        "train the clients of a cohort on several devices in parallel, such as 0,1",
        group="machine",
        if_none="the one of --device",
    )
    base_dtype: Precision = flag(
        "auto",
        "number type of the frozen base model; auto: bfloat16 where the device multiplies it fast",
        group="machine",
    )
    quantization: Quantization = flag(
        "none", "hold the frozen base in 8 bits (int8) or 4 bits (nf4) per weight", group="machine"
    )
    local_micro_batch_size: OptionalInt = flag(
        None,
        "most examples in one forward pass; the gradient does not depend on it",
        group="machine",
        ge=1,
        if_none="as many as tokens_per_pass allows",
    )
    tokens_per_pass: OptionalInt = flag(
        None, "most tokens in one forward pass", group="machine", ge=1, if_none="what fits into memory"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = flag(
        "auto", "recompute activations to save memory", group="machine"
    )
    verify_base: bool = flag(
        False,
        "record a hash of every byte of the base model's weights, for verify; without it, of samples",
        group="machine",
    )
    trust_remote_code: bool = flag(
        False, "run code from the model's repository; only this flag can allow it", group="machine"
    )

"""`adapter_config.json`, written with sorted keys and read by a model of our own.

PEFT's configuration can name modules to import, files to load, patterns to match and another base model; PEFT's own
text differs from process to process. Here ten fields mean something. The other fields of PEFT are accepted at
their neutral value, and any other field is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedlora.config.target_names import ALL_LINEAR, MOST_TARGETS
from fedlora.console import say
from fedlora.errors import StorageError, UsageError
from fedlora.files import json_text
from fedlora.llm.lora import LoraSpec

MOST_BYTES = 1 << 20

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "eva_config": (None,),
    "exclude_modules": (None, []),
    # how the factors began says nothing once they are trained, except where the base itself was changed
    "init_lora_weights": (True, False, "gaussian"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_pattern": (None, []),
    "layers_to_transform": (None,),
    "loftq_config": ({}, None),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "qalora_group_size": (16,),
    "rank_pattern": ({}, None),
    "revision": (None,),
    "runtime_config": ({"ephemeral_gpu_offload": False}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
"""Fields of PEFT up to 0.21 that must not ask for anything, and the values with which they do not."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def _is_plain(name: str) -> str:
    if _PLAIN_NAME.fullmatch(name) is None:
        raise ValueError("not the plain name of a layer; patterns are not read")
    return name


PlainName = Annotated[str, AfterValidator(_is_plain)]


class AdapterConfig(BaseModel):
    """The fields of `adapter_config.json` that mean something here; strict, so that no text passes as a number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: Annotated[list[PlainName], Field(min_length=1, max_length=MOST_TARGETS)] | Literal["all-linear"]
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    base_model_name_or_path: str | None = Field(default=None, max_length=4096)
    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    inference_mode: bool = False
    peft_version: str | None = Field(default=None, max_length=100)

    def spec(self) -> LoraSpec:
        """The shape of the adaptation."""
        scaling = self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
        targets = (ALL_LINEAR,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        return LoraSpec(self.r, self.lora_alpha, scaling, self.lora_dropout, targets, self.use_rslora)


def make_peft_config(spec: LoraSpec, base_model: str, *, fan_in_fan_out: bool, targets: Sequence[str]) -> str:
    """`adapter_config.json`: what PEFT needs to load the adapter onto the base. `targets` are the names by which PEFT
    finds the adapted layers (`LoraModel.peft_names`)."""
    value: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "peft_type": "LORA",
        "r": spec.r,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": spec.use_rslora,
    }
    return json_text(value)


def config_at_rank(config: str, rank: int) -> str:
    """The text of an adapter_config.json for the same layers and scaling with another rank."""
    value = json.loads(config)
    if value["r"] == rank:
        return config
    # s = alpha / r, or alpha / sqrt(r), is the same for all
    share = rank / value["r"]
    alpha = value["lora_alpha"] * (share**0.5 if value["use_rslora"] else share)
    return json_text({**value, "r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha})


def load_spec(path: Path, *, base_model: str | None = None) -> LoraSpec:
    """The shape of an adapter from its `adapter_config.json`; UsageError names the file and the field that is wrong.

    The base model that the file names is never loaded: when it is not `base_model`, that is said, and no more.
    """
    value = _read_object(path)
    for name in sorted(value.keys() & NEUTRAL.keys()):
        found = value.pop(name)
        if not any(type(found) is type(neutral) and found == neutral for neutral in NEUTRAL[name]):
            accepted = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name])
            raise _refusal(path, f"{name}={_shown(found)} is not supported, only {accepted}")
    try:
        config = AdapterConfig.model_validate(value)
    except ValidationError as error:
        raise _refusal(path, _explain(error)) from None
    named = config.base_model_name_or_path
    if base_model is not None and named is not None and named != base_model:
        say(f"{path}: made for the base model {_shown(named)}; {base_model} is used")
    return config.spec()


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="an adapter needs its adapter_config.json beside it")
    try:
        with path.open("rb") as handle:
            content = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="check the file and its permissions") from error
    if len(content) > MOST_BYTES:
        raise _refusal(path, f"larger than {MOST_BYTES} bytes")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, str(error)[:120]) from None
    if not isinstance(value, dict):
        raise _refusal(path, "not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden":
        return f"unknown field {name!r}"
    if first["type"] == "missing":
        return f"no field {name!r}"
    return f"{name}={_shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}"


def _refusal(path: Path, what: str) -> UsageError:
    hint = "restore the file, or write the plain LoRA settings: r, lora_alpha, target_modules, lora_dropout, use_rslora"
    return UsageError(f"{path}: not a LoRA configuration ({what})", hint=hint)


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Which layers of a model are adapted: by name, path with wildcards, regular expression, or all that text trains."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fedlora.config.target_names import ALL_LINEAR, REGULAR, is_pattern
from fedlora.errors import UsageError
from fedlora.llm.trainable_layers import (
    Linear,
    find_bypassed,
    find_linear,
    find_reached,
    linear_size,
    starred,
    text_part,
)
from fedlora.nearest import nearest
from fedlora.plain_text import counted

_SHOWN = 4


@dataclass(frozen=True)
class Targets:
    """The layers to adapt, the names by which PEFT finds exactly these, and what the user should know of them."""

    layers: list[Linear]
    peft_names: list[str]
    notes: list[str]


def find_targets(model: Any, targets: Sequence[str]) -> Targets:
    """The layers that `targets` mean in a model without LoRA layers.

    Raises UsageError for a target that fits no linear layer, or none that text can train.
    """
    linear = find_linear(model)
    chosen = _match(targets, linear) | ({ALL_LINEAR: set(linear)} if ALL_LINEAR in targets else {})
    if unmatched := [target for target, names in chosen.items() if not names]:
        raise _unmatched(model, linear, unmatched)
    names = set().union(*chosen.values())
    bypassed = find_bypassed(model, names)
    trained = find_reached(model, {name: linear[name] for name in linear if name in names - bypassed})
    reasons = (
        (bypassed, "whose weight the model's code multiplies by itself"),
        (names - bypassed - trained, "that text does not pass through"),
    )
    left_out = [
        f"{_some(places_of(idle, trained))} ({counted(len(idle), 'layer')} {why})" for idle, why in reasons if idle
    ]
    if idle := [target for target, found in chosen.items() if not found & trained]:
        raise UsageError(
            f"lora_target_modules: {', '.join(idle)} can get no gradient: {'; '.join(left_out)}",
            hint="choose other layers of the language model, or all-linear",
        )
    layers = [layer for name, layer in linear.items() if name in trained]
    if ALL_LINEAR in targets:
        left_out += _other_kinds(model, layers)
    notes = [f"not adapted: {part}" for part in left_out]
    if shared := _names_of_experts(model) & {layer.name.rpartition(".")[2] for layer in layers}:
        taken = ", ".join(sorted(shared))
        notes.append(
            f"warning: PEFT may take {taken} for experts of this model, and then cannot load this run's adapters"
        )
    return Targets(layers, _peft_names(model, targets, trained), notes)


def places_of(names: Collection[str], trained: Collection[str]) -> list[str]:
    """Where layers are, without the numbers of blocks; several below one module that holds no trained one are one
    place."""
    above: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        modules = [".".join(parts[:size]) for size in range(1, len(parts) + 1)]
        empty = (each for each in modules if not any(other.startswith(each + ".") for other in trained))
        above.setdefault(starred(next(empty, name)), set()).add(starred(name))
    return sorted(module if len(below) > 1 else next(iter(below)) for module, below in above.items())


def _match(targets: Sequence[str], names: Collection[str]) -> dict[str, set[str]]:
    """Target -> the names it means: PEFT's rule for a plain one (the path or its end), else all of a pattern."""
    ends: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for place in range(len(parts)):
            ends[".".join(parts[place:])].add(name)
    return {target: _match_pattern(target, names) if is_pattern(target) else ends[target] for target in targets}


def _match_pattern(target: str, names: Collection[str]) -> set[str]:
    if target.startswith(REGULAR):
        pattern = re.compile(target.removeprefix(REGULAR))
        return {name for name in names if pattern.fullmatch(name)}
    return {name for name in names if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")}


def _peft_names(model: Any, targets: Sequence[str], trained: Collection[str]) -> list[str]:
    """What `target_modules` of an adapter_config.json must hold: PEFT matches the ends of the paths of all modules."""
    plain = [target for target in targets if target != ALL_LINEAR and not is_pattern(target)]
    everything = [name for name, _ in model.named_modules()]
    if len(plain) == len(targets) and set().union(*_match(plain, everything).values()) == set(trained):
        return sorted(plain)
    return sorted(trained)


def _names_of_experts(model: Any) -> set[str]:
    """What the weights of experts are called in the files of a model that holds them in one tensor.

    PEFT 0.21 goes by these names in some models: a layer outside the experts that has one of them is not found there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist

    merged = [
        rule
        for rule in get_model_conversion_mapping(model)
        if any(isinstance(step, MergeModulelist) for step in getattr(rule, "operations", ()))
    ]
    return {part.removesuffix(".weight").rpartition(".")[2] for rule in merged for part in rule.source_patterns}


def _unmatched(model: Any, linear: Mapping[str, Linear], targets: Sequence[str]) -> UsageError:
    ends = sorted({name.rpartition(".")[2] for name in linear})
    target = targets[0]
    close = "" if is_pattern(target) else nearest(target.rpartition(".")[2], ends)
    others = {name: f"a {type(module).__name__}" for name, module in model.named_modules() if name not in linear}
    others |= {name: "a weight outside linear layers" for name, _ in model.named_parameters() if name not in others}
    kinds = sorted({others[name] for name in _match([target], others)[target]})
    what = f" ({target} is {' or '.join(kinds)})" if kinds and not is_pattern(target) else ""
    return UsageError(
        f"lora_target_modules: no linear layer is named {', '.join(targets)}{what}",
        hint=(f"did you mean {close}? " if close else "") + f"this model has {', '.join(ends)}; or use all-linear",
    )


def _other_kinds(model: Any, layers: Sequence[Linear]) -> list[str]:
    """What all-linear does not adapt though it holds matrices: experts in one tensor, convolutions, routers."""
    known = {layer.layer for layer in layers} | {model.get_output_embeddings()}
    kinds: dict[str, list[str]] = {}
    count = 0
    for name, module in text_part(model).named_modules():
        if module in known or isinstance(module, nn.Embedding) or linear_size(module) is not None:
            continue
        matrices = [weight.numel() for weight in module.parameters(recurse=False) if weight.ndim > 1]
        if matrices:
            count += sum(matrices)
            kinds.setdefault(type(module).__name__, []).append(name)
    places = [f"{_some(places_of(names, [layer.name for layer in layers]))} ({kind})" for kind, names in kinds.items()]
    total = sum(weight.numel() for weight in model.parameters())
    return [f"{', '.join(places)}: {count / total:.0%} of the weights are in no linear layer"] if places else []


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

"""One device that trains clients: the resident base with its LoRA layers, the trainer, the examples.

The process of a run builds one, and so does every worker process of a further device, from the same
configuration: where a client trains cannot change what comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import ClientFile
from fedlora.engines.client_data import ClientExamples
from fedlora.errors import UsageError
from fedlora.federated.privacy.randomness import Secret
from fedlora.home import tokens_folder
from fedlora.llm.base_model import BaseModel, load_base_model, load_outline
from fedlora.llm.examples import Encoder, make_encoder
from fedlora.llm.fast.proof import with_fast_layers
from fedlora.llm.gradient_check import with_right_gradients
from fedlora.llm.layout import Layout, LayoutBook
from fedlora.llm.limits import check_training
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec
from fedlora.llm.memory import plan_layout
from fedlora.llm.token_files import TokenFiles
from fedlora.llm.trainable_layers import find_without_rows, starred
from fedlora.types import ClientId


@dataclass(frozen=True)
class Workbench:
    """One device, ready to train."""

    base: BaseModel
    encoder: Encoder
    lora: LoraModel
    trainer: Trainer
    examples: ClientExamples

    @property
    def book(self) -> LayoutBook:
        return self.trainer.book


def spec_of(config: TrainConfig) -> LoraSpec:
    """The shape of the adaptation that a configuration asks for."""
    return LoraSpec(
        config.lora_r,
        config.lora_alpha,
        config.lora_scaling,
        config.lora_dropout,
        config.lora_target_modules,
        config.use_rslora,
    )


def make_workbench(
    config: TrainConfig,
    clients: Mapping[ClientId, ClientFile],
    *,
    device: str,
    place: str = "",
    layout: Layout | None = None,
    outline: bool = False,
    weights_here: bool = True,
    secret: Secret | None = None,
    on_layout: Callable[[Layout], None] = lambda layout: None,
    load: Callable[..., BaseModel] = load_base_model,
) -> Workbench:
    """Load the base onto `device`, for `clients`; without a layout one is planned.

    `place` is where the base lies, when that is not its name in the configuration.

    A private configuration trains with a `secret`; `on_layout` is called with every reduction of the layout before the
    reduced step is done. `load` may hand out a base that is loaded already (`ResidentBase`).

    With `outline` the base has no weights: everything can be counted, nothing computed. A machine that computes nothing
    at all need not have them: `weights_here` false does not ask for them.
    """
    source = {"device": device, "dtype": config.base_dtype, "trust_remote_code": config.trust_remote_code}
    open_base = functools.partial(load_outline, weights_here=weights_here) if outline else load
    base = open_base(place or config.base_model, quantization=config.quantization, **source)
    encoder = make_encoder(base.tokenizer, config.prompting)
    check_training(base, encoder, config.cutoff_len)
    lora = LoraModel(base.model, spec_of(config))
    for note in lora.notes:
        say(note)
    if config.dp_example_noise_multiplier is not None:
        _require_rows(base, lora)
    if not outline:
        base = with_fast_layers(with_right_gradients(base, lora, config.quantization), lora)
    tokens = TokenFiles(tokens_folder()) if config.token_cache else None
    examples = ClientExamples(clients, encoder, config, tokens)
    book = LayoutBook(layout or plan_layout(base, lora, config), on_layout, examples.names)
    return Workbench(base, encoder, lora, Trainer(base, lora, config, book, secret), examples)


def _require_rows(base: BaseModel, lora: LoraModel) -> None:
    """UsageError for adapted layers whose gradient cannot be clipped row by row."""
    if found := find_without_rows(base.model, lora.layers, base.can.decoder):
        places = sorted({starred(name) for name in found})
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        raise UsageError(
            f"base_model={base.name!r}: privacy of examples needs adapted layers that see whole rows, and "
            f"{', '.join(places[:2])}{more} get a list of tokens, as in a mixture of experts or after the last block",
            hint="adapt other layers, such as --target_modules q_proj,v_proj",
        )

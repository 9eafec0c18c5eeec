"""The loss of adapters on rows: means per response token. Nothing here trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.config.train import TrainConfig
from fedlora.engines.workbench import spec_of
from fedlora.federated.ranks import shapes_at
from fedlora.llm.adapter_config import load_spec
from fedlora.llm.adapter_files import CONFIG_NAME, load_adapter
from fedlora.llm.background import as_background
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Example, encode_rows, make_encoder
from fedlora.llm.layout import LayoutBook
from fedlora.llm.limits import check_training
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel
from fedlora.llm.memory import plan_layout
from fedlora.llm.row_losses import measure_rows
from fedlora.rows import Row
from fedlora.types import AdapterState

Losses = dict[str, float]
"""Group of rows -> mean loss per response token."""
Groups = Mapping[str, Sequence[Example]]


class LossMeter:
    """One base with the LoRA layers of a configuration, measuring adapters of their shape."""

    def __init__(self, base: BaseModel, config: TrainConfig) -> None:
        self.config = config
        self.encoder = make_encoder(base.tokenizer, config.prompting)
        check_training(base, self.encoder, config.cutoff_len)
        self.lora = LoraModel(base.model, spec_of(config))
        self.trainer = Trainer(base, self.lora, config, LayoutBook(plan_layout(base, self.lora, config)))

    def encode(self, rows: Sequence[Row], groups: Sequence[str]) -> Groups:
        """The examples of each group by name, without rows whose response is empty; no group is empty."""
        found: defaultdict[str, list[Row]] = defaultdict(list)
        for row, group in zip(rows, groups, strict=True):
            found[group].append(row)
        options = {"cutoff": self.config.cutoff_len, "train_on": self.config.measured_tokens}
        encoded = {name: encode_rows(found[name], self.encoder, **options).examples for name in sorted(found)}
        return {name: examples for name, examples in encoded.items() if examples}

    def measure(
        self, adapter: AdapterState | None, groups: Groups, *, background: AdapterState | None = None
    ) -> Losses:
        """The loss on every group; None is the base model, and a background is added to either."""
        return {
            name: self.trainer.validate(adapter, [examples], background=background) for name, examples in groups.items()
        }

    def measure_file(self, file: Path, groups: Groups, *, background: AdapterState | None = None) -> Losses:
        """`measure` of a stored adapter."""
        adapter, background = self._load(file, background)
        return self.measure(adapter, groups, background=background)

    def encode_each(self, rows: Sequence[Row], *, last_reply: bool = False) -> list[Example]:
        """One example for each row, of whose responses none is empty; with `last_reply` the last one alone counts."""
        train_on = "last" if last_reply else self.config.measured_tokens
        return encode_rows(rows, self.encoder, cutoff=self.config.cutoff_len, train_on=train_on).examples

    def measure_rows(
        self, file: Path | None, examples: Sequence[Example], *, background: AdapterState | None = None
    ) -> list[float]:
        """The loss of every example under a stored adapter, summed over its response tokens; None is the base model."""
        adapter, background = self._load(file, background) if file else (None, background)
        return measure_rows(self.trainer, adapter, examples, background=background)

    def _load(self, file: Path, background: AdapterState | None) -> tuple[AdapterState | None, AdapterState | None]:
        """A stored adapter and its background, as the layers take them."""
        spec = load_spec(file.with_name(CONFIG_NAME))
        adapter = load_adapter(file, shapes_at(self.lora.shapes(), spec.r))
        if spec.r <= self.lora.spec.r:
            return adapter, background
        if background is not None:
            raise ValueError(f"{file}: an adapter larger than its layers has no background")
        # a stack of two does not fit into the layers, and is the same beside them
        return None, as_background(adapter, spec.scaling)

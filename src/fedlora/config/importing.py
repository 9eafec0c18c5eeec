"""Configuration of the `import` stage."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from fedlora.config.prompting import ALPACA, DATE, NamesTemplate, PromptSettings, TemplateDate, TemplateKwargs
from fedlora.config.schema import flag
from fedlora.config.train_fields import Quantization
from fedlora.paths import check_name


class ImportConfig(NamesTemplate):
    """Take over adapters that another program trained, as a run that answers, is scored, exported and trained on from.

    The folder holds a PEFT adapter, or rounds of adapters as the reference project or Shepherd write them. Files are
    read without unpickling, and compared with the base model before a byte is written.
    """

    folder: Path = flag(Path(), "folder of the adapters: a PEFT folder, or one with a folder for each round")
    exp_name: str = flag("imported", "name of the run to make: its folder under model_dir", everyday=True)
    base_model: str = flag(
        "", "base model of the adapters", everyday=True, if_none="an error that quotes what the files name"
    )
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    prompt_template: str = flag(
        ALPACA, "prompt format that the adapters were trained with: alpaca, chat or a Jinja file", everyday=True
    )
    template_kwargs: TemplateKwargs = flag({}, "what the chat template is given", if_none="nothing")
    template_date: TemplateDate = flag(
        DATE, "date that a chat template inserts where it asks for today's", min_length=1
    )
    cutoff_len: int = flag(512, "longest prompt, in tokens", everyday=True, ge=8)
    quantization: Quantization = flag("none", "how the base was held in training")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")
    overwrite: bool = flag(False, "replace an earlier import of this name")

    @field_validator("exp_name")
    @classmethod
    def _can_be_a_folder(cls, value: str) -> str:
        return check_name(value, "exp_name")

    @property
    def prompting(self) -> PromptSettings:
        """What prompts are made with besides the tokenizer."""
        return PromptSettings(self.prompt_template, self.template_text, self.template_kwargs, self.template_date)

"""Where a base model lies, read with transformers; whatever goes wrong there is one message with a remedy."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.train_fields import Quantization
from fedlora.errors import FedloraError, UsageError
from fedlora.home import expand_home, path_at_home
from fedlora.llm import embedded_model
from fedlora.llm.base_files import (
    FETCH_AGAIN,
    check_files,
    check_whole,
    find_others,
    find_tokenizer_fault,
    find_weights,
    read_names,
)
from fedlora.llm.base_identity import find_folder, is_hub_id
from fedlora.llm.hub import is_offline
from fedlora.llm.library_log import held_warnings, quiet_transformers
from fedlora.llm.quantization import check_checkpoint, check_quantizer

_INSTALL = re.compile(r"pip install (?:-\S+ )*[\"'`]?([\w.-]+(?:\[[\w,-]+\])?(?:[<>=!~]=?[\w.]+)?)")
_LONGEST_REASON = 240
_NOT_CONVERTED = re.compile(r"^(\S+) *\| CONVERSION", re.MULTILINE)
"""A weight that transformers could not put together, in its report of a load."""
_LIBRARY = re.compile(r"requires the (\w+) library")


@dataclass(frozen=True)
class Source:
    """The folder or hub id of a base, whose parts load whole or raise UsageError."""

    name: str
    place: str
    is_local: bool
    options: dict[str, Any]
    """How transformers may look for the files."""

    def load_config(self, quantization: Quantization) -> Any:
        """The configuration: transformers has a model for it that writes text, and can read its weights."""
        from transformers import AutoConfig, PreTrainedConfig

        with self._reading("configuration"):
            facts, _ = PreTrainedConfig.get_config_dict(self.place, **self.options)
            self._check_kind(facts)
            config = AutoConfig.from_pretrained(self.place, **self.options)
        if self.find_loader(config) is None:
            raise UsageError(
                f"base_model={self.name!r} is no causal language model for transformers: its model_type is "
                f"{config.model_type!r}",
                hint="choose a base that generates text from left to right, such as Llama, Qwen, Gemma or Mistral",
            )
        if getattr(config, "is_encoder_decoder", False):
            raise UsageError(
                f"base_model={self.name!r} is no causal language model: its encoder reads a text before it writes",
                hint="choose a base that generates text from left to right, such as Llama, Qwen, Gemma or Mistral",
            )
        check_checkpoint(self.name, config, quantization)
        with self._reading("quantization"):
            check_quantizer(self.name, config)
        return config

    def load_tokenizer(self) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        with self._reading("tokenizer"):
            return AutoTokenizer.from_pretrained(self.place, **self.options)

    def load_model(self, config: Any, **how: Any) -> Any:
        """The model of a configuration with all of its weights; `how` are arguments of from_pretrained."""
        # a shape that differs is reported with the others, not raised
        how = {**how, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with self._reading("weights"):
            loaded: Any = self.find_loader(config).from_pretrained(self.place, **how, **self.options)
            model, found = loaded
            check_whole(self.name, model, found, others=self._others(config, model, found))
        return model

    def make_outline(self, config: Any, dtype: Any, *, weights_here: bool = True) -> Any:
        """The model on the meta device; the weights of a local folder are compared with it by their headers."""
        import torch

        with self._reading("weights"):
            with torch.device("meta"):
                model = self.find_loader(config).from_config(
                    config, dtype=dtype, trust_remote_code=self.options["trust_remote_code"]
                )
            names = self._read_headers(config) if weights_here else {}
            if names:
                how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
                _, found = type(model).from_pretrained(None, config=model.config, state_dict=names, **how)
                check_whole(self.name, model, found, others=self._others(config, model, found))
        return model

    def find_loader(self, config: Any) -> Any:
        """What loads a model that writes text: alone, or else within a wrapper that reads images too; None for others.

        Whether a wrapper writes as its language model does without images, the self-check finds.
        """
        import transformers as library

        code = getattr(config, "auto_map", None) or {} if self.options["trust_remote_code"] else {}
        if type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code:
            return library.AutoModelForCausalLM
        wrapped = type(config) in library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return library.AutoModelForImageTextToText if wrapped else None

    def _others(self, config: Any, model: Any, found: Mapping[str, Any]) -> list[str]:
        """The towers of a multimodal checkpoint of which transformers takes the text model alone."""
        folder = find_folder(self.place)
        is_text_alone = type(model.config) is not type(config) and type(model.config) is type(config.get_text_config())
        return find_others(folder, found["unexpected_keys"]) if folder and is_text_alone else []

    def _read_headers(self, config: Any) -> dict[str, Any]:
        """Name and shape of every stored weight; empty where they are not known before the weights are read."""
        if not self.is_local or getattr(config, "quantization_config", None) is not None:
            return {}
        files = find_weights(Path(self.place))
        if any(file.suffix != ".safetensors" for file in files):
            return {}
        return {name: tensor for file in files for name, tensor in read_names(file).items()}

    def _check_kind(self, facts: dict[str, Any]) -> None:
        """UsageError where transformers does not know the model, or knows it only by code of the repository."""
        from transformers import CONFIG_MAPPING, __version__

        kind = facts.get("model_type")
        if kind in CONFIG_MAPPING:
            return
        if "AutoConfig" in facts.get("auto_map", {}):
            if self.options["trust_remote_code"]:
                return
            raise UsageError(
                f"base_model={self.name!r} needs code of its own repository, which is not run unless you allow it",
                hint="read the code; if you trust it, give --trust_remote_code",
            )
        if not kind:
            raise UsageError(
                f"base_model={self.name!r}: config.json names no model_type, so the kind of model is unknown",
                hint=FETCH_AGAIN,
            )
        raise UsageError(
            f"base_model={self.name!r}: transformers {__version__} does not know the model_type {kind!r}",
            hint="a newer release may: run `pip install --upgrade transformers`, or choose another base model",
        )

    @contextlib.contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Inside, the library is quiet, and what it raises becomes a UsageError about this part of the base."""
        held: list[logging.LogRecord] = []
        try:
            with quiet_transformers(), held_warnings(held):
                yield
        except (FedloraError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise self._explain(part, error, held) from error

    def _explain(self, part: str, error: Exception, held: Sequence[logging.LogRecord]) -> UsageError:
        if (fault := self._find_fault(part)) is not None:
            return fault
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        if apart := [name for record in held for name in _NOT_CONVERTED.findall(record.getMessage())]:
            reason = f"parts of {', '.join(apart[:3])} are missing or do not fit together"
        package = _find_package(error)
        if package or isinstance(error, ImportError):
            return UsageError(
                f"base_model={self.name!r}: a package is missing that its {part} is read with: {reason}",
                hint=f"run `pip install '{package}'`" if package else "install what the message names",
            )
        where = (
            "the folder" if self.is_local else "the model hub, which may be out of reach, and there is no such folder"
        )
        first = FETCH_AGAIN if self.is_local else "give a local folder"
        return UsageError(
            f"base_model={self.name!r} cannot be loaded from {where}: {reason} ({part})",
            hint=f"{first}, or use --base_model {embedded_model.NAME}; {embedded_model.INSTALL_HINT}",
        )

    def _find_fault(self, part: str) -> UsageError | None:
        """What is wrong with the files themselves: those of a hub are looked at once they could not be read."""
        folder = find_folder(self.place)
        if folder is None or part not in ("tokenizer", "weights"):
            return None
        try:
            if not self.is_local:
                check_files(folder)
        except UsageError as error:
            return UsageError(str(error), hint=f"run `hf cache rm model/{self.place}`, then this command again")
        return find_tokenizer_fault(folder) if part == "tokenizer" else None


def open_source(name: str, trust_remote_code: bool, *, weights: bool = True) -> Source:
    """The place of a base by its name; UsageError when there is no such base, or a file of it is missing or damaged.

    Without `weights` a local folder may lack them.
    """
    place = str(embedded_model.folder()) if name == embedded_model.NAME else expand_home(name)
    is_local = Path(place).is_dir()
    if not is_local and (not is_hub_id(place) or Path(place).is_file()):
        raise _no_folder(name)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": is_local or is_offline()}
    source = Source(name, place, is_local, options)
    with source._reading("files"):
        _refuse_adapter(name, place, options["local_files_only"])
    if is_local:
        check_files(Path(place), weights=weights)
    return source


def _no_folder(name: str) -> UsageError:
    written_out, hint = path_at_home(name), f"give a local folder, or {embedded_model.NAME}"
    if not written_out.is_file():
        return UsageError(f"base_model={name!r}: no such folder", hint=hint)
    if written_out.suffix == ".gguf":
        hint = "name the folder or hub id of the model that this GGUF file was made from"
    elif (written_out.parent / "config.json").is_file():
        hint = f"write {written_out.parent}"
    return UsageError(f"base_model={name!r}: is a file, not a folder", hint=hint)


def _refuse_adapter(name: str, place: str, local: bool) -> None:
    """UsageError where an adapter lies beside the model, or instead of it: transformers would load it unasked, and
    take whichever base its configuration names."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(place, local_files_only=local) is not None:
        raise UsageError(
            f"base_model={name!r} holds an adapter (adapter_config.json)",
            hint="name the base model itself, in a folder without an adapter",
        )


def _find_package(error: Exception) -> str:
    """What to install, empty where no package is missing or the error does not name it."""
    text = str(error)
    if found := _INSTALL.search(text):
        return found[1]
    if not isinstance(error, ImportError):
        return ""
    if found := _LIBRARY.search(text):
        return found[1].lower()
    return (error.name or "").partition(".")[0]

"""The four formats: each writes its files into a folder, and says what it changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.config.export import ExportConfig, Format
from fedlora.exporting.exported import Exported
from fedlora.exporting.load_commands import ADAPTER_FILE, MODEL_FILE, MODELFILE, base_of_modelfile, export_base_command
from fedlora.files import write_bytes, write_text
from fedlora.llm.adapter_files import CONFIG_NAME, SAFETENSORS_NAME, to_safetensors
from fedlora.llm.gguf_files import write_lora, write_model
from fedlora.llm.merging import Rounding, load_exact_base, merge_adapter, save_merged, total_rounding
from fedlora.llm.serving_template import save_tokenizer
from fedlora.plain_text import counted

MOST_SHOWN = 1e-9
"""A part of an update below this is rounding of float32 and is not worth a sentence."""


@dataclass(frozen=True)
class Written:
    """What a format has to say: sentences, and the rounding of every layer."""

    notes: tuple[str, ...] = ()
    rounding: tuple[Rounding, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        if not self.rounding:
            return {}
        total = total_rounding(list(self.rounding))
        return {"rounding": {"all": total.record(), "layers": [one.record() for one in self.rounding]}}


def write_format(exported: Exported, config: ExportConfig, folder: Path) -> Written:
    """The files of the wanted format, without the card."""
    written = _WRITERS[config.format](exported, config, folder)
    return Written((*_notes_on_sum(exported), *written.notes), written.rounding)


def estimate_bytes(exported: Exported, config: ExportConfig) -> int:
    """About how many bytes the folder takes."""
    if config.format in ("peft", "gguf-lora"):
        return 4 * sum(value.numel() for value in (exported.adapter or {}).values())
    width = getattr(torch, config.dtype).itemsize
    folder = exported.base_folder
    # a stored base has two bytes a weight or more
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    return stored * width // 4


def _write_peft(exported: Exported, config: ExportConfig, folder: Path) -> Written:
    write_bytes(folder / SAFETENSORS_NAME, to_safetensors(_adapter_of(exported)))
    write_text(folder / CONFIG_NAME, exported.config_text)
    save_tokenizer(exported.encoder.tokenizer, exported.template, folder)
    return Written()


def _write_merged(exported: Exported, config: ExportConfig, folder: Path) -> Written:
    model, written = _merge(exported, config)
    save_merged(model, folder, stop_ids=exported.template.stop_ids)
    save_tokenizer(exported.encoder.tokenizer, exported.template, folder)
    return written


def _write_gguf_lora(exported: Exported, config: ExportConfig, folder: Path) -> Written:
    write_lora(folder / ADAPTER_FILE, exported.load_config(), _adapter_of(exported), _scaling(exported))
    lines = [f"FROM {base_of_modelfile(exported)}", f"ADAPTER ./{ADAPTER_FILE}"]
    if exported.base_gguf is None:
        lines.insert(0, f"# a GGUF of the base: {export_base_command(exported)}")
    _write_modelfile(exported, lines, folder)
    return Written()


def _write_gguf(exported: Exported, config: ExportConfig, folder: Path) -> Written:
    tokenizer, template = exported.encoder.tokenizer, exported.template
    model, written = _merge(exported, config)
    dtype = getattr(torch, config.dtype)
    write_model(folder / MODEL_FILE, model, tokenizer, template, dtype, base_file=exported.base_gguf)
    _write_modelfile(exported, [f"FROM ./{MODEL_FILE}"], folder)
    return written


_WRITERS: Mapping[Format, Callable[[Exported, ExportConfig, Path], Written]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "gguf-lora": _write_gguf_lora,
    "gguf": _write_gguf,
}


def _adapter_of(exported: Exported) -> Any:
    if exported.adapter is None:
        raise ValueError("the base has no adapter")
    return exported.adapter


def _scaling(exported: Exported) -> float:
    return exported.spec.scaling if exported.spec else 1.0


def _merge(exported: Exported, config: ExportConfig) -> tuple[Any, Written]:
    model = load_exact_base(exported.base.place, exported.quantization, trust_remote_code=exported.trust_remote_code)
    dtype = getattr(torch, config.dtype)
    if exported.adapter is None:
        return model.to(dtype), Written()
    rounding = merge_adapter(model, exported.adapter, _scaling(exported), dtype)
    return model, Written((_rounding_note(rounding, config.dtype),), tuple(rounding))


def _rounding_note(layers: list[Rounding], dtype: str) -> str:
    total = total_rounding(layers)
    worst = max(layers, key=lambda one: one.lost_share)
    return (
        f"merged in float32 and rounded once to {dtype}: {total.unchanged_share:.1%} of the entries of "
        f"{counted(len(layers), 'layer')} did not change, and the update that is left differs by "
        f"{total.lost_share:.2%} of its norm (at most {worst.lost_share:.2%}, in {worst.layer})"
    )


def _notes_on_sum(exported: Exported) -> tuple[str, ...]:
    """What became of a method's additions to the base."""
    if not exported.is_sum:
        return ()
    error = exported.relative_error
    lost = "nothing is lost" if error < MOST_SHOWN else f"cut to this rank, it lacks {error:.2%} of the update's norm"
    return (f"the run's additions to the base are part of the adapter, of rank {exported.rank}: {lost}",)


def _write_modelfile(exported: Exported, lines: list[str], folder: Path) -> None:
    """For `ollama create`: the model, the prompt format, what ends an answer, and greedy decoding as in `generate`."""
    template = exported.template
    stops = [f"PARAMETER stop {_quoted(text)}" for text in template.stops]
    text = [*lines, f'TEMPLATE """{template.ollama}"""', *stops, "PARAMETER temperature 0"]
    write_text(folder / MODELFILE, "\n".join(text) + "\n")


def _quoted(text: str) -> str:
    """A text of a Modelfile; one with line breaks stands in three quotes."""
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'

"""The model card: README.md of an exported folder, with the front matter that model hubs read.

It says what was trained on as counts: no row, no name of a client or a category.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.config.export import ExportConfig
from fedlora.exporting.exported import Exported
from fedlora.exporting.load_commands import export_base_command, loading_commands
from fedlora.federated.privacy.budget import describe_spent
from fedlora.files import read_json
from fedlora.methods.table import METHODS
from fedlora.paths import ResultPaths
from fedlora.plain_text import counted, one_line
from fedlora.runs.checking import load_manifest
from fedlora.runs.metrics_log import MetricsLog

MEASURES = {
    "exact": ("exact_match", "exact match"),
    "f1": ("f1", "token F1"),
    "rougeL": ("rouge", "ROUGE-L"),
    "chrf": ("chrf", "chrF"),
}
"""Measure of `fedlora score` -> its type and name in the metadata of a hub."""
_LIBRARIES = {"peft": "peft", "merged": "transformers", "gguf-lora": "gguf", "gguf": "gguf"}


@dataclass(frozen=True)
class Card:
    """What the card says beside the run's own records."""

    config: ExportConfig
    exported: Exported
    notes: tuple[str, ...]
    """Sentences on what this format changed."""

    def text(self) -> str:
        """README.md."""
        import yaml

        head = yaml.safe_dump(self._front_matter(), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{head}---\n", f"# {self._title}\n", self._what(), *self._sections()]
        return "\n".join(parts)

    @property
    def _title(self) -> str:
        one = self.exported.subject
        return f"{one.run}, round {one.round_number}, {self._who}"

    @property
    def _who(self) -> str:
        output = self.exported.subject.output
        return "the base model" if output.kind == "base" else str(output).replace("_", " ")

    def _front_matter(self) -> dict[str, Any]:
        exported, config = self.exported, self.config
        found: dict[str, Any] = {"library_name": _LIBRARIES[config.format], "pipeline_tag": "text-generation"}
        if config.license:
            found["license"] = config.license
        if exported.is_base_public:
            found["base_model"] = exported.base_name
        found["tags"] = ["fedlora", "federated-learning", *(["lora"] if "merged" not in config.format else [])]
        if metrics := [
            {"type": kind, "name": name, "value": round(measure["mean"], 4), "args": {"interval": measure["interval"]}}
            for key, (kind, name) in MEASURES.items()
            if (measure := self._scores.get(key))
        ]:
            data = {"name": "test rows of the run", "type": "local"}
            result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
            found["model-index"] = [{"name": exported.paths.exp_name, "results": [result]}]
        return found

    @property
    def _scores(self) -> Mapping[str, Any]:
        one = self.exported.subject
        file = ResultPaths(self.config.evaluation_dir, one.run, one.round_number).scores(one.output, ".json")
        return read_json(file)["overall"] if file.is_file() else {}

    def _what(self) -> str:
        exported, base = self.exported, self.exported.shown_base
        if exported.adapter is None:
            return f"The base model `{base}` of a fedlora run, without an adapter.\n"
        return (
            f"A LoRA adapter of rank {exported.rank} for `{base}`, fine-tuned with federated learning by fedlora: "
            "the rows stayed with their owners, and adapters travelled.\n"
        )

    def _sections(self) -> list[str]:
        sections = {
            "How to load it": self._loading(),
            "Prompts": f"{self.exported.template.about}\n",
            "Base model": self._base(),
            "Training": self._training(),
            "Data": self._data(),
            "Results": self._results(),
            "Privacy": self._privacy(),
            "Limits": self._limits(),
        }
        return [f"## {title}\n\n{text}" for title, text in sections.items() if text]

    def _loading(self) -> str:
        languages = {"transformers": "python"}
        found = loading_commands(self.exported, self.config.format, ".")
        parts = [f"{name}:\n\n```{languages.get(name, 'sh')}\n{text.rstrip()}\n```\n" for name, text in found.items()]
        return "In the folder of this file.\n\n" + "\n".join(parts)

    def _base(self) -> str:
        exported = self.exported
        identity = f" Its identity is `{exported.base.identity}`." if exported.base.identity else ""
        named = f"`{self.exported.shown_base}`.{identity}"
        if exported.is_embedded:
            named += (
                " Its weights are those of a 4-bit GGUF file, dequantised; no model hub has them. On another machine "
                "`fedlora model smollm2-135m` makes them again: put their folder into `adapter_config.json` as "
                "`base_model_name_or_path`, or take a merged export, which needs no base."
            )
        elif not exported.is_base_public and self.config.format in ("peft", "gguf-lora"):
            named += " It lies in a folder of the machine that exported this; another machine needs the same base."
        if self.config.format == "gguf-lora" and exported.base_gguf is None:
            named += f" As a GGUF file it is written by `{export_base_command(exported)}`."
        return f"{named}\n"

    def _training(self) -> str:
        recorded, one = self.exported.recorded, self.exported.subject
        if (origin := recorded.imported_from) is not None:
            return (
                f"Imported by fedlora from files of the kind {origin.get('layout')}; how it was trained is not known.\n"
            )
        row = METHODS.get(recorded.mode)
        about = f": {row.summary}" + (f" ({row.paper})" if row.paper else "") if row else ""
        config = recorded.config
        names = ("local_num_epochs", "local_batch_size", "local_learning_rate", "lora_alpha", "lora_r", "seed")
        settings = ", ".join(f"{name} {config[name]}" for name in names if name in config)
        lines = [
            f"- method `{one_line(recorded.mode)}`{about}",
            f"- round {one.round_number} of {recorded.num_rounds}; this is {self._who}",
            f"- {settings}",
            f"- base held in {recorded.base_dtype}",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"

    def _data(self) -> str:
        sizes = list(self.exported.recorded.training_clients.values())
        if not sizes:
            return ""
        spread = f", {min(sizes):,} to {max(sizes):,} each" if len(sizes) > 1 else ""
        categories = len({name for facts in self.exported.recorded.clients for name in facts.categories})
        return (
            f"{counted(len(sizes), 'client')} with {counted(sum(sizes), 'row')}{spread}, in "
            f"{counted(categories, 'category', 'categories')}. The rows are not part of this folder.\n"
        )

    def _results(self) -> str:
        lines = [
            f"| {name} | {measure['mean']:.3f} | {measure['interval'][0]:.3f} to {measure['interval'][1]:.3f} |"
            for key, (_, name) in MEASURES.items()
            if (measure := self._scores.get(key))
        ]
        table = "| measure | mean | 95 % interval |\n| --- | --- | --- |\n" + "\n".join(lines) if lines else ""
        number = self.exported.subject.round_number
        rows = MetricsLog(self.exported.paths.metrics_file).rows()
        losses = [row["val_loss"] for row in rows if row["kind"] == "round" and row["round"] == number and _has(row)]
        loss = f"Held-out loss of the round: {losses[0]:.4f} nats per response token." if losses else ""
        return "\n\n".join(filter(None, (table, loss, "" if table else "This adapter was not scored."))) + "\n"

    def _privacy(self) -> str:
        recorded = self.exported.recorded
        if recorded.imported_from is not None:
            return "Not known.\n"
        spent = load_manifest(self.exported.paths.round_folder(self.exported.subject.round_number)).privacy
        if spent is None:
            return "No differential privacy: an adapter may reveal rows that it was trained on.\n"
        return f"Differential privacy: {describe_spent(spent)} up to this round.\n"

    def _limits(self) -> str:
        return (
            "Answers may be wrong, and they carry the base model's errors and biases. The adapter was measured on "
            "rows like those it was trained on. "
            + ("" if self.config.license else "No licence was stated. ")
            + "The base model's licence applies to its weights and to what is made of them.\n"
        )


def _has(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("val_loss"), float)

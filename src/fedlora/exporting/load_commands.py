"""How other programs load an exported folder, as commands that a person can copy."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedlora.config.command_line import command_line
from fedlora.config.export import ExportConfig, Format
from fedlora.exporting.exported import Exported

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""
ADAPTER_FILE, MODEL_FILE, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"

_TRANSFORMERS = """{imports}

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}
messages = [{{"role": "user", "content": "Capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False, eos_token_id={stops})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def loading_commands(exported: Exported, format: Format, folder: str) -> dict[str, str]:
    """Program -> what to type, for the files in `folder`."""
    place = shlex.quote(folder)
    name = exported.paths.exp_name
    if format in ("peft", "merged"):
        imports, model = _python(exported, format)
        stops = list(exported.template.stop_ids)
        script = _TRANSFORMERS.format(imports=imports, model=model, folder=folder, stops=stops)
        return {"transformers": script, "vLLM": _vllm(exported, format, place, name)}
    model = f"{place}/{MODEL_FILE}" if format == "gguf" else f"{_base_gguf(exported)} --lora {place}/{ADAPTER_FILE}"
    return {
        "Ollama": f"cd {place} && ollama create {name.lower()} -f {MODELFILE} && ollama run {name.lower()}",
        "llama.cpp": f"llama-cli --jinja -m {model}",
    }


def base_of_modelfile(exported: Exported) -> str:
    """What a Modelfile's FROM names beside an adapter: the base's GGUF, else its folder, which Ollama converts."""
    file = exported.base_gguf
    return str(file) if file is not None else exported.base_name


def export_base_command(exported: Exported) -> str:
    """How the base becomes a GGUF file."""
    asked = {
        "exp_name": exported.paths.exp_name,
        "of_subjects": ("base",),
        "format": "gguf",
        "to": Path("base"),
        "model_dir": exported.paths.model_dir,
    }
    return command_line("export", ExportConfig, asked, positional="exp_name")


def _python(exported: Exported, format: Format) -> tuple[str, str]:
    """The imports of a script, and the expression that loads the model."""
    loader = exported.loader
    both = f"from transformers import {loader}, AutoTokenizer"
    if format == "merged":
        return both, f"{loader}.from_pretrained(folder)"
    if loader == "AutoModelForCausalLM":
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        return imports, "AutoPeftModelForCausalLM.from_pretrained(folder)"
    base = f"{loader}.from_pretrained({exported.base_name!r})"
    return f"from peft import PeftModel\n{both}", f"PeftModel.from_pretrained({base}, folder)"


def _vllm(exported: Exported, format: Format, place: str, name: str) -> str:
    template = f"--chat-template {place}/chat_template.jinja"
    if format == "merged":
        return f"vllm serve {place} {template}"
    rank = next((one for one in VLLM_RANKS if one >= exported.rank), None)
    if rank is None:
        return f"# rank {exported.rank} is above vLLM's highest, {VLLM_RANKS[-1]}: export with --format merged"
    base = shlex.quote(exported.base_name)
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place} {template}"


def _base_gguf(exported: Exported) -> str:
    file = exported.base_gguf
    return shlex.quote(str(file)) if file is not None else f"base/{MODEL_FILE}"

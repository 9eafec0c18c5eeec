"""Put the result of a study into docs/studies, with the machine, the date and the commit it came from.

python studies/publish.py comparisons/forgetting --model build/small_model
python studies/publish.py docs/studies/forgetting --redraw      # the pictures again, from the published numbers
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from machine import describe_machine, machine_facts

from fedlora.comparing.figures import draw_comparison
from fedlora.files import read_json, sha256_of, write_bytes, write_json, write_text

DOCS = Path(__file__).parent.parent / "docs" / "studies"


def publish(source: Path, model: Path | None) -> Path:
    """Copy tables and pictures of a finished comparison; returns the folder they went to."""
    target = DOCS / source.name
    result = read_json(source / "comparison.json")
    place = f"Made with `fedlora compare studies/{source.name}.yaml`: {describe_machine()}."
    text = (source / "comparison.md").read_text(encoding="utf-8")
    title, rest = text.split("\n", 1)
    write_text(target / "comparison.md", f"{title}\n\n{place}{_about(result, model)}\n{rest}")
    write_text(target / "comparison.tex", (source / "comparison.tex").read_text(encoding="utf-8"))
    write_text(target / "comparison.json", json.dumps(_rounded(result), sort_keys=True, ensure_ascii=False) + "\n")
    write_json(target / "provenance.json", {**machine_facts("cpu"), "model_sha256": _hash(model)})
    for picture in target.glob("*.png"):
        picture.unlink()
    for picture in sorted(source.glob("*.png")):
        write_bytes(target / picture.name, picture.read_bytes())
    return target


def redraw(folder: Path) -> Path:
    """Draw the pictures of a published study again, from its comparison.json; returns the folder."""
    pictures = draw_comparison(read_json(folder / "comparison.json"))
    for old in set(folder.glob("*.png")) - {folder / name for name in pictures}:
        old.unlink()
    for name, content in pictures.items():
        write_bytes(folder / name, content)
    return folder


def _about(result: dict[str, Any], model: Path | None) -> str:
    base = result["experiment"]["train"].get("base_model")
    digest = _hash(model)
    return f" Base: `{base}`" + (f", model.safetensors {digest[:12]}." if digest else ".")


def _hash(model: Path | None) -> str | None:
    return sha256_of(model / "model.safetensors") if model else None


def _rounded(value: Any) -> Any:
    """Six digits are more than any of this means, and a third of the bytes."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Publish one comparison, or draw a published one again."""
    parser = argparse.ArgumentParser(description="Copy a finished comparison into docs/studies.")
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--model", type=Path, default=None, help="folder of a model that was made here")
    parser.add_argument("--redraw", action="store_true", help="draw the pictures of a published study again")
    given = parser.parse_args()
    print(redraw(given.comparison) if given.redraw else publish(given.comparison, given.model))


if __name__ == "__main__":
    main()

"""Size and seconds of every export of the embedded model, and what rounding loses; written into the page on exports.

    python benchmarks/exports.py            # a minute; rewrites the table in docs/how-to/take-it-away.md
    python benchmarks/exports.py --print    # shows the table only

Each format is written twice and the shorter time counts: the first one reads the base from the disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from machine import describe_machine
from part import say

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "take-it-away.md"
BEGIN, END = "<!-- exports -->\n", "<!-- /exports -->\n"
FORMATS = (
    ("peft", "float32"),
    ("gguf-lora", "float32"),
    ("merged", "float32"),
    ("merged", "bfloat16"),
    ("gguf", "float32"),
    ("gguf", "bfloat16"),
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fedlora-exports-") as folder:
        table = measure(Path(folder))
    sys.stdout.write(table)
    if "--print" not in sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}{table}{END}{rest.split(END)[1]}", encoding="utf-8")


def measure(root: Path) -> str:
    """Train a run of one round and export it in every format; the table as Markdown."""
    import fedlora as fl
    from fedlora.data.skills import make_skill_rows
    from fedlora.plain_text import size_text

    rows = make_skill_rows(8, seed=1)
    data = fl.silos({"one": rows[::2], "two": rows[1::2]}, folder=root / "silos", progress=False)
    how = {"template": "chat", "client_fraction": 1, "rank": 8, "batch_size": 8, "learning_rate": 1e-3}
    run = fl.train(data=data, model="smollm2-135m", rounds=1, name="exports", model_dir=root, progress=False, **how)
    lines = ["| format | type | size | seconds | entries that did not change | difference of the update |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for kind, dtype in FORMATS:
        typed = {"dtype": dtype} if kind in ("merged", "gguf") else {}
        made = [run.export(root / f"{kind}-{dtype}-{turn}", format=kind, progress=False, **typed) for turn in range(2)]
        seconds = min(one.seconds for one in made)
        lost = made[0].record.get("rounding", {}).get("all")
        shares = f"{lost['unchanged_share']:.1%} | {lost['lost_share']:.2%}" if lost else "- | -"
        lines.append(f"| `{kind}` | {dtype} | {size_text(made[0].num_bytes)} | {seconds:.1f} | {shares} |")
        say(lines[-1])
    about = (
        f"SmolLM2-135M, rank 8 on q and v, one round over {len(rows)} rows in two clients; the last column is "
        "how far rounding moves the update, in parts of its norm"
    )
    return "\n".join(lines) + f"\n\n`benchmarks/exports.py`, {describe_machine()}: {about}.\n"


if __name__ == "__main__":
    main()

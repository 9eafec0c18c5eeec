"""Run every benchmark, one after another, and write docs/benchmarks.md.

    python benchmarks/bench.py [--device cpu|cuda] [--data FILE] [--only training,outside,...] [--quick]

Each part is a process of its own and prints one line of JSON. All lines together, with the facts of the machine,
go to docs/benchmarks/<cpu|gpu>.json, and docs/benchmarks.md is made from whatever lies there. With --only the other
parts keep their earlier figures (each part carries the machine and commit it was measured with). --quick checks
that the scripts run: its figures mean nothing and are printed, not written. A part that fails does not stop the
others, but nothing of it is kept and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine_facts
from model import VARIABLE, model_for
from table import render

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
PARTS = ("training", "outside", "generation", "memory", "aggregation", "meter", "limit")
ON_REQUEST = ("continuous_batching", "flower", "dropout", "reading", "tasks")
"""Parts that decided something once, or need an extra, and run with --only."""
ON_CPU_ONLY = ("aggregation", "meter", "flower", "reading")
"""Parts that measure nothing of a GPU."""


def main() -> int:
    arguments = parse_arguments()
    began = time.perf_counter()
    file = DOCS / "benchmarks" / ("cpu.json" if arguments.device == "cpu" else "gpu.json")
    found: dict[str, Any] = {}
    failed = []
    with model_for(arguments.device, quick=arguments.quick) as name:
        for part in arguments.only:
            print(f"== {part}", file=sys.stderr, flush=True)
            result = run_part(part, arguments, name)
            if result is None:
                failed.append(part)
            else:
                found[part] = result
            if not arguments.quick and found:
                write_results(file, found)
    if arguments.quick:
        print(render({arguments.device: found}))
    minutes = (time.perf_counter() - began) / 60
    failures = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(found)} parts in {minutes:.1f} minutes{failures}", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Flags of the runner; --only becomes a list of parts in their usual order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", help="file of Dolly rows; without it only short rows are timed")
    parser.add_argument("--only", help=f"comma-separated parts: {', '.join((*PARTS, *ON_REQUEST))}")
    parser.add_argument("--quick", action="store_true", help="least sizes, to check the scripts; nothing is written")
    arguments = parser.parse_args()
    if arguments.data and not Path(arguments.data).is_file():
        parser.error(f"--data {arguments.data}: no such file")
    wanted = [name.strip() for name in arguments.only.split(",")] if arguments.only else list(PARTS)
    known = (*PARTS, *ON_REQUEST)
    if unknown := set(wanted) - set(known):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; the parts are {', '.join(known)}")
    if arguments.device == "cuda" and not arguments.only:
        wanted = [part for part in wanted if part not in ON_CPU_ONLY]
    arguments.only = [part for part in known if part in wanted]
    return arguments


def run_part(part: str, arguments: argparse.Namespace, model: str) -> dict[str, Any] | None:
    """The JSON object of one part with the machine and the seconds it took; None when it failed."""
    command = [sys.executable, str(HERE / f"{part}.py"), "--device", arguments.device]
    command += ["--data", arguments.data] if arguments.data else []
    command += ["--quick"] if arguments.quick else []
    # OpenMP reads its variable once, when torch is first imported
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, VARIABLE: model}
    if arguments.device == "cuda":
        # on a machine with several the usual way's Trainer would spread over all of them
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    facts = machine_facts(arguments.device)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(f"{part}: failed with exit code {done.returncode}", file=sys.stderr)
        return None
    return {**json.loads(lines[-1]), "machine": facts, "minutes": round((time.perf_counter() - began) / 60, 2)}


def write_results(file: Path, found: dict[str, Any]) -> None:
    """Put the parts into their JSON file beside those measured earlier, and make the page anew."""
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    merged = {**earlier, **found}
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {part: merged[part] for part in (*PARTS, *ON_REQUEST) if part in merged}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    write_page(file.parent)


def write_page(folder: Path) -> None:
    """docs/benchmarks.md from whatever results lie in the folder."""
    import quality

    stored = {kind: folder / name for kind, name in {"cpu": "cpu.json", "cuda": "gpu.json"}.items()}
    page = render({kind: json.loads(path.read_text()) for kind, path in stored.items() if path.is_file()})
    if quality.RESULT.is_file():
        page += "\n## Quality\n\n" + quality.table(json.loads(quality.RESULT.read_text()))
    (DOCS / "benchmarks.md").write_text(page)


if __name__ == "__main__":
    sys.exit(main())

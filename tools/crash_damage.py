"""Every kind of file of a run cut short and with a flipped bit: `verify` names it, and nothing of it is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from crash_bench import CrashBench, Tally, find_difference
from tiny_run import facts_of

DAMAGED_EXIT, REFUSED_EXIT = 5, 2
REFUSED = ("run.json",)
"""Files without which a run does not go on: it ends with an error that names them."""
NOT_HASHED = ("steps.jsonl",)
"""Files that are no part of a round: damage to them is not found, and harms nothing."""


def damage_files(bench: CrashBench, cuts: int, flips: int, seed: int, *, modes: tuple[str, ...]) -> list[Tally]:
    """Each kind of file in a finished run and, where it lies in a round, in an open one: `cuts` and `flips` each."""
    tallies = []
    for mode in modes:
        rng = random.Random(f"{seed} damage {mode}")
        for name in find_kinds(bench.whole(mode).root):
            tally = Tally(f"damaged, {mode}: {name}")
            whole = (bench.whole(mode).root / name).read_bytes()
            lengths = [len(whole) * index // cuts for index in range(cuts)]
            for content in [*(whole[:length] for length in lengths), *(_flip(whole, rng) for _ in range(flips))]:
                folder = bench.copy_whole(mode)
                fault = _try(bench, mode, folder, name, content)
                tally.count(fault)
                bench.drop(folder, fault)
            tallies.append(tally)
        tallies.append(_damage_open_round(bench, mode, cuts + flips, rng))
    return tallies


def find_kinds(run: Path) -> list[str]:
    """One file of each kind: in the last round and, where none lies there, in an earlier one; plus one of the first."""
    kinds: dict[str, str] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = path.relative_to(run).as_posix()
        in_client = "client/" if "client_" in name else ""
        kinds[in_client + path.name] = name
        # a client's adapter without an update beside it was carried forward from an earlier round
        if path.name == "adapter_model.bin" and not (path.parent / "update.json").exists():
            kinds["carried"] = name
    first = {
        "first round's adapter": next(n for n in ("1/adapter_model.safetensors", *_in_first(run)) if (run / n).exists())
    }
    return sorted({**kinds, **first}.values())


def _in_first(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.glob("1/*/adapter_model.bin"))


def _try(bench: CrashBench, mode: str, folder: Path, name: str, content: bytes) -> str | None:
    """What is wrong with how one damaged file is treated."""
    file = folder / "run" / name
    is_cut = len(content) < file.stat().st_size
    # a file may be a hard link of another one: damage on a disk is in both, and a copy has no links
    file.unlink()
    file.write_bytes(content)
    checked = bench.start(mode, folder, command="verify")
    if name in NOT_HASHED and checked.code == 0:
        pass
    elif checked.code not in (DAMAGED_EXIT, REFUSED_EXIT) or str(file) not in checked.said:
        ends_with_line = name == "metrics.jsonl" and is_cut and content.endswith(b"\n")
        # a log that ends behind some line is a log that was not yet longer
        if not (ends_with_line or (name == "metrics.jsonl" and not content)):
            return f"{folder}: verify ended with {checked.code} on {name}: {checked.said[-300:]}"
    if name in REFUSED:
        ending = bench.start(mode, folder)
        is_refused = ending.code == REFUSED_EXIT and str(file) in ending.said
        return None if is_refused else f"{folder}: a start with a damaged {name} ended with {ending.code}"
    ending = bench.start(mode, folder)
    if ending.code != 0:
        return f"{folder}: going on with a damaged {name} ended with {ending.code}: {ending.said[-300:]}"
    expected, found = bench.whole(mode).facts, facts_of(folder / "run")
    if file.exists() and file.read_bytes() == content and name in found["files"]:
        # an old round on which nothing stands is neither used nor repaired: verify has named it
        found["files"][name] = expected["files"][name]
    difference = find_difference(expected, found)
    return f"{folder}: after a damaged {name}: {difference}" if difference else None


def _damage_open_round(bench: CrashBench, mode: str, tries: int, rng: random.Random) -> Tally:
    """A run killed inside a round, one file of the open round damaged."""
    tally = Tally(f"damaged, {mode}: open round")
    source = bench.new_folder()
    points = bench.whole(mode).points
    for point in range(int(points * 0.9), 0, -5):
        shutil.rmtree(source, ignore_errors=True)
        bench.start(mode, source, trap={"action": "kill", "point": point})
        files = sorted(path for path in source.glob("run/*.partial/**/*") if path.is_file())
        if len(files) > 3:
            break
    for _ in range(tries):
        folder = bench.new_folder()
        shutil.copytree(source, folder)
        file = rng.choice(
            sorted(path for path in folder.glob("run/*.partial/**/*") if path.is_file() and path.stat().st_size)
        )
        content = file.read_bytes()
        file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else _flip(content, rng))
        fault = bench.resume(mode, folder)
        tally.count(fault)
        bench.drop(folder, fault)
    bench.drop(source, None)
    return tally


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)

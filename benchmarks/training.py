"""Part 1, local training: the usual way against fedlora, in real (non-pad) tokens a second and seconds a round.

    python benchmarks/training.py [--device cpu|cuda] [--data FILE] [--quick]

One client, 24 rows, one optimizer step, micro-batches of 8 on the usual side. A side's round is a real one: the
usual way loads its adapter file, makes its Trainer, trains and saves; fedlora runs its federated loop with client
pool, store, checksums and manifest. Both sides are there in float32 and in the type that the hardware is fast at
(a bfloat16 base on CPUs that have it, autocast for the usual way on a GPU), so that what comes from layout and
what comes from precision can be told apart. The sides train in turn, never two at once.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model import model_for
from part import emit, parse_arguments, say
from rows import load_rows, write_client_file
from sides import Side, Turn, open_side
from usual import ALL_SEVEN, QUERY_VALUE

NUM_ROWS = 24
LOSS_TOLERANCE = 1e-5
Turns = dict[str, dict[str, list[Turn]]]
"""Data set -> side -> its turns."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    on_cpu = arguments.device == "cpu"
    count = 8 if arguments.quick else NUM_ROWS
    repeats = 1 if arguments.quick else 2 if on_cpu else 5
    sets = {"dolly": load_rows(arguments.data, count)} if arguments.data else {}
    sets["short"] = load_rows(None, count)
    with tempfile.TemporaryDirectory() as folder, model_for(arguments.device, quick=arguments.quick) as name:
        files = {kind: write_client_file(rows, Path(folder) / f"{kind}.json") for kind, rows in sets.items()}
        few = write_client_file(load_rows(None, 8, seed=1), Path(folder) / "few.json")
        sides = make_sides(arguments.device, name, QUERY_VALUE, count)
        found = {"q,v": take_turns(sides, files, repeats, warm_up=few)}
        sides = make_sides(arguments.device, name, ALL_SEVEN, count)
        extremes = {label: sides[label] for label in ("usual fp32", "usual autocast", "fedlora auto") if label in sides}
        # on a CPU a usual round with seven projections takes minutes: once, and on one data set
        seven = dict(list(files.items())[:1]) if on_cpu else files
        found["all seven"] = take_turns(extremes, seven, 1 if on_cpu else repeats, warm_up=few)
    table = {
        f"{kind}, {targets}, {label}": _entry(turns)
        for targets, by_kind in found.items()
        for kind, by_side in by_kind.items()
        for label, turns in by_side.items()
    }
    ratios = {
        f"{kind}, {targets}: {name}": value
        for targets, by_kind in found.items()
        for kind, by_side in by_kind.items()
        for name, value in _ratios(by_side).items()
    }
    emit("training", table, ratios, _notes(found, count, repeats, on_cpu=on_cpu, has_dolly="dolly" in sets))


def make_sides(device: str, name: str, targets: Sequence[str], count: int) -> dict[str, Side]:
    """The four sides on a device: each way in float32 and in the fast type."""
    on_cpu = device == "cpu"

    def side(who: str, dtype: str, *, autocast: bool = False) -> Side:
        return Side(who, dtype, tuple(targets), count, device, name, autocast)

    return {
        "usual fp32": side("usual", "float32"),
        ("usual bf16" if on_cpu else "usual autocast"): (
            side("usual", "bfloat16") if on_cpu else side("usual", "float32", autocast=True)
        ),
        "fedlora fp32": side("fedlora", "float32"),
        "fedlora auto": side("fedlora", "auto"),
    }


def take_turns(sides: Mapping[str, Side], files: Mapping[str, Path], repeats: int, *, warm_up: Path) -> Turns:
    """Every side's rounds on every file, A B A B, after an untimed round of each on `warm_up`."""
    turns: Turns = {}
    with contextlib.ExitStack() as stack:
        pipes = {}
        for label, side in sides.items():
            pipes[label] = stack.enter_context(open_side(side))
            pipes[label].send(warm_up)
            pipes[label].recv()
            say(f"{label}, {len(side.targets)} projections: ready")
        for kind, file in files.items():
            by_side: dict[str, list[Turn]] = {label: [] for label in sides}
            for _ in range(repeats):
                for label, pipe in pipes.items():
                    pipe.send(file)
                    turn = pipe.recv()
                    by_side[label].append(turn)
                    say(f"  {kind}, {label}: {turn.seconds:.2f} s, {turn.tokens / turn.seconds:.0f} tokens/s")
            turns[kind] = by_side
    return turns


def _seconds(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def _entry(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "seconds": round(_seconds(turns), 3),
        "tokens_per_second": round(turns[0].tokens / _seconds(turns), 1),
        "times": [round(turn.seconds, 3) for turn in turns],
        "loss": turns[0].loss,
        "peak_gib": round(max(turn.peak_gib for turn in turns), 2),
    }


def _ratios(by_side: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """How many times as fast fedlora is: as it comes against each usual side, and with the type held equal."""
    seconds = {label: _seconds(turns) for label, turns in by_side.items()}
    pairs = [("usual fp32", "fedlora auto"), ("usual fp32", "fedlora fp32")]
    pairs += [("usual bf16", "fedlora auto"), ("usual autocast", "fedlora auto")]
    return {f"{b} against {a}": round(seconds[a] / seconds[b], 2) for a, b in pairs if a in seconds and b in seconds}


def _notes(found: Mapping[str, Turns], count: int, repeats: int, *, on_cpu: bool, has_dolly: bool) -> list[str]:
    notes = [f"{count} rows a round, one optimizer step, {repeats} timed rounds a side (all seven on a CPU: one)"]
    if not has_dolly:
        notes.append("no Dolly file was given (--data): only short rows are timed")
    for kind, by_side in found["q,v"].items():
        ours, theirs = by_side["fedlora fp32"][0], by_side["usual fp32"][0]
        if ours.tokens != theirs.tokens:
            raise RuntimeError(f"{kind}: {ours.tokens} tokens here, {theirs.tokens} there: not the same rows")
        difference = abs(ours.loss - theirs.loss) / theirs.loss
        if difference > LOSS_TOLERANCE:
            raise RuntimeError(f"{kind}: loss {ours.loss} here, {theirs.loss} there: not the same mathematics")
        notes.append(
            f"{kind}: {ours.tokens} real tokens, padded to {theirs.padded} by the usual way; loss of the step in "
            f"float32 {theirs.loss:.6f} the usual way, {ours.loss:.6f} here (relative difference {difference:.0e})"
        )
    return notes


if __name__ == "__main__":
    main()

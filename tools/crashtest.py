"""What a run survives, shown: kills, a full disk, damaged files, signals, many starts at once.

Every try ends with a comparison with an unbroken run: all files of all rounds by SHA-256, so the adapters and the
chain of manifests, and run.json and the metrics but for the clock. `--seed` decides every point, moment and bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from crash_bench import CrashBench, Tally
from crash_damage import damage_files
from crash_disk import fill_disks
from crash_kills import kill_runs
from crash_starts import lose_signals, send_signals, start_together
from fork_server import ForkServer

SECTIONS = ("kills", "disk", "damage", "signals", "starts")


def main() -> int:
    """Run the sections and print the table; 1 when any try did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="processes killed by SIGKILL in all")
    parser.add_argument("--cuts", type=int, default=64, help="lengths to which each kind of file is cut")
    parser.add_argument("--flips", type=int, default=16, help="bits flipped in each kind of file, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fedlora-crashtest-"))
    with ForkServer(work / "model") as server:
        bench = CrashBench(server, work / "model", work)
        sections: dict[str, Callable[[], list[Tally]]] = {
            "kills": lambda: kill_runs(bench, options.kills, options.seed),
            "disk": lambda: fill_disks(bench, 24, 12, options.seed),
            "damage": lambda: damage_files(bench, options.cuts, options.flips, options.seed, modes=("homo", "none")),
            "signals": lambda: send_signals(bench, 20, options.seed) + lose_signals(bench, 90, options.seed),
            "starts": lambda: start_together(bench, 20),
        }
        faults = []
        for name in [options.only] if options.only else SECTIONS:
            faults += show(sections[name])
    if faults:
        print(f"{len(faults)} tries did not end as they should; what they left is in {work}")
        print(*faults[:20], sep="\n")
        return 1
    bench.drop(work, None)
    return 0


def show(section: Callable[[], list[Tally]]) -> list[str]:
    """Run a section and print its lines; what went wrong in it."""
    began = time.monotonic()
    tallies = section()
    for tally in tallies:
        notes = ", ".join(f"{name}: {amount}" for name, amount in sorted(tally.notes.items()))
        print(f"{tally.what:<60} as unbroken {tally.good}/{tally.tries}  {notes}".rstrip())
    tries = sum(tally.tries for tally in tallies)
    seconds = time.monotonic() - began
    print(f"  {tries} tries in {seconds:.0f} s, {seconds / max(1, tries):.2f} s each", flush=True)
    return [fault for tally in tallies for fault in tally.faults]


if __name__ == "__main__":
    sys.exit(main())

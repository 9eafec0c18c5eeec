"""Signals at random moments, and many starts on one folder at once."""

from __future__ import annotations

import random
import signal

from crash_bench import CrashBench, Tally, spread
from crash_kills import WHERE
from tiny_run import MODES

LIMIT_SECONDS = 5.0
LOCKED_EXIT = 6
LOCKED_SECONDS = 1.0


def send_signals(bench: CrashBench, tries: int, seed: int) -> list[Tally]:
    """SIGINT or SIGTERM at a moment, in every fourth try a second one behind it; then the run goes on."""
    rng = random.Random(f"{seed} signals")
    tally = Tally("SIGINT and SIGTERM")
    slowest = 0.0
    for index in range(tries):
        mode, number = MODES[index % len(MODES)], (signal.SIGINT, signal.SIGTERM)[index // len(MODES) % 2]
        folder = bench.new_folder()
        # a child needs a moment until it can be asked to stop
        moment = rng.uniform(0.05, 0.9 * bench.whole(mode).seconds)
        signals = [[moment, int(number)]]
        if index % 4 == 3:
            signals.append([moment + 0.002, int(number)])
        ending = bench.start(mode, folder, signals=signals)
        allowed = (0, 128 + number, -number) if len(signals) > 1 else (0, 128 + number)
        if ending.code not in allowed or ending.seconds - moment > LIMIT_SECONDS:
            fault = f"{folder}: signal {number} after {moment:.3f} s: {ending.code} after {ending.seconds:.1f} s"
            tally.count(fault + ending.said[-300:])
            continue
        tally.note("stopped", ending.code != 0)
        slowest = max(slowest, ending.seconds - moment)
        fault = bench.resume(mode, folder)
        tally.count(fault)
        bench.drop(folder, fault)
    tally.note(f"slowest {slowest:.2f} s", 1)
    return [tally]


def lose_signals(bench: CrashBench, tries: int, seed: int) -> list[Tally]:
    """SIGTERM at a point where its exception gets lost or becomes another: nothing behind it is kept; then the run
    goes on."""
    rng = random.Random(f"{seed} lost signals")
    tally = Tally("SIGTERM whose exception is lost")
    for index, share in enumerate(spread(tries, 1000, rng)):
        mode, action = MODES[index % len(MODES)], ("lose", "turn")[index % 2]
        point = share * bench.whole(mode).points // 1000
        folder = bench.new_folder()
        ending = bench.start(mode, folder, trap={"action": action, "point": point, "where": rng.choice(WHERE)})
        # behind the last write there is nothing left to stop
        if ending.code not in (0, 128 + signal.SIGTERM):
            tally.count(f"{folder}: {action} at point {point}: {ending.code}: {ending.said[-300:]}")
            continue
        tally.note("stopped", ending.code != 0)
        fault = bench.resume(mode, folder)
        tally.count(fault)
        bench.drop(folder, fault)
    return [tally]


def start_together(bench: CrashBench, starts: int) -> list[Tally]:
    """`starts` processes on one folder: one trains, the others end with 6; the one is killed, and a new one goes on."""
    tally = Tally(f"{starts} starts on one folder")
    mode = "homo"
    folder = bench.new_folder()
    gate = bench.work / "gate"
    # whoever gets as far as run.json waits there until all others have ended, and is then killed
    trap = {"action": "wait", "point": 12, "gate": str(gate)}
    job = {"argv": bench.argv(mode, folder), "trap": trap, "environment": {"FEDLORA_CACHE": f"{folder}-cache"}}
    endings = bench.server.run_all([job] * starts, gate=str(gate))
    winners = [ending for ending in endings if ending.code == 0]
    losers = [ending for ending in endings if ending.code == LOCKED_EXIT and "process" in ending.said]
    fault = None
    if (len(winners), len(losers)) != (1, starts - 1):
        fault = f"{folder}: ended with {sorted(ending.code for ending in endings)}: {endings[0].said[-300:]}"
    tally.count(fault or bench.resume(mode, folder))
    tally.note("winners", len(winners))
    tally.note("refused", len(losers))
    held = bench.new_folder()
    bench.start(mode, held, trap={"action": "kill", "point": bench.whole(mode).points // 2})
    tally.count(bench.resume(mode, held))
    tally.note("lock of a killed process free again")
    for each in (folder, held):
        bench.drop(each, fault)
    return [tally]

"""Where and on what a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def describe_machine() -> str:
    """Date, processor, cores, torch version and commit in one line."""
    facts = machine_facts("cpu")
    parts = [facts["date"], facts["processor"], f"{facts['cores']} cores", f"torch {facts['versions']['torch']}"]
    return ", ".join([*parts, f"commit {facts['commit']}"])


def machine_facts(device: str) -> dict[str, Any]:
    """Date, processor, cores, memory in GiB, GPU (None on the CPU), versions, commit, whether the tree was dirty."""
    names = ("torch", "transformers", "peft")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu() if device == "cuda" else None,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
        "commit": _git("rev-parse", "--short", "HEAD"),
        # what the benchmarks themselves write is no change of what they measure
        "dirty": bool(_git("status", "--porcelain", "--", ":/", ":!/docs")),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    fast = " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    return f"{name} ({fast})" if fast else name


def _memory_gib() -> float:
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)


def _gpu() -> str:
    """Asked of the driver, so that the runner itself takes nothing of the device."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "a CUDA device (no nvidia-smi to name it)"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()

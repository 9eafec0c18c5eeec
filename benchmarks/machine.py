"""One line that says where and on what a figure was measured."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def describe_machine() -> str:
    """Date, processor, cores, torch version and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    fast = " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    parts = [
        datetime.now(UTC).date().isoformat(),
        f"{name} ({fast})" if fast else name,
        f"{os.cpu_count()} cores",
        f"torch {metadata.version('torch')}",
        f"commit {commit.stdout.strip()}",
    ]
    return ", ".join(parts)

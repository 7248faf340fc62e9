"""Where something was measured: processor, memory, versions, commit. Figures without these mean nothing."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import omni

ROOT = Path(__file__).resolve().parent.parent

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""Instructions that decide how fast matrix products are."""


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, and which of `FLAGS` there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    present = set(fields.get("flags", "").split())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in present],
        "memory_gib": round(memory / 2**30, 1),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages that are compared; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "omni": omni.__version__}
    for name in ("torch", "transformers", "timm", "pillow", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether files differ from it; None outside of a repository."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changed)}

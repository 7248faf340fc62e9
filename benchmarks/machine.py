"""The machine of a measurement: device and its clock, processor, memory, versions, commit. Figures need them."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import omni
from benchmarks.measure import Clock

ROOT = Path(__file__).resolve().parent.parent

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""The instruction sets that decide the speed of matrix products."""


CPU = torch.device("cpu")


def device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: the name is not that of a CPU or a CUDA GPU, or there is no such GPU.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"expected cpu, cuda or cuda:N as a device, found {name!r}; name one of these.")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"expected a CUDA GPU for device {name!r}, found {count} that torch {torch.__version__} can use; name one of "
            "these, install torch for CUDA, or leave out the device to measure on the CPU."
        )
    return found


def clock(device: torch.device) -> Clock:
    """A clock in seconds. On a GPU it waits for all queued work first."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def hardware(device: torch.device = CPU) -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, those of `FLAGS` that the processor has, and the GPU."""
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
        **({"gpu": _gpu(device)} if device.type == "cuda" else {}),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, memory in GiB, versions, and the speed of a large product, which is above that of a small encoder's parts."""
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "matmul_tflops": round(matmul_tflops(device), 1),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.partition("\n")[0].strip() or None


@torch.inference_mode()
def matmul_tflops(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a product of two square matrices in bfloat16: the median of ten, after three to warm up."""
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    now, seconds = clock(device), []
    for _ in range(13):
        start = now()
        torch.mm(x, y)
        seconds.append(now() - start)
    return 2 * size**3 / float(np.median(seconds[3:])) / 1e12


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages. None if a package is not installed."""
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

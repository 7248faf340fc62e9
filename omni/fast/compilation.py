"""C++ that lies beside a module, compiled on the user's machine the first time it is wanted, and what it may be handed.

    library = compile_library(Path(__file__).with_name("encoder.cpp"), "encode_float32")
    if library is not None:
        library.encode_float32(..., address(pictures, torch.uint8, 4, 224, 224, 3), ..., threads())

The result is kept in the user's cache folder ($XDG_CACHE_HOME/omni, or ~/.cache/omni), under the hash of all that it depends
on. Without a C++ compiler, or on a processor that the code is not for, there is none, so whoever asks has another way. $CXX
names the compiler, with options if need be; CXX=false does without.

Machine code believes what it is told. So every buffer goes through `address`, which looks at type, size, order and device.
What is made for it is made with a type and a device: torch's defaults are the user's to change.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

HEADER = Path(__file__).with_name("vectors.h")
"""What all of it includes."""

OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
"""Parallel loops run on the threads that torch has started: it has loaded their library, so none is linked."""

INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""By what torch calls the processor's capability; others have no vectors that our code is written for."""

BFLOAT16 = ["-mavx512bf16"]
MATRIX_UNITS = ["-mamx-tile", "-mamx-bf16"]


_PROCESS = os.getpid()


@cache
def compile_library(source: Path, *functions: str) -> ctypes.CDLL | None:
    """The functions of a file that are `extern "C"`, or None; `functions` are those without which it is of no use."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    for instructions in _instructions():
        library = _compile(source, instructions)
        if library is not None and all(hasattr(library, name) for name in functions):
            return library
    return None


def threads() -> int:
    """On how many threads machine code may run: torch's, but one alone in a forked process, where the others are missing."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def address(buffer: Any, dtype: Any, *shape: int) -> int:
    """Where the first number of a tensor or an array lies, for machine code that takes it for `dtype` of this shape.

    Raises:
        BufferError: it is something else.
    """
    if not fits(buffer, dtype, *shape):
        found = f"{buffer.dtype} of shape {tuple(buffer.shape)} on {buffer.device}"
        raise BufferError(
            f"Expected {dtype} of shape {shape} on cpu, one number after the other in memory; found {found}."
        )
    return int(buffer.data_ptr() if isinstance(buffer, torch.Tensor) else buffer.ctypes.data)


def fits(buffer: Any, dtype: Any, *shape: int) -> bool:
    """Whether `address` has an address for it."""
    if buffer.shape != shape or buffer.dtype != dtype:
        return False
    if type(buffer) in (torch.Tensor, nn.Parameter):
        plain = buffer.is_cpu and buffer.layout is torch.strided and buffer.is_contiguous()
        return bool(plain) and not buffer.is_neg()  # the sign of a view may be yet to be turned
    return isinstance(buffer, np.ndarray) and bool(buffer.flags.c_contiguous)


def _instructions() -> Iterator[list[str]]:
    """What this processor has, and less of it for compilers that do not know everything."""
    if plain := INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability()):
        if torch.cpu._is_avx512_bf16_supported():
            if torch.cpu._init_amx():  # asks the system for the matrix units: they are there and may be used
                yield [*plain, *BFLOAT16, *MATRIX_UNITS]
            yield [*plain, *BFLOAT16]
        yield plain


def _compile(source: Path, instructions: list[str]) -> ctypes.CDLL | None:
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        compile, link = [*compiler, *OPTIONS, *instructions, "-c"], [*compiler, "-shared"]
        text = source.read_bytes() + HEADER.read_bytes()
        key = hashlib.sha256(text + repr([compile, link]).encode()).hexdigest()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "omni")
        library = folder / f"{source.stem}-{key[:16]}.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                compiled, linked = f"{beside}/compiled.o", f"{beside}/linked.so"
                compile += [f"-I{HEADER.parent}", str(source), "-o", compiled]
                for step in (compile, [*link, compiled, "-o", linked]):
                    subprocess.run(step, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
                os.replace(linked, library)  # in one step: two processes may do this at a time
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        # no compiler, no home, a $CXX that is no command, or a result that does not load
        return None

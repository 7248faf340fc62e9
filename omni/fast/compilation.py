"""Compiles C++ files on the user's machine when they are first needed, and checks the buffers that go to them.

    library = compile_library(Path(__file__).with_name("compiled_encoder.cpp"), "encode_float32")
    if library is not None:
        library.encode_float32(..., address(pictures, torch.uint8, 4, 224, 224, 3), ..., threads())

The result is kept in the user's cache folder ($XDG_CACHE_HOME/omni, or ~/.cache/omni). Its name is a hash of the source, the
compiler and the options. Without a C++ compiler, or on an unsupported processor, there is no library, and the caller uses
another way. $CXX names the compiler and may add options; CXX=false turns compilation off.

Machine code does not check its arguments. So every buffer goes through `address`, which checks type, shape, order and
device. Buffers for it are made with an explicit type and device, because the user may change torch's defaults.
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
"""All C++ files include this one."""

OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
"""Parallel loops run on torch's threads. torch has loaded the library for them, so none is linked here."""

INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""Options for each capability of a processor, by torch's name. Other processors are not supported."""

BFLOAT16 = ["-mavx512bf16"]
MATRIX_UNITS = ["-mamx-tile", "-mamx-bf16"]


_PROCESS = os.getpid()


@cache
def compile_library(source: Path, *functions: str) -> ctypes.CDLL | None:
    """The `extern "C"` functions of a file; None if it cannot be compiled, or if one of `functions` is not in it."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    for instructions in _instructions():
        library = _compile(source, instructions)
        if library is not None and all(hasattr(library, name) for name in functions):
            return library
    return None


def threads() -> int:
    """The number of threads for machine code: torch's, or one in a forked process, which lacks torch's threads."""
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def address(buffer: Any, dtype: Any, *shape: int) -> int:
    """The address of a tensor's or an array's first number, for machine code that reads it with this type and shape.

    Raises:
        BufferError: it has another type, shape, order or device.
    """
    if not fits(buffer, dtype, *shape):
        found = f"{buffer.dtype} of shape {tuple(buffer.shape)} on {buffer.device}"
        raise BufferError(
            f"Expected {dtype} of shape {shape} on cpu, one number after the other in memory; found {found}."
        )
    return int(buffer.data_ptr() if isinstance(buffer, torch.Tensor) else buffer.ctypes.data)


def fits(buffer: Any, dtype: Any, *shape: int) -> bool:
    """Whether `address` accepts it."""
    if buffer.shape != shape or buffer.dtype != dtype:
        return False
    if type(buffer) in (torch.Tensor, nn.Parameter):
        plain = buffer.is_cpu and buffer.layout is torch.strided and buffer.is_contiguous()
        return bool(plain) and not buffer.is_neg()  # such a view has not turned its signs yet
    return isinstance(buffer, np.ndarray) and bool(buffer.flags.c_contiguous)


def _instructions() -> Iterator[list[str]]:
    """Options for this processor's instructions; then fewer, for compilers that do not know all of them."""
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
                os.replace(linked, library)  # in one step, since two processes may compile at the same time
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        # no compiler, no home folder, a $CXX that is no command, or a library that does not load
        return None

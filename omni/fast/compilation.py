"""C++ that lies beside a module, compiled on the user's machine the first time it is wanted.

    library = compile_library(Path(__file__).with_name("encoder.cpp"))
    if library is not None: ...

The result is kept in the user's cache folder ($XDG_CACHE_HOME/omni, or ~/.cache/omni), under the hash of all that it depends
on. Without a C++ compiler, or on a processor that the code is not for, there is none, so whoever asks has another way. $CXX
names the compiler; CXX=false does without.
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

import torch

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


@cache
def compile_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a file that are `extern "C"`, or None."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    return next(filter(None, (_compile(source, instructions) for instructions in _instructions())), None)


def _instructions() -> Iterator[list[str]]:
    """What this processor has, and less of it for compilers that do not know everything."""
    if plain := INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability()):
        if torch.cpu._is_avx512_bf16_supported():
            if torch.cpu._init_amx():  # asks the system for the matrix units: they are there and may be used
                yield [*plain, *BFLOAT16, *MATRIX_UNITS]
            yield [*plain, *BFLOAT16]
        yield plain


def _compile(source: Path, instructions: list[str]) -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    compile, link = [*compiler, *OPTIONS, *instructions, "-c"], [*compiler, "-shared"]
    text = source.read_bytes() + HEADER.read_bytes()
    key = hashlib.sha256(text + repr([compile, link]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "omni")
        library = folder / f"{source.stem}-{key[:16]}.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                compiled, linked = f"{beside}/compiled.o", f"{beside}/linked.so"
                compile += [f"-I{HEADER.parent}", str(source), "-o", compiled]
                for step in (compile, [*link, compiled, "-o", linked]):
                    subprocess.run(step, check=True, capture_output=True, timeout=300)
                os.replace(linked, library)  # in one step: two processes may do this at a time
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no compiler, no home, or a result that does not load
        return None

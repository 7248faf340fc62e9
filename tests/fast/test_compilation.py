"""C++ beside a module, compiled by real compilers and by failing ones; and the buffers that it may get."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni.fast.compilation import address, compile_library, threads

ADD = 'extern "C" int add(int a, int b) { return a + b; }\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compile_library.cache_clear()


def write(folder: Path, text: str) -> Path:
    path = folder / "sum.cpp"
    path.write_text(text, encoding="utf-8")
    return path


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "omni").iterdir())


def test_it_is_compiled_once_and_again_when_its_text_changes(
    tmp_path: Path, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    library = compile_library(write(tmp_path, ADD))
    assert isinstance(library, ctypes.CDLL)
    assert library.add(2, 3) == 5
    (name,) = kept(tmp_path)
    assert name.startswith("sum-")
    compile_library.cache_clear()
    made = (tmp_path / "cache" / "omni" / name).stat().st_mtime_ns
    assert compile_library(tmp_path / "sum.cpp").add(4, 3) == 7
    assert (tmp_path / "cache" / "omni" / name).stat().st_mtime_ns == made
    compile_library.cache_clear()
    assert compile_library(write(tmp_path, ADD.replace("a + b", "a - b"))).add(4, 3) == 1
    assert len(kept(tmp_path)) == 2


NO_COMPILERS = [
    "false",
    "no-such-compiler-anywhere",
    "true",
    "cat",
    'c++ "',
    "c++ 'x",
    "",
    " ",
    "\\",
    "-",
    "/",
    "c++ --no-such",
]


@pytest.mark.parametrize("compiler", NO_COMPILERS)
def test_without_a_compiler_there_is_none(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, one that is not there, one that says it worked and leaves nothing, and what is no command at all."""
    monkeypatch.setenv("CXX", compiler)
    assert compile_library(write(tmp_path, ADD)) is None


def test_a_library_that_lacks_a_function_is_none(tmp_path: Path, compiles: bool) -> None:
    path = write(tmp_path, ADD)
    assert compile_library(path, "add", "subtract") is None
    assert (compile_library(path, "add") is not None) == compiles


def test_code_that_does_not_compile_or_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_library(write(tmp_path, "this is not C++")) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_library.cache_clear()
    assert compile_library(write(tmp_path, ADD)) is None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_start_together_all_get_a_whole_one(tmp_path: Path, compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    path, children = write(tmp_path, ADD), []
    for _ in range(3):
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = compile_library(path).add(2, 3) != 5
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(kept(tmp_path)) == 1


def test_a_processor_of_another_kind_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert compile_library(write(tmp_path, ADD)) is None


def test_a_compiler_that_knows_less_compiles_for_less(
    tmp_path: Path, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    compiler = tmp_path / "old-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx*|*-mavx512bf16*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    text = ADD.replace("a + b", "__AVX2__ + a + b").replace("}", "}\n#ifdef __AVX512BF16__\n#error\n#endif")
    library = compile_library(write(tmp_path, text))
    assert library is not None
    assert library.add(2, 3) == 6


LESS = {
    "AVX2 alone": ("torch.backends.cpu.get_cpu_capability = lambda: 'AVX2'", "_is_avx512_bf16_supported", 16),
    "no matrix units": ("", "_init_amx", 32),
}


@pytest.mark.parametrize("kind", LESS)
def test_processors_that_have_less_encode_and_scale_alike(
    kind: str, compiles: bool, python: Callable[..., Any]
) -> None:
    """The same tests, in a process whose torch says that its processor has less than it has."""
    before, lacking, panel = LESS[kind]
    if not compiles or (panel == 32 and not torch.cpu._init_amx()):
        pytest.skip("there is no C++ compiler here, or there are no matrix units")
    code = (
        f"import sys, torch, pytest; {before or 'pass'}; torch.cpu.{lacking} = lambda: False; "
        f"from omni.fast.compiled_encoder import _library; assert _library().encoder_panel() == {panel}; "
        f"assert hasattr(_library(), 'encode_bfloat16') == ({lacking!r} == '_init_amx'); "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    tests = Path(__file__).parent
    chosen = [
        f"{tests}/test_packing.py::test_packed_equals_the_model[compiled-the seed's]",
        *(
            f"{tests}/test_packing.py::test_bfloat16_is_as_near_as_the_model_in_bfloat16[compiled-{shape}-bytes]"
            for shape in ("the seed's", "patches of 14")
        ),
        *([f"{tests}/test_resizing.py"] if panel == 16 else []),
    ]
    run = python("-c", code, *chosen)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


# --- Buffers ----------------------------------------------------------------------------------------------------------

PLAIN = torch.arange(6.0).view(2, 3)
OTHERS: dict[str, Callable[[], Any]] = {
    "another type": lambda: PLAIN.double(),
    "another shape": lambda: PLAIN[:1],
    "another order": lambda: torch.arange(6.0).view(3, 2).T,
    "every second number": lambda: torch.arange(12.0).view(2, 6)[:, ::2],
    "no memory": lambda: PLAIN.to("meta"),
    "sparse": lambda: PLAIN.to_sparse(),
    "a sign that is not turned yet": lambda: torch._neg_view(PLAIN),
    "an array of another type": lambda: PLAIN.numpy().astype(np.float64),
    "an array in another order": lambda: np.asfortranarray(PLAIN.numpy()),
    "a row": lambda: np.zeros(6, np.float32),
}


def test_a_plain_buffer_has_an_address() -> None:
    assert address(PLAIN, torch.float32, 2, 3) == PLAIN.data_ptr()
    assert address(torch.nn.Parameter(PLAIN), torch.float32, 2, 3) == PLAIN.data_ptr()
    assert address(PLAIN.numpy(), np.float32, 2, 3) == PLAIN.data_ptr()
    assert address(PLAIN[1:, :2], torch.float32, 1, 2) == PLAIN.data_ptr() + 12


@pytest.mark.parametrize("other", OTHERS)
def test_any_other_buffer_has_none(other: str) -> None:
    buffer = OTHERS[other]()
    dtype = np.float32 if isinstance(buffer, np.ndarray) else torch.float32
    with pytest.raises(
        BufferError, match=r"Expected .* of shape \(2, 3\) on cpu, one number after the other in memory; found"
    ):
        address(buffer, dtype, 2, 3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_runs_machine_code_on_one_thread() -> None:
    """The other threads are not there, and it would wait for them for ever."""
    assert threads() == torch.get_num_threads()
    child = os.fork()
    if child == 0:
        os._exit(threads())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

"""Files that are cut, holed, spliced and given wrong headers, and processes that read them.

Two processes read each file. Each fills its memory with a byte of its own, so a pixel or a sample that nobody wrote differs
between them. Failures are: a process that dies or takes more than ten seconds, an exception that is not a refusal in one
sentence, output on the terminal, two different results, and a cut file that is read as something else than the whole one.
"""

import hashlib
import importlib
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from campaigns.tally import Tally

PATIENCE = 10.0
"""Seconds that a file may take."""
MEMORY = 6 << 30
"""The most address space of a process that reads, in bytes."""


class Look(NamedTuple):
    """How a process reads the bytes of a file.

    Attributes:
        read: returns a summary, such as the size, and the whole content as bytes.
        refusal: the error of a file that cannot be read.
    """

    read: Callable[[bytes], tuple[str, bytes]]
    refusal: type[Exception]


# --- Damage -----------------------------------------------------------------------------------------------------------


def cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning of the file."""
    return data[: rng.randrange(len(data))]


def middle_gone(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning and the end of the file."""
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + data[stop:]


def hole(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Zeros at a random place."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(min(rng.choice((16, 64, 512, 4096)), len(data) - start)) + data[start + 4096 :]


def flips(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A few bytes changed."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 10))):
        damaged[rng.randrange(min(len(data), rng.choice((60, 400, 1 << 30))))] = rng.choice(
            (0, 255, rng.randrange(256))
        )
    return bytes(damaged)


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def numbers(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A wrong number in the header or in the table of tags."""
    width = rng.choice((1, 2, 4))
    end = len(data) if data[:2] in (b"II", b"MM") else min(len(data), 600)
    at = rng.randrange(max(1, end - width))
    value = rng.choice((0, 1, 2, (1 << 8 * width) - 1, 1 << (8 * width - 1), rng.randrange(1 << 8 * width)))
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def more_behind(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The whole file with bytes behind it."""
    return data + rng.choice((b"\0" * 100, other, rng.randbytes(50)))


Damage = Callable[[bytes, random.Random, bytes], bytes]
DAMAGES: tuple[Damage, ...] = (
    cut, cut, cut, cut, middle_gone, middle_gone, hole, hole, flips, flips, flips, splice, numbers, numbers, numbers,
    more_behind,
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged file.

    Attributes:
        name: its number, its kind and its damage.
        data: its bytes.
        whole: the bytes before the damage.
        loses: bytes are missing and nothing replaces them.
    """

    name: str
    data: bytes
    whole: bytes
    loses: bool


def mutants(files: Mapping[str, bytes], ends: Mapping[str, bytes], seed: int) -> Iterator[Mutant]:
    """Yield damaged files without end.

    Args:
        files: a whole file by kind; the first word of a kind is the format.
        ends: the end marker of a format. Half of the cut files get it.
        seed: the same seed gives the same files.
    """
    rng = random.Random(seed)
    for number in range(1 << 62):
        kind = rng.choice(sorted(files))
        damage = rng.choice(DAMAGES)
        alike = [each for each in sorted(files) if each.split()[0] == kind.split()[0]]
        data, how = damage(files[kind], rng, files[rng.choice(alike)]), damage.__name__
        if damage is cut and (end := ends.get(kind.split()[0])) and rng.random() < 0.5:
            data, how = data + end, "cut and ended"
        yield Mutant(f"{number}: {kind}, {how}", data, files[kind], damage is cut)


# --- Reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """A process that reads files.

    Args:
        module: a module with a function `look`.
        fill: the byte that fills its memory.
    """

    def __init__(self, module: str, fill: int) -> None:
        self.module, self.fill = module, fill
        self.errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        """Start a process, in the place of one that has ended."""
        filled = {
            "MALLOC_PERTURB_": str(self.fill),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
            "MALLOC_TOP_PAD_": str(1 << 26),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "campaigns.damage", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env={**os.environ, **filled},
        )  # fmt: skip
        self.answer(120)

    def send(self, data: bytes) -> None:
        """Send a file to the process."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(struct.pack(">Q", len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` reports it

    def answer(self, patience: float) -> dict[str, Any]:
        """The outcome of a file: `read` with a hash, `refused` with a sentence, or `failed` with what is wrong."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.stop()
            problem = f"dies with status {self.process.returncode}" if ready else f"takes more than {patience:g} s"
            self.start()
            return {"failed": problem}
        found: dict[str, Any] = json.loads(line)
        self.errors.seek(0)
        if words := self.errors.read().strip(b"\0"):  # zeros stand where an earlier call truncated the file
            self.errors.truncate(0)
            found = {"failed": f"the terminal says {words[:200]!r}"}
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def read_all(module: str) -> None:
    """Read files from standard input and write an outcome for each to standard output, in a process of its own."""
    look: Look = importlib.import_module(module).look()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe, answers = sys.stdin.buffer, sys.stdout

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    answer(ready=True)
    while size := pipe.read(8):
        data = pipe.read(*struct.unpack(">Q", size))
        try:
            words, content = look.read(data)
            answer(read=f"{words} {hashlib.sha256(content).hexdigest()}")
        except look.refusal as error:
            one = str(error).endswith(".") and "\n" not in str(error)
            answer(**{"refused" if one else "failed": str(error)})
        except BaseException:
            answer(failed=traceback.format_exc(limit=-3))


def read_damaged(
    module: str, files: Mapping[str, bytes], ends: Mapping[str, bytes], seed: int, count: int, seconds: float
) -> Tally:
    """Read `count` damaged files, or as many as fit into the time; see `mutants`."""
    end = time.monotonic() + seconds
    tried = refused = unchanged = 0
    failures: list[str] = []
    whole: dict[bytes, dict[str, Any]] = {}
    with ExitStack() as stack:
        readers = [Reader(module, fill) for fill in (0x55, 0xAA)]
        for reader in readers:
            stack.callback(reader.stop)

        def read(data: bytes) -> list[dict[str, Any]]:
            for reader in readers:
                reader.send(data)
            return [reader.answer(PATIENCE) for reader in readers]

        for mutant in mutants(files, ends, seed):
            if tried == count or time.monotonic() > end:
                break
            if mutant.whole not in whole:
                whole[mutant.whole] = read(mutant.whole)[0]
                if "read" not in whole[mutant.whole]:
                    failures.append(f"seed {seed}, {mutant.name}: the whole file is not read: {whole[mutant.whole]}")
            one, other = read(mutant.data)
            tried += 1
            refused += "refused" in one
            unchanged += one == whole[mutant.whole]
            if problem := one.get("failed") or other.get("failed"):
                failures.append(f"seed {seed}, {mutant.name}: {problem}")
            elif one != other:
                failures.append(f"seed {seed}, {mutant.name}: depends on what lay in memory: {one} {other}")
            elif mutant.loses and "read" in one and one != whole[mutant.whole]:
                failures.append(f"seed {seed}, {mutant.name}: is cut, and is read all the same")
    return Tally(tried, refused, unchanged, tuple(failures))


if __name__ == "__main__":
    read_all(sys.argv[1])

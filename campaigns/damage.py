"""Files that are cut, holed, spliced and given wrong headers, and processes that read them.

Two processes read each file, in memory that is filled with other bytes in either, so that a pixel or a sample which nobody
wrote shows. What counts as fallen through: a process that dies or takes more than ten seconds, any exception but the one
that says in a sentence what is wrong, a word on the terminal, something else in either process, and a file that was cut
and is read all the same, as something else than the whole one.
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
"""Seconds for one file."""
MEMORY = 6 << 30
"""Bytes of address space for a process that reads."""


class Look(NamedTuple):
    """How a process reads the bytes of a file.

    Attributes:
        read: what is in it: a few words, such as its size, and all of it as bytes.
        refusal: what is raised at a file that cannot be read.
    """

    read: Callable[[bytes], tuple[str, bytes]]
    refusal: type[Exception]


# --- Damage -----------------------------------------------------------------------------------------------------------


def cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The beginning."""
    return data[: rng.randrange(len(data))]


def middle_gone(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Beginning and end."""
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + data[stop:]


def hole(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Zeros somewhere."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(min(rng.choice((16, 64, 512, 4096)), len(data) - start)) + data[start + 4096 :]


def flips(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A few other bytes."""
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
    """A number of the header, or of the table of tags, that is none."""
    width = rng.choice((1, 2, 4))
    end = len(data) if data[:2] in (b"II", b"MM") else min(len(data), 600)
    at = rng.randrange(max(1, end - width))
    value = rng.choice((0, 1, 2, (1 << 8 * width) - 1, 1 << (8 * width - 1), rng.randrange(1 << 8 * width)))
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def more_behind(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A whole file, and something behind it."""
    return data + rng.choice((b"\0" * 100, other, rng.randbytes(50)))


Damage = Callable[[bytes, random.Random, bytes], bytes]
DAMAGES: tuple[Damage, ...] = (
    cut, cut, cut, cut, middle_gone, middle_gone, hole, hole, flips, flips, flips, splice, numbers, numbers, numbers,
    more_behind,
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged file; `loses`: something was taken, and nothing put in its place."""

    name: str
    data: bytes
    whole: bytes
    loses: bool


def mutants(files: Mapping[str, bytes], ends: Mapping[str, bytes], seed: int) -> Iterator[Mutant]:
    """Without end.

    Args:
        files: a whole one of each kind; the first word is the format.
        ends: what stands at the end of a format. Half of the files that are cut get it.
        seed: the same makes the same.
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
    """A process that reads files, in memory that is filled with a byte of its own; `module` has a function `look`."""

    def __init__(self, module: str, fill: int) -> None:
        self.module, self.fill = module, fill
        self.said = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self.start()

    def start(self) -> None:
        """A new process in the place of one that is gone."""
        filled = {
            "MALLOC_PERTURB_": str(self.fill),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
            "MALLOC_TOP_PAD_": str(1 << 26),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "campaigns.damage", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env={**os.environ, **filled},
        )  # fmt: skip
        self.answer(120)

    def send(self, data: bytes) -> None:
        """One file."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(struct.pack(">Q", len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says so

    def answer(self, patience: float) -> dict[str, Any]:
        """What became of it: `read`, a hash, or `refused`, a sentence; or `fell`, what went wrong."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.stop()
            problem = f"dies with status {self.process.returncode}" if ready else f"takes more than {patience:g} s"
            self.start()
            return {"fell": problem}
        found: dict[str, Any] = json.loads(line)
        self.said.seek(0)
        if words := self.said.read().strip(b"\0"):  # which stand where it was cut
            self.said.truncate(0)
            found = {"fell": f"the terminal says {words[:200]!r}"}
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def read_all(module: str) -> None:
    """In a process of its own: files from the standard input, an answer for each on the output."""
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
            answer(**{"refused" if one else "fell": str(error)})
        except BaseException:
            answer(fell=traceback.format_exc(limit=-3))


def read_damaged(
    module: str, files: Mapping[str, bytes], ends: Mapping[str, bytes], seed: int, count: int, seconds: float
) -> Tally:
    """Read so many damaged files, or as many as there is time for; see `mutants`."""
    end = time.monotonic() + seconds
    tried = refused = unchanged = 0
    fallen: list[str] = []
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
                    fallen.append(f"seed {seed}, {mutant.name}: the whole one is not read: {whole[mutant.whole]}")
            one, other = read(mutant.data)
            tried += 1
            refused += "refused" in one
            unchanged += one == whole[mutant.whole]
            if problem := one.get("fell") or other.get("fell"):
                fallen.append(f"seed {seed}, {mutant.name}: {problem}")
            elif one != other:
                fallen.append(f"seed {seed}, {mutant.name}: differs by what lay in memory: {one} {other}")
            elif mutant.loses and "read" in one and one != whole[mutant.whole]:
                fallen.append(f"seed {seed}, {mutant.name}: is cut, and is read")
    return Tally(tried, refused, unchanged, tuple(fallen))


if __name__ == "__main__":
    read_all(sys.argv[1])

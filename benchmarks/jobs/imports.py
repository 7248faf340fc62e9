"""Start: the time to import omni, and to print the command's help, each in a new process."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.machine import ROOT
from benchmarks.measure import Call, Contestant, Race


def races(quick: bool) -> Iterator[Race]:
    """One race. The column "more than it" is the time that omni adds to torch."""
    contestants = [
        Contestant("import torch", partial(_start, "-c", "import torch")),
        Contestant("import omni", partial(_start, "-c", "import omni"), ours=True),
        Contestant("import torch, omni", partial(_start, "-c", "import torch, omni"), ours=True),
        Contestant("omni --help", partial(_start, "-m", "omni", "--help"), ours=True),
    ]
    yield Race("a new process", contestants, sample=0)


def _start(*arguments: str) -> Call:
    return partial(subprocess.run, [sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

"""Starting up: importing omni, and the command's help, each in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.machine import ROOT
from benchmarks.measure import Call, Contestant, Race


def races(quick: bool) -> Iterator[Race]:
    """One race; "more than it" is what omni adds to torch, which everybody imports anyway."""
    contestants = [
        Contestant("import torch", partial(_start, "-c", "import torch")),
        Contestant("import omni", partial(_start, "-c", "import omni"), ours=True),
        Contestant("import torch, omni", partial(_start, "-c", "import torch, omni"), ours=True),
        Contestant("omni --help", partial(_start, "-m", "omni", "--help"), ours=True),
    ]
    yield Race("a new process", contestants, sample=0)


def _start(*arguments: str) -> Call:
    return partial(subprocess.run, [sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

"""The command `omni`: a subcommand reads its arguments, calls one function of the library and prints what it returns.

Whatever is heavy is imported inside of a command, so that `omni --help` and shell completion answer at once. What goes
wrong because of what somebody passed is one sentence on stderr and exit status 2; it is converted where it can happen,
so that a bug of ours still shows its traceback. What the system refuses, such as room on a disk, is converted here.
"""

import os
import sys

from omni.cli import asking, benching, checkpoint, embedding, evaluating, exchange, looking, serving, training
from omni.cli.commands import app

__all__ = [
    "app",
    "asking",
    "benching",
    "checkpoint",
    "embedding",
    "evaluating",
    "exchange",
    "looking",
    "main",
    "serving",
    "training",
]


def main() -> None:
    """Run the command; the entry point of the installed package."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" of {str(error.filename)!r}" if error.filename else ""
        sys.stderr.write(f"Error: the system says {error.strerror or str(error)!r}{where}; nothing more was done.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
